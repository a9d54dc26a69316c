"""Where a pinned archive lies today: asked of the package index that the machine is set up for.

PyPI: `PIP_INDEX_URL` (the simple API, JSON or HTML). npm: `npm_config_registry`. Debian: the pool
of `QIUSUO_DEBIAN_MIRROR`. The index only says where; what comes is checked against our sha256.
"""

from __future__ import annotations

import html.parser
import json
import os
import urllib.parse
from collections.abc import Callable

from qiusuo.data.catalogue import Entry
from qiusuo.data.errors import DataError

NPM_REGISTRY = "npm_config_registry"
SIMPLE_TYPES = "application/vnd.pypi.simple.v1+json, text/html;q=0.2"
Fetch = Callable[[str, dict[str, str]], tuple[str, bytes]]
"""A URL and request headers to the content type and the body."""


def archive_url(entry: Entry, fetch: Fetch) -> str:
    """The URL of the entry's archive; `DataError` if the index no longer has that file."""
    if entry.registry == "pypi":
        return _pypi_url(entry, fetch)
    if entry.registry == "npm":
        return _npm_url(entry, fetch)
    mirror = os.environ.get("QIUSUO_DEBIAN_MIRROR", "https://deb.debian.org/debian").rstrip("/")
    return f"{mirror}/pool/main/{entry.package[0]}/{entry.package}/{entry.file}"


def _pypi_url(entry: Entry, fetch: Fetch) -> str:
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    page = f"{index}/{entry.package}/"
    content_type, body = fetch(page, {"Accept": SIMPLE_TYPES})
    if "json" in content_type:
        links = {file["filename"]: file["url"] for file in _parse_json(page, body)["files"]}
    else:
        links = _html_links(body.decode("utf-8", "replace"))
    if entry.file not in links:
        raise DataError(f"{page} does not list {entry.file}: the index may be a partial mirror")
    return urllib.parse.urljoin(page, links[entry.file])


def _npm_url(entry: Entry, fetch: Fetch) -> str:
    registry = os.environ.get(NPM_REGISTRY, "https://registry.npmjs.org").rstrip("/")
    page = f"{registry}/{urllib.parse.quote(entry.package, safe='@')}/{entry.version}"
    _, body = fetch(page, {"Accept": "application/json"})
    try:
        return str(_parse_json(page, body)["dist"]["tarball"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{page} names no tarball") from error


def _parse_json(page: str, body: bytes) -> dict:
    try:
        return json.loads(body)
    except ValueError as error:
        raise DataError(f"{page} did not answer with JSON: {error}") from error


def _html_links(page: str) -> dict[str, str]:
    links: dict[str, str] = {}

    class Anchors(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            href = dict(attrs).get("href")
            if tag == "a" and href:
                path = urllib.parse.urlsplit(href).path
                links[urllib.parse.unquote(path.rsplit("/", 1)[-1])] = href

    Anchors().feed(page)
    return links
