"""/docs: the API's own description, shown by Swagger UI from this machine and no other."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import FileResponse, HTMLResponse, Response

from qiusuo.server.api.errors import ApiError

router = APIRouter(include_in_schema=False)

STATIC = files("fastapi_offline") / "static"
FILES = ("swagger-ui.css", "swagger-ui-bundle.js")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Qiusuo: the API</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><link rel="stylesheet" href="/docs/swagger-ui.css"></head>
<body><div id="swagger-ui"></div>
<script src="/docs/swagger-ui-bundle.js"></script><script src="/docs/start.js"></script>
</body></html>
"""
START = 'SwaggerUIBundle({url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true});\n'


@router.get("/docs")
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE)


@router.get("/docs/start.js")
async def start() -> Response:
    return Response(START, media_type="text/javascript")


@router.get("/docs/{name}")
async def file(name: str) -> FileResponse:
    if name not in FILES:
        raise ApiError(404, f"there is no /docs/{name[:80]}")
    return FileResponse(str(STATIC / name))
