"""Fetch what the catalogue names, once: resumable, checked, whole or not at all.

A download grows in `FILE.part`; a broken line or a killed process costs only what was not yet
written, since the next try asks for the rest. Nothing gets its final name before its sha256 is
right. The cache is `$QIUSUO_HOME` or `~/.cache/qiusuo`.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from qiusuo.data.atomic import disk_errors, sync
from qiusuo.data.catalogue import Entry, find_fetched
from qiusuo.data.errors import DataError
from qiusuo.data.package_index import archive_url

Progress = Callable[[int, int], None]
"""Called with bytes so far and bytes in all."""

CHUNK = 1 << 18
TIMEOUT = 60.0
TRIES = 5


def cache_folder() -> Path:
    """Where fetched archives are kept."""
    home = os.environ.get("QIUSUO_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "qiusuo"


def archive_path(entry: Entry, cache: Path | None = None) -> Path:
    """Where the archive of an entry is, or will be once pulled."""
    return (cache or cache_folder()) / "archives" / entry.file


def pull(name: str, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Download the archive of `name` unless it is there already; its path in the cache.

    `DataError` for an unknown name, an unreachable index, a broken line, a wrong checksum.
    """
    entry = find_fetched(name)
    path = archive_path(entry, cache)
    if path.is_file():
        if _sha256(path) == entry.sha256:
            return path
        _reject(path, entry)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        _complete(entry, part, progress)
        if _sha256(part) != entry.sha256:
            _reject(part, entry)
        sync(part)
        part.replace(path)
        sync(path.parent)
    return path


def _complete(entry: Entry, part: Path, progress: Progress | None) -> None:
    """Let `part` grow to the full size, going on where it stands after each broken line."""
    if part.exists() and part.stat().st_size == entry.bytes:
        return
    url = archive_url(entry, _fetch)
    failure: Exception | None = None
    for _ in range(TRIES):
        size = part.stat().st_size if part.exists() else 0
        if size > entry.bytes:
            part.unlink()
            size = 0
        try:
            _download(url, part, size, entry.bytes, progress)
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            failure = error
        if part.exists() and part.stat().st_size >= entry.bytes:
            return
    got = part.stat().st_size if part.exists() else 0
    raise DataError(
        f"the download of {entry.file} broke off {TRIES} times and stands at {got} of "
        f"{entry.bytes} bytes ({failure or 'the server closed the line'}): run "
        f"`qiusuo pull {entry.name}` again, it goes on from there"
    )


def _download(url: str, part: Path, size: int, total: int, progress: Progress | None) -> None:
    """One request for the bytes from `size` on, appended to `part`."""
    headers = {"Range": f"bytes={size}-"} if size else {}
    with _open(url, headers) as answer:
        # A server that knows no ranges sends everything again, with status 200.
        resumed = answer.status == http.HTTPStatus.PARTIAL_CONTENT
        done = size if resumed else 0
        with part.open("ab" if resumed else "wb") as file:
            # One byte too many is enough to see that it is another file.
            while done <= total and (chunk := answer.read(CHUNK)):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)


def _fetch(url: str, headers: dict[str, str]) -> tuple[str, bytes]:
    try:
        with _open(url, headers) as answer:
            return answer.headers.get("Content-Type", ""), answer.read()
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise DataError(f"the package index broke off its answer ({error}): try again") from error


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    shown = urllib.parse.urlunsplit(parts._replace(netloc=host))
    if parts.scheme not in ("https", "http"):
        raise DataError(f"{shown} is not an http(s) address: check PIP_INDEX_URL and its like")
    headers = {"User-Agent": "qiusuo", **headers}
    if parts.username:
        pair = f"{parts.username}:{parts.password or ''}"
        secret = base64.b64encode(urllib.parse.unquote(pair).encode()).decode()
        headers["Authorization"] = f"Basic {secret}"
    try:
        return urllib.request.urlopen(
            urllib.request.Request(shown, headers=headers), timeout=TIMEOUT
        )
    except urllib.error.HTTPError as error:
        raise DataError(
            f"{shown} answered {error.code} {error.reason}: try again later, or point "
            f"PIP_INDEX_URL, npm_config_registry or QIUSUO_DEBIAN_MIRROR at one that has"
        ) from error
    except (urllib.error.URLError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(
            f"cannot reach {host} ({reason}): check the network, or point PIP_INDEX_URL, "
            f"npm_config_registry or QIUSUO_DEBIAN_MIRROR at a mirror that can be reached"
        ) from error


def _reject(path: Path, entry: Entry) -> None:
    """Put a wrong file aside and refuse it."""
    actual = _sha256(path)
    rejected = path.with_name(entry.file + ".rejected")
    path.replace(rejected)
    raise DataError(
        f"{entry.file} is not the file that was pinned: sha256 {actual}, expected {entry.sha256}; "
        f"it is put aside as {rejected}; pull again, and if this repeats do not trust the mirror"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
