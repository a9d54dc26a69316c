"""The one downloader: resumable, checked, whole or not at all.

A download grows in `FILE.part`; a broken line or a killed process costs only what was not yet
written, since the next try asks for the rest. Nothing gets its final name before its checksum is
right, and what is wrong is put aside. Secrets go to the host they are meant for and no other.
"""

from __future__ import annotations

import base64
import http.client
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from qiusuo.data.atomic import disk_errors, sync
from qiusuo.data.digests import check_digest
from qiusuo.data.errors import DataError

Progress = Callable[[int, int], None]
"""Called with bytes so far and bytes in all."""

CHUNK = 1 << 18
TIMEOUT = 60.0
TRIES = 5
LARGEST_PAGE = 1 << 26
"""Bytes of a page of an index or an API; the largest real ones have a few million."""


class UnreachableError(DataError):
    """No server at that address, or no address at all."""


class RefusedError(DataError):
    """A server at `address` answered with an error: HTTP status, and a hub's own word for it."""

    def __init__(self, address: str, status: int, reason: str, code: str) -> None:
        super().__init__(f"{address} answered {status} {reason}")
        self.address, self.status, self.code = address, status, code


class BrokenLineError(DataError):
    """The line broke after it was made; asking again may help."""


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch. `size` in bytes; `digest` as in digests.py."""

    name: str
    url: str
    size: int
    digest: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


def download(
    wanted: RemoteFile,
    target: Path,
    *,
    again: str,
    rejected: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Fetch `wanted` to `target` by way of `target.part`, which a later call goes on with.

    `again` says how to go on, `rejected` is where a wrong file is put aside. `RefusedError` and
    `UnreachableError` are left to the caller, who knows the remedy.
    """
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(target)
        _complete(wanted, part, again, progress)
        aside = rejected or target.with_name(f"{target.name}.rejected")
        check_file(part, wanted.name, wanted.size, wanted.digest, aside)
        sync(part)
        part.replace(target)
        sync(target.parent)


def part_of(target: Path) -> Path:
    """Where a download grows before it gets its name."""
    return target.with_name(f"{target.name}.part")


def check_file(path: Path, name: str, size: int, digest: str, aside: Path) -> None:
    """Refuse a file of another size or checksum, putting it aside."""
    try:
        check_digest(path, size, digest)
    except DataError as error:
        aside.parent.mkdir(parents=True, exist_ok=True)
        path.replace(aside)
        raise DataError(
            f"{name} is not the file that was pinned: {error}; it is put aside as {aside}; "
            f"pull again, and if this repeats do not trust the mirror"
        ) from error


def _complete(wanted: RemoteFile, part: Path, again: str, progress: Progress | None) -> None:
    """Let `part` grow to the full size, going on where it stands after each broken line."""
    failure: DataError | None = None
    for _ in range(TRIES):
        part.touch()
        size = part.stat().st_size
        if size > wanted.size:
            part.unlink()
            size = 0
        if size < wanted.size:
            try:
                _append(wanted, part, size, progress)
            except BrokenLineError as error:
                failure = error
        if part.exists() and part.stat().st_size >= wanted.size:
            if progress is not None:
                progress(wanted.size, wanted.size)
            return
    raise DataError(
        f"the download of {wanted.name} broke off {TRIES} times and stands at "
        f"{part.stat().st_size if part.exists() else 0} of {wanted.size} bytes "
        f"({failure or 'the server closed the line'}): {again}, it goes on from there"
    )


def _append(wanted: RemoteFile, part: Path, size: int, progress: Progress | None) -> None:
    """One request for the bytes from `size` on, appended to `part`."""
    headers = dict(wanted.headers) | ({"Range": f"bytes={size}-"} if size else {})
    with open_url(wanted.url, headers) as answer:
        # A server that knows no ranges sends everything again, with status 200.
        resumed = answer.status == http.HTTPStatus.PARTIAL_CONTENT
        sent = answer.headers.get("Content-Range", "")
        if resumed and sent and not sent.startswith(f"bytes {size}-"):
            raise DataError(
                f"{wanted.name}: asked for the bytes from {size} on, the server sent {sent!r}: "
                f"try again later, or another mirror"
            )
        done = size if resumed else 0
        with part.open("ab" if resumed else "wb") as file:
            for chunk in _chunks(answer):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(min(done, wanted.size), wanted.size)
                if done > wanted.size:  # one byte too many is enough to see it is another file
                    return


def _chunks(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """What comes, until the end or until the line breaks; errors of the disk are not mixed in."""
    while True:
        try:
            chunk = answer.read(CHUNK)
        except (http.client.HTTPException, OSError) as error:
            raise BrokenLineError(f"{error or type(error).__name__}") from error
        if not chunk:
            return
        yield chunk


def fetch_page(url: str, headers: Mapping[str, str]) -> tuple[str, bytes]:
    """Content type and body of a page; `BrokenLineError` unless it came whole."""
    with open_url(url, headers) as answer:
        try:
            body = answer.read(LARGEST_PAGE)
        except (http.client.HTTPException, OSError) as error:
            raise BrokenLineError(f"{show_url(url)} broke off its answer ({error})") from error
        if answer.length:
            raise BrokenLineError(f"{show_url(url)} broke off its answer, or it is far too long")
        return answer.headers.get("Content-Type", ""), body


def open_url(url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    """The answer to a GET, after redirects. A name and password in the URL become a header."""
    parts = urllib.parse.urlsplit(url)
    shown = show_url(url)
    if parts.scheme not in ("https", "http"):
        raise UnreachableError(f"{shown} is not an http(s) address")
    headers = {"User-Agent": "qiusuo", **headers}
    if parts.username:
        pair = f"{parts.username}:{parts.password or ''}"
        secret = base64.b64encode(urllib.parse.unquote(pair).encode()).decode()
        headers["Authorization"] = f"Basic {secret}"
    host = parts.netloc.rpartition("@")[2]
    address = urllib.parse.urlunsplit(parts._replace(netloc=host, fragment=""))
    request = urllib.request.Request(address, headers=headers)
    try:
        answer: http.client.HTTPResponse = _OPENER.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        # The last address of a redirect may carry a signature: only its host and path are shown.
        at = show_url(error.url) if error.url else shown
        code = error.headers.get("X-Error-Code", "") if error.headers else ""
        error.close()
        raise RefusedError(at, error.code, error.reason, code) from error
    except urllib.error.URLError as error:
        raise UnreachableError(f"cannot reach {host} ({error.reason})") from error
    except (http.client.HTTPException, OSError) as error:
        raise BrokenLineError(f"{host} broke off its answer ({error})") from error
    return answer


def show_url(url: str) -> str:
    """The URL as it may be printed: without password, query and fragment."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit(parts._replace(netloc=host, query="", fragment=""))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects with all headers (`Range` above all) but the secret, which stays home."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in ("https", "http"):
            raise UnreachableError(f"{show_url(req.full_url)} points on to {show_url(newurl)}")
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and _origin(newurl) != _origin(req.full_url):
            following.remove_header("Authorization")
        return following


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


_OPENER = urllib.request.build_opener(_Redirects)
