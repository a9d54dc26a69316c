"""The user's own text, one document at a time.

    notes.txt             the whole file is one document        (also .txt.gz, .txt.xz)
    pages.jsonl           one JSON object a line, field "text"  (also .jsonl.gz, .jsonl.xz)
    table.parquet         one row a document, column "text"
    a folder              all of these in it, sorted by path, at any depth

Line ends and spaces stay as they are; documents that are empty or only white space are left out,
since they hold nothing to learn. Text is UTF-8 (a byte-order mark at the start is dropped).
"""

from __future__ import annotations

import difflib
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from qiusuo.data.errors import DataError, unknown

OPENERS: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".xz": lzma.open}
SUFFIXES = (*(f"{kind}{end}" for kind in (".txt", ".jsonl") for end in OPENERS), ".parquet")
BROKEN_ARCHIVE = (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError)


def read_documents(path: str | Path, *, field: str = "text") -> Iterator[str]:
    """Every document under `path`, in a fixed order; `field` is the key or column of the text.

    `DataError` at once if there is nothing to read, and while reading for a bad line (by number),
    a byte that is not UTF-8 (by offset), or a corpus without any text.
    """
    files = document_files(path)
    return _with_text(path, (text for file in files for text in _read_file(file, field)))


def document_files(path: str | Path) -> list[Path]:
    """The files that `read_documents` reads, in its order."""
    path = Path(path)
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file()
            and _suffix(file) is not None
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not files:
            raise DataError(f"no text in {path}: expected files ending in {', '.join(SUFFIXES)}")
        return files
    if not path.exists():
        raise DataError(f"no file or folder {path}{_near(path)}")
    if _suffix(path) is None:
        raise DataError(
            f"cannot read {path}: expected a file ending in {', '.join(SUFFIXES)}, or a folder"
        )
    return [path]


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    names = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f": did you mean {path.parent / names[0]}?" if names else ""


def _with_text(path: str | Path, documents: Iterator[str]) -> Iterator[str]:
    found = False
    for text in documents:
        if text and not text.isspace():
            found = True
            yield text
    if not found:
        raise DataError(f"no text in {path}: every document in it is empty")


def _read_file(path: Path, field: str) -> Iterator[str]:
    suffix = _suffix(path)
    if suffix == ".parquet":
        yield from _read_parquet(path, field)
        return
    opener = OPENERS[path.suffix.lower() if path.suffix.lower() in OPENERS else ""]
    try:
        with opener(path, "rb") as file:
            if suffix is not None and suffix.startswith(".jsonl"):
                yield from _read_lines(path, file, field)
            else:
                yield decode_utf8(file.read(), path).removeprefix("\ufeff")
    except BROKEN_ARCHIVE as error:
        raise DataError(f"{path} is damaged and cannot be unpacked: {error}") from error


def decode_utf8(content: bytes, path: Path | str, offset: int = 0) -> str:
    """UTF-8 bytes as text; `DataError` with the place of the first bad byte in the file."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset "
            f"{offset + error.start}; convert it first, for example with "
            f"iconv -f GB18030 -t UTF-8"
        ) from error


def _read_lines(path: Path, file: IO[bytes], field: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(file, start=1):
        text = decode_utf8(line, path, offset).removeprefix("\ufeff" if number == 1 else "")
        offset += len(line)
        if text.strip():
            yield _field(text, field, f"{path} line {number}")


def _field(line: str, field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{place} must be a JSON object, not {type(record).__name__}")
    if field not in record:
        raise DataError(f"{place}: {unknown('field', field, record)}")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{place}: field {field!r} must be text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field {field!r} has half a surrogate pair at character {error.start}"
        ) from error
    return text


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install 'qiusuo[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if field not in table.schema_arrow.names:
                raise DataError(f"{path}: {unknown('column', field, table.schema_arrow.names)}")
            row = 0
            for batch in table.iter_batches(columns=[field]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise DataError(
                            f"{path} row {row}: column {field!r} must be text, "
                            f"not {type(text).__name__}"
                        )
                    yield text
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error
