"""Records of a file with one JSON object a line (.jsonl, also .gz and .xz), each with its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qiusuo.data.documents import BROKEN_ARCHIVE, OPENERS, decode_utf8
from qiusuo.data.errors import DataError, unknown

SUFFIXES = tuple(f".jsonl{end}" for end in OPENERS)


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object with its place, "talk.jsonl line 3"; empty lines are passed over.

    `DataError` for a file that is not there, is damaged, or holds a line that is no JSON object."""
    path = Path(path)
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"cannot read {path}: expected a file ending in {', '.join(SUFFIXES)}")
    opener = OPENERS[path.suffix.lower() if path.suffix.lower() in OPENERS else ""]
    offset = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                text = decode_utf8(line, path, offset).removeprefix("\ufeff" if number == 1 else "")
                offset += len(line)
                if text.strip():
                    place = f"{path} line {number}"
                    yield place, _record(text, place)
    except BROKEN_ARCHIVE as error:
        raise DataError(f"{path} is damaged and cannot be unpacked: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def check_fields(record: dict[str, Any], needed: tuple[str, ...], place: str) -> None:
    """`DataError`, with the nearest name that is there, for a record that lacks one."""
    for field in needed:
        if record.get(field) is None:
            raise DataError(f"{place}: {unknown('field', field, record)}")


def _record(text: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place} has half a surrogate pair: write the whole character") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{place} must be a JSON object, not {type(record).__name__}")
    return record
