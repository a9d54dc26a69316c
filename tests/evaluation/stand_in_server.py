"""An OpenAI-compatible server on a real socket that says what a test tells it to."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Told = tuple[int, dict[str, str], Any]  # status, headers, body (bytes as they are, else JSON)


def completion(content: str | None, finish: str = "stop", tokens: int = 7, **message: Any) -> Told:
    turn = {"role": "assistant", "content": content} | message
    body = {"choices": [{"index": 0, "message": turn, "finish_reason": finish}]}
    return 200, {}, body | {"usage": {"completion_tokens": tokens}}


def failure(status: int, message: str, **headers: str) -> Told:
    return status, headers, {"error": {"message": message}}


class StandIn:
    """``answer(body, number)`` of the chat request, which is the number-th (from 0); ``with`` it.
    ``asked``: every chat request's body; ``keys``: their authorization."""

    def __init__(self, answer: Callable[[dict, int], Told], models: tuple[str, ...] = ("m",)):
        self.answer, self.models = answer, models
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "StandIn":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = {"data": [{"id": name} for name in stand_in.models]}
                found = self.path == "/v1/models"
                self.tell((200, {}, known) if found else failure(404, f"no {self.path}"))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with stand_in._lock:
                    number = len(stand_in.asked)
                    stand_in.asked.append(body)
                    stand_in.keys.append(self.headers["authorization"])
                    stand_in.at_once += 1
                    stand_in.most_at_once = max(stand_in.most_at_once, stand_in.at_once)
                try:
                    self.tell(stand_in.answer(body, number))
                finally:
                    with stand_in._lock:
                        stand_in.at_once -= 1

            def tell(self, told: Told) -> None:
                status, headers, body = told
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        return Handler
