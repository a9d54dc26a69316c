"""A hub on this machine: its API, `resolve` with redirects, a second server for large files."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

LARGE = (".safetensors", ".gguf", ".bin")


@dataclass
class Request:
    host: str
    path: str
    range: str | None
    token: str | None


@dataclass
class StandInHub:
    """`files` of every repository, by path; what is sent can be spoilt in several ways.

    `cut` ends each file after so many bytes, `stall_at` holds it there until `released`; `spoilt`
    is sent in place of the right bytes. `refuse` answers every call with that status and code.
    """

    files: dict[str, bytes]
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    token: str = ""
    ranges: bool = True
    lengths: bool = True
    etag: str = '"first"'
    cut: int | None = None
    stall_at: int | None = None
    refuse: tuple[int, str] | None = None
    spoilt: dict[str, bytes] = field(default_factory=dict)
    listing: object = None
    address: str = ""
    storage: str = ""
    released: threading.Event = field(default_factory=threading.Event)
    requests: list[Request] = field(default_factory=list)

    def answer(self, handler: http.server.BaseHTTPRequestHandler, *, store: bool) -> None:
        """One GET; `store` for the server of large files, which knows no tokens."""
        path = urllib.parse.unquote(urllib.parse.urlsplit(handler.path).path)
        token = handler.headers.get("Authorization")
        asked = handler.headers.get("Range")
        self.requests.append(Request("store" if store else "hub", path, asked, token))
        if self.refuse is not None:
            self._refuse(handler, *self.refuse)
        elif store:
            self._send_file(handler, path.removeprefix("/large/"), asked)
        elif self.token and token != f"Bearer {self.token}":
            self._refuse(handler, 401, "RepoNotFound")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self._send_list(handler, match[1], match[2])
        elif match := re.fullmatch(r"/[^/]+/[^/]+/resolve/([^/]+)/(.+)", path):
            self._send_on(handler, match[1], match[2])
        elif path.startswith("/api/resolve-cache/"):
            self._send_file(handler, path.removeprefix("/api/resolve-cache/"), asked)
        else:
            self._refuse(handler, 404, "RepoNotFound")

    def _send_list(self, handler, name: str, revision: str) -> None:
        if name == "old/name":  # renamed: the hub points to the new name with a bare path
            self._redirect(handler, 307, f"/api/models/owner/name/revision/{revision}?blobs=true")
        elif name != "owner/name":
            self._refuse(handler, 404, "RepoNotFound")
        elif revision not in ("main", "v1", "refs/pr/1", self.commit):
            self._refuse(handler, 404, "RevisionNotFound")
        else:
            siblings = [describe(path, content) for path, content in self.files.items()]
            answer = self.listing or {"id": name, "sha": self.commit, "siblings": siblings}
            self._send(handler, 200, json.dumps(answer).encode())

    def _send_on(self, handler, revision: str, path: str) -> None:
        if revision != self.commit or path not in self.files:
            self._refuse(handler, 404, "EntryNotFound")
        elif path.endswith(LARGE):
            signed = f"{self.storage}/large/{urllib.parse.quote(path)}?X-Signature=s3cret"
            self._redirect(handler, 302, signed)
        else:
            self._redirect(handler, 307, f"/api/resolve-cache/{urllib.parse.quote(path)}")

    def _send_file(self, handler, path: str, asked: str | None) -> None:
        if path not in self.files:
            self._refuse(handler, 404, "EntryNotFound")
            return
        content = self.spoilt.get(path, self.files[path])
        match = re.fullmatch(r"bytes=(\d+)-", asked or "")
        start = int(match[1]) if match and self.ranges else 0
        body = content[start:]
        handler.send_response(206 if match and self.ranges else 200)
        if match and self.ranges:
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            handler.send_header("Content-Range", span)
        if self.lengths:
            handler.send_header("Content-Length", str(len(body)))
        handler.send_header("ETag", self.etag)
        handler.end_headers()
        if self.stall_at is not None and path.endswith(LARGE):
            handler.wfile.write(body[: self.stall_at])
            handler.wfile.flush()
            self.released.wait()
            return
        handler.wfile.write(body if self.cut is None else body[: self.cut])

    def _redirect(self, handler, status: int, location: str) -> None:
        handler.send_response(status)
        handler.send_header("Location", location)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def _refuse(self, handler, status: int, code: str) -> None:
        handler.send_response(status)
        handler.send_header("X-Error-Code", code)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def _send(self, handler, status: int, body: bytes) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json; charset=utf-8")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def fetched(self) -> list[tuple[str, str | None]]:
        """The files that were sent, with the range asked for."""
        marks = ("/large/", "/api/resolve-cache/")
        return [
            (request.path.removeprefix(mark), request.range)
            for request in self.requests
            for mark in marks
            if request.path.startswith(mark)
        ]


def describe(path: str, content: bytes) -> dict[str, object]:
    """A file as the API lists it: git's name of the blob, and the sha256 of large ones."""
    entry: dict[str, object] = {"rfilename": path, "size": len(content)}
    stored = content
    if path.endswith(LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        stored = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\n"
            f"size {len(content)}\n"
        ).encode()
        entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": len(stored)}
    header = b"blob " + str(len(stored)).encode() + bytes(1)
    entry["blobId"] = hashlib.sha1(header + stored).hexdigest()
    return entry


@contextmanager
def serve(hub: StandInHub) -> Iterator[StandInHub]:
    """The hub at `hub.address` and its store at `hub.storage`, until the block ends."""
    servers = [_server(hub, store=False), _server(hub, store=True)]
    hub.address, hub.storage = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        for server in servers
    ]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


def _server(hub: StandInHub, *, store: bool) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(ConnectionError):  # those who asked may hang up
                hub.answer(self, store=store)

        def log_message(self, *args: object) -> None:
            pass

    return http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
