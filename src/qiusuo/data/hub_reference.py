"""How a model on a hub is named, and the folder of the cache where it lies once pulled.

    owner/name             its main branch                     models/owner--name
    owner/name@revision    a branch, tag or commit             models/owner--name@revision
    an address of the hub  the same, or one .gguf of it        models/owner--name--FILE
    any other address      of one .gguf                        models/HOST--FILE-HASH

The hub is `$HF_ENDPOINT`, by default https://huggingface.co, whose own addresses go there too.
"""

from __future__ import annotations

import hashlib
import os
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qiusuo.data.cache import cache_folder
from qiusuo.data.catalogue import catalogue
from qiusuo.data.download import show_url
from qiusuo.data.errors import DataError

MAIN = "main"
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
# The hub's own rule: no part starts or ends with `-` or `.`, and none holds `--` or `..`.
NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_]([\w.-]{0,94}\w)?", re.ASCII)
REVISION = re.compile(r"(?!.*(\.\.|//))[A-Za-z0-9_][\w./+-]{0,200}", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")
FORMS = (
    "owner/name, owner/name@revision, an address like https://huggingface.co/owner/name, or that "
    "of one .gguf file"
)


@dataclass(frozen=True)
class Reference:
    """A model elsewhere: a repository of the hub, one file of it, or (no `repository`) a `url`.

    `sha256` is what the reference itself says of the file, or empty.
    """

    repository: str = ""
    revision: str = MAIN
    file: str = ""
    url: str = ""
    sha256: str = ""

    @property
    def folder_name(self) -> str:
        """The name of its folder in the cache: different references, different names."""
        stem = str(PurePosixPath(self.file).with_suffix("")) if self.file else ""
        if self.url:
            parts = urllib.parse.urlsplit(self.url)
            host = parts.netloc.rpartition("@")[2].replace(":", "_")
            name = f"{host}--{stem}-{_mark(f'{parts.path}?{parts.query}')}"
        else:
            name = self.repository.replace("/", "--")
            if self.revision != MAIN:
                # `--` is what stands before a file.
                name += "@" + self.revision.replace("/", "%2F").replace("--", "-%2D")
            if self.file:
                name += "--" + stem.replace("/", "%2F")
        return name if len(name.encode()) <= 150 else f"{name[:40]}-{_mark(name)}"


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def endpoint() -> str:
    """The hub that is asked."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def parse_reference(reference: str) -> Reference:
    """What a reference names; `DataError` with the forms there are. Nothing is asked of anyone."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", reference):
        return _parse_address(reference)
    repository, at, revision = reference.partition("@")
    return _repository(reference, repository.split("/"), revision if at else MAIN)


def find_model_folder(name: str, cache: Path | None = None) -> Path | None:
    """The folder of a pulled model, by its catalogue name or by what it was pulled as; or None."""
    try:
        folder = model_folder(name, cache)
    except DataError:
        return None
    return folder if folder.is_dir() else None


def model_folder(name: str, cache: Path | None = None) -> Path:
    """Where a model's folder is, or will be; `DataError` for what names no model."""
    entry = catalogue().get(name)
    if entry is None:
        folder_name = parse_reference(name).folder_name
    elif entry.kind == "model":
        folder_name = name
    else:
        raise DataError(f"{name!r} is a {entry.kind}, not a model")
    return (cache or cache_folder()) / "models" / folder_name


def _parse_address(address: str) -> Reference:
    if not address.isprintable() or " " in address:
        raise DataError(f"{address!r} holds characters that no address has: write them as %20 etc.")
    try:
        parts = urllib.parse.urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise DataError(f"{address!r} is no address: {error}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise DataError(f"{address!r} is no http(s) address: expected {FORMS}")
    hub = urllib.parse.urlsplit(endpoint())
    sha256 = _promised(address, parts.fragment)
    path = urllib.parse.unquote(parts.path)
    if parts.netloc == hub.netloc and parts.path.startswith(f"{hub.path}/"):
        return _hub_address(address, parts.path.removeprefix(hub.path), sha256)
    if host in HOSTS:
        return _hub_address(address, parts.path, sha256)
    name = check_file_name(path.rsplit("/", 1)[-1], show_url(address))
    if not name.lower().endswith(".gguf"):
        raise DataError(f"{show_url(address)} is not that of a .gguf file: expected {FORMS}")
    return Reference(file=name, url=parts._replace(fragment="").geturl(), sha256=sha256)


def _hub_address(address: str, path: str, sha256: str) -> Reference:
    words = [urllib.parse.unquote(word) for word in path.strip("/").split("/")]
    if words[0] in ("datasets", "spaces", "api", "collections", "papers"):
        raise DataError(f"{address} is not that of a model: expected {FORMS}")
    match words[2:]:
        case []:
            return _repository(address, words[:2], MAIN)
        case ["tree", revision]:
            return _repository(address, words[:2], revision)
        case ["resolve" | "blob", revision, *rest] if rest and rest[-1].lower().endswith(".gguf"):
            for word in rest:
                check_file_name(word, address)
            found = _repository(address, words[:2], revision)
            return Reference(found.repository, found.revision, "/".join(rest), sha256=sha256)
    raise DataError(f"{address} names neither a model nor a .gguf file of one: expected {FORMS}")


def _repository(reference: str, names: list[str], revision: str) -> Reference:
    if len(names) != 2 or not all(map(NAME.fullmatch, names)):
        raise DataError(f"{reference!r} does not name a model: expected {FORMS}")
    if not REVISION.fullmatch(revision):
        raise DataError(f"{reference!r}: {revision!r} cannot be a branch, tag or commit")
    return Reference("/".join(names), revision)


def _promised(address: str, fragment: str) -> str:
    if not fragment:
        return ""
    kind, _, value = fragment.partition("=")
    if kind != "sha256" or not SHA256.fullmatch(value.lower()):
        raise DataError(
            f"{show_url(address)}: expected nothing after `#` but sha256=, and 64 hex digits"
        )
    return value.lower()


def check_file_name(name: str, source: str) -> str:
    """The name of one file as a stranger gives it; `DataError` for one that leads elsewhere."""
    if (
        not name
        or name.startswith(".")
        or not name.isprintable()
        or any(character in name for character in '/\\:*?"<>|')
        or len(name.encode()) > 200
    ):
        raise DataError(f"{source} names a file {name!r}, which is not a safe name: not fetched")
    return name
