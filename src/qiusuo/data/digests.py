"""What proves a file: a checksum written as `KIND:VALUE`.

`sha256:` is that of the content. `git-sha1:` is git's name of a blob, the SHA-1 of `blob SIZE`, a
zero byte and the content: all that the hub says about small files. `etag:` proves nothing; it is
what a server calls this version of a file, and only the size is checked.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from qiusuo.data.errors import DataError, unknown

CHUNK = 1 << 20
KINDS = ("sha256", "git-sha1", "etag")


def check_digest(path: Path, size: int, digest: str) -> None:
    """`DataError`, saying what it is and should be, for a file of another size or checksum."""
    actual = path.stat().st_size
    kind, _, expected = digest.partition(":")
    if kind not in KINDS:
        raise unknown("kind of checksum", kind, KINDS)
    if kind == "etag":
        if actual != size:
            raise DataError(f"it has {actual} bytes or more, expected {size}")
        return
    found = _sha256(path) if kind == "sha256" else _git_sha1(path)
    if found != expected:
        raise DataError(f"{kind} {found}, expected {expected}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_sha1(path: Path) -> str:
    sha1 = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha1.update(chunk)
    return sha1.hexdigest()
