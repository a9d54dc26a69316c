"""What holds for every request before any route sees it: a bounded body, and safe headers."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qiusuo.server.api.errors import ApiError, answer
from qiusuo.server.metrics import Metrics

POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'"
)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": POLICY,
}


class Bounds:
    """Refuses a body of more than ``most_body`` bytes, however it is sent; sets ``HEADERS`` where
    a route has not; counts what was answered."""

    def __init__(self, app: ASGIApp, most_body: int, metrics: Metrics) -> None:
        self.app, self.most_body, self.metrics = app, most_body, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        taken, begun = 0, False

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.most_body:
                raise HTTPException(413, self._refusal)  # answered as any error of a route
            return message

        async def guarded(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                route = scope.get("route")
                path = getattr(route, "path", "other")
                self.metrics.request(path, message["status"])
            await send(message)

        try:
            if self._declared(scope) > self.most_body:
                raise ApiError(413, self._refusal)
            await self.app(scope, bounded, guarded)
        except Exception as error:  # what no route foresaw: it has headers and is counted, too
            if begun:
                raise
            response = await answer(Request(scope), error)
            await response(scope, receive, guarded)

    @property
    def _refusal(self) -> str:
        return f"the request's body is larger than {self.most_body:,} bytes"

    @staticmethod
    def _declared(scope: Scope) -> int:
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit():
                return int(value)
        return 0
