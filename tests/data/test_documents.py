"""Reading the user's files, and what is said about those that cannot be read."""

from __future__ import annotations

import gzip
import json
import lzma

import pytest

from qiusuo.data.documents import read_documents
from qiusuo.data.errors import DataError


def lines(*records: object) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def test_a_text_file_is_one_document_byte_for_byte(tmp_path) -> None:
    text = "a\r\nb\n\n中\t"
    for name, pack in (("a.txt", bytes), ("a.txt.gz", gzip.compress), ("a.TXT.XZ", lzma.compress)):
        (tmp_path / name).write_bytes(pack(text.encode()))
        assert list(read_documents(tmp_path / name)) == [text]


def test_byte_order_mark_is_dropped(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhi")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines({"text": "there"}))
    assert list(read_documents(tmp_path)) == ["hi", "there"]


def test_json_lines(tmp_path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(
        lines({"text": "one", "x": 1}) + b"\n" + lines({"text": "二\n"}, {"text": " "})
    )
    assert list(read_documents(file)) == ["one", "二\n"]
    file.write_bytes(lines({"body": "b"}))
    assert list(read_documents(file, field="body")) == ["b"]


def test_a_folder_is_read_in_order_of_paths(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden/d.txt", "notes.md"):
        (tmp_path / name).write_text(name)
    assert list(read_documents(tmp_path)) == ["a.txt", "b.txt", "sub/c.txt"]


def test_parquet(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    texts = [f"row {i} 中" for i in range(100)]
    table = pyarrow.table({"id": list(range(100)), "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    assert list(read_documents(tmp_path)) == texts
    with pytest.raises(DataError, match="unknown column 'texts': did you mean 'text'"):
        list(read_documents(tmp_path, field="texts"))
    with pytest.raises(DataError, match="row 0: column 'id' must be text, not int"):
        list(read_documents(tmp_path, field="id"))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read as parquet"):
        list(read_documents(tmp_path / "b.parquet"))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (lines({"text": "a"}) + b"{nope\n", r"a\.jsonl line 2 is not valid JSON"),
        (lines({"text": "a"}, {"txt": "b"}), r"line 2: unknown field 'text': did you mean 'txt'"),
        (lines(["a"]), "line 1 must be a JSON object, not list"),
        (lines({"text": 3}), "line 1: field 'text' must be text, not int"),
        (lines({"text": "a"}) + b"\xff\n", r"a\.jsonl is not UTF-8: byte 0xff at offset 14"),
        (b'{"text": "\\ud800"}\n', "line 1: field 'text' has half a surrogate pair"),
        (lines({"text": ""}), "every document in it is empty"),
        (b"", "every document in it is empty"),
    ],
)
def test_bad_json_lines(tmp_path, content: bytes, match: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=match):
        list(read_documents(tmp_path / "a.jsonl"))


def test_bad_files(tmp_path) -> None:
    (tmp_path / "gb.txt").write_bytes("ab中文".encode("gb18030"))
    with pytest.raises(DataError, match=r"gb\.txt is not UTF-8: byte 0xd6 at offset 2; .*iconv"):
        list(read_documents(tmp_path / "gb.txt"))
    for name, pack in (("a.txt.gz", gzip.compress), ("b.txt.xz", lzma.compress)):
        (tmp_path / name).write_bytes(pack(b"hello" * 100)[:-9])
        with pytest.raises(DataError, match=f"{name} is damaged"):
            list(read_documents(tmp_path / name))
        (tmp_path / name).write_bytes(b"not packed")
        with pytest.raises(DataError, match=f"{name} is damaged"):
            list(read_documents(tmp_path / name))
    # What does not exist is said at once, before anything is read.
    with pytest.raises(DataError, match=r"did you mean .*gb\.txt"):
        read_documents(tmp_path / "bg.txt")
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(DataError, match=r"expected a file ending in \.txt"):
        read_documents(tmp_path / "a.docx")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text in"):
        read_documents(tmp_path / "empty")
