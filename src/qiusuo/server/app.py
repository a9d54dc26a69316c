"""The web application: every route, and what holds for all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import FileResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

from qiusuo.server import documentation
from qiusuo.server.api import anthropic, chat, completions, errors, listing, responses
from qiusuo.server.api.auth import AdminDep, HouseDep
from qiusuo.server.bounds import Bounds
from qiusuo.server.house import House
from qiusuo.server.page import chats, console, models, studio
from qiusuo.version import __version__

STATIC = Path(str(files("qiusuo.server") / "static"))
PREFIXES = ("", "/v1", "/beta")  # DeepSeek's own address has neither, OpenAI's clients add the /v1


def create_app(house: House) -> FastAPI:
    """The application on a house that is open; it closes it in the end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await house.desk.drain(0.0)
        await house.close()

    app = FastAPI(
        title="Qiusuo",
        version=__version__,
        description="The DeepSeek, OpenAI and Anthropic API of your own models.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.house = house
    errors.answer_errors(app)
    api = APIRouter()
    for part in (chat, completions, responses, listing):
        api.include_router(part.router)
    for prefix in PREFIXES:
        app.include_router(api, prefix=prefix, include_in_schema=prefix == "/v1")
    for part in (anthropic, models, chats, studio, console, documentation):
        app.include_router(part.router)
    app.include_router(_own())
    if (STATIC / "assets").is_dir():
        app.mount("/assets", StaticFiles(directory=STATIC / "assets"), name="assets")
    app.add_middleware(Bounds, most_body=house.settings.most_body, metrics=house.metrics)
    if house.settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(house.settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients tell of themselves in a dozen of their own
        )
    return app


def _own() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/metrics")
    async def metrics(house: HouseDep, caller: AdminDep) -> Response:
        return Response(house.metrics.text(), media_type="text/plain; version=0.0.4")

    @router.get("/")
    @router.get("/studio")
    @router.get("/studio/{rest:path}")
    @router.get("/console")
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    return router
