"""The safetensors format against the library that defines it, whole and damaged."""

import json
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.safetensors_format import (
    FILE_DTYPES,
    FileTensor,
    Outgoing,
    read_header,
    write_file,
)
from qiusuo.checkpoint.stored import chunks

KIND_OF = {dtype: kind for kind, dtype in FILE_DTYPES.items()}
SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def made(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bytes as numbers of any type: NaNs of every kind among them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    numbers = torch.randint(256, (count,), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        numbers %= 2
    return numbers.view(dtype).reshape(shape)


@st.composite
def tensor_dicts(draw) -> dict[str, torch.Tensor]:
    names = draw(st.lists(NAMES.filter(lambda n: n != "__metadata__"), unique=True, max_size=5))
    types = st.sampled_from(list(FILE_DTYPES.values()))
    return {name: made(draw(SHAPES), draw(types), seed) for seed, name in enumerate(names)}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """Through our reader; a scalar is one row of one number."""
    return {
        name: held.rows(0, held.shape[0] if held.shape else 1).reshape(held.shape)
        for name, held in read_header(path).items()
    }


def in_pieces(name: str, tensor: torch.Tensor, rows: int) -> Outgoing:
    def pieces():
        if tensor.ndim == 0:
            yield tensor
            return
        for start in range(0, len(tensor), rows):
            yield tensor[start : start + rows]

    return Outgoing(name, KIND_OF[tensor.dtype], tuple(tensor.shape), pieces)


# -- whole files ----------------------------------------------------------------------------------


@given(tensor_dicts(), st.integers(1, 4))
@settings(max_examples=60)
def test_the_library_reads_what_we_write(tmp_path_factory, tensors, rows):
    path = tmp_path_factory.mktemp("w") / "x.safetensors"
    told: list[int] = []
    write_file(path, [in_pieces(name, t, rows) for name, t in tensors.items()], told.append)
    assert sum(told) == sum(t.nbytes for t in tensors.values())
    held = load_file(path)
    assert held.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(held[name], tensor), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (int.from_bytes(path.read_bytes()[:8], "little") + 8) % 8 == 0


@given(tensor_dicts())
@settings(max_examples=60)
def test_we_read_what_the_library_writes(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("r") / "x.safetensors"
    save_file(tensors, path, metadata={"by": "the library", "雪": "x"})
    ours = read_all(path)
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(ours[name], tensor), name
        held = read_header(path)[name]
        assert (held.shape, held.kind) == (tuple(tensor.shape), KIND_OF[tensor.dtype])
        assert held.stored_bytes == tensor.nbytes
        assert name in held.place
        assert str(path) in held.place


@given(st.data())
@settings(max_examples=60)
def test_rows_in_pieces_are_the_whole(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("p") / "x.safetensors"
    shape = data.draw(st.tuples(st.integers(0, 30), SHAPES).map(lambda s: (s[0], *s[1][:2])))
    tensor = made(shape, data.draw(st.sampled_from(list(FILE_DTYPES.values()))), 3)
    save_file({"before": torch.arange(5), "x": tensor, "z": torch.arange(3)}, path)
    held = read_header(path)["x"]
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[0]), max_size=5)))
    edges = [0, *cuts, shape[0]]
    pieces = [held.rows(a, b) for a, b in pairwise(edges)]
    assert same_bits(torch.cat(pieces) if tensor.numel() else pieces[0].new_empty(shape), tensor)
    assert [len(piece) for piece in pieces] == [b - a for a, b in pairwise(edges)]


def test_chunks_are_bounded_and_complete(tmp_path, monkeypatch):
    monkeypatch.setattr("qiusuo.checkpoint.stored.CHUNK_BYTES", 4 * 7 * 10)
    tensor = torch.arange(7 * 33.0).reshape(33, 7)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    held = read_header(tmp_path / "x.safetensors")["x"]
    for multiple, step in ((1, 10), (4, 8), (64, 64)):
        parts = list(chunks(held, multiple))
        assert [start for start, _ in parts] == list(range(0, 33, step))
        assert torch.equal(torch.cat([rows for _, rows in parts]), tensor)


def test_a_reader_may_change_what_it_was_given(tmp_path):
    """Rows are a copy: nothing is mapped, the file stays as it is."""
    save_file({"x": torch.ones(4, 2)}, tmp_path / "x.safetensors")
    held = read_header(tmp_path / "x.safetensors")["x"]
    held.rows(0, 4).zero_()
    assert torch.equal(held.rows(0, 4), torch.ones(4, 2))


def test_file_that_shrinks_after_opening(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(100, 100)}, path)
    held = read_header(path)["x"]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)
    assert torch.equal(held.rows(0, 99), torch.ones(99, 100))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: x cannot be read to its end"):
        held.rows(0, 100)


# -- damage ---------------------------------------------------------------------------------------


def assemble(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, stop: int, shape: list[object] | None = None, kind: object = "F32") -> dict:
    return {"dtype": kind, "shape": [1] if shape is None else shape, "data_offsets": [start, stop]}


ONE = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
BAD: dict[str, tuple[object, bytes, str]] = {
    "not JSON": (b"\x80\x02pickle", b"", "cannot be read"),
    "not UTF-8": (b'{"\xff": 1}', b"", "cannot be read"),
    "a list": ([], b"", "cannot be read"),
    "a number": (3, b"", "cannot be read"),
    "deeply nested": (b"[" * 100_000, b"", "cannot be read"),
    "entry is null": ({"a": None}, b"", "cannot be read"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4), "dtype"),
    "three offsets": ({"a": entry(0, 4) | {"data_offsets": [0, 2, 4]}}, bytes(4), "cannot be read"),
    "same name twice": (b"{" + ONE + b"," + ONE + b"}", bytes(4), "a stands there twice"),
    "unknown type": ({"a": entry(0, 4, kind="F4")}, bytes(4), "a has type 'F4'"),
    "type is a list": ({"a": entry(0, 4, kind=["F32"])}, bytes(4), "cannot be read"),
    "negative size": ({"a": entry(0, 4, [-1, -1])}, bytes(4), "unknown here"),
    "fraction": ({"a": entry(0, 4, [1.0])}, bytes(4), "unknown here"),
    "true": ({"a": entry(0, 4, [True])}, bytes(4), "unknown here"),
    "negative offset": ({"a": entry(-4, 0)}, bytes(4), "unknown here"),
    "backwards": ({"a": entry(4, 0)}, bytes(4), r"needs 4 bytes, the header gives it -4"),
    "too few bytes": ({"a": entry(0, 4, [2])}, bytes(4), r"a of type F32 and shape \[2\] needs 8"),
    "out of the file": ({"a": entry(0, 8, [2])}, bytes(4), "is cut short: a ends at byte"),
    "far out of the file": ({"a": entry(0, 4 << 60, [1 << 60])}, bytes(4), "is cut short: a"),
    "beyond 64 bits": ({"a": entry(2**70, 2**70 + 4)}, bytes(4), "is cut short: a"),
    "overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 8)}, bytes(8), "b begins at byte"),
    "same place": ({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4), "b begins at byte"),
    "hole before": ({"a": entry(4, 8)}, bytes(8), "a begins at byte"),
    "hole between": ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), "b begins at byte"),
    "bytes after": ({"a": entry(0, 4)}, bytes(5), "its tensors end at"),
    "nothing but bytes": ({}, bytes(5), "its tensors end at"),
}


@pytest.mark.parametrize(("header", "data", "words"), BAD.values(), ids=BAD)
def test_damaged_headers_are_refused(header, data, words, tmp_path):
    path = assemble(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    if "twice" not in words:  # which the library takes, if both are the same
        with pytest.raises(SafetensorError):
            safe_open(path, framework="pt")


@pytest.mark.parametrize("length", [0, 1, 13, 15, 2**20, 2**40, 2**62, 2**63, 2**64 - 1])
def test_lies_about_the_length_of_the_header(length, tmp_path):
    path = assemble(tmp_path / "x.safetensors", b"{" + ONE + b"}", bytes(4), length)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"\0", bytes(7), bytes(8), b"\x02" + bytes(7) + b"{}"])
def test_tiny_files(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    if content.endswith(b"{}"):
        assert read_header(path) == {}
        return
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_header(path)


def test_sparse_file_with_a_long_header_costs_nothing(tmp_path):
    """A header longer than the library allows is refused by its length alone."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    with path.open("r+b") as file:
        file.truncate(100 << 30)
    with pytest.raises(CheckpointError, match="its header would be 100,000,001 bytes"):
        read_header(path)


TENSORS = {
    "model.norm.weight": torch.arange(6.0),
    "b": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "empty": torch.empty(0, 4),
    "雪": torch.tensor(7, dtype=torch.int16),
    "f8": torch.arange(10.0).to(torch.float8_e4m3fn),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "x.safetensors"
    save_file(TENSORS, path)
    return path.read_bytes()


@given(st.data())
@settings(max_examples=400)
def test_any_damage_is_refused_or_read_as_the_library_reads_it(tmp_path_factory, good, data):
    """Bytes turned over, put in, taken out, cut off: where we give numbers at all, the library
    either gives the same ones, or refuses and ours are the ones that were written."""
    content = bytearray(good)
    header = 8 + int.from_bytes(good[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        if not content:
            break
        place = data.draw(st.integers(0, min(header, len(content) - 1)))
        match data.draw(st.sampled_from(["flip", "digit", "insert", "remove", "cut"])):
            case "flip":
                content[place] = data.draw(st.integers(0, 255))
            case "digit":
                digits = [i for i in range(8, min(header, len(content))) if 48 <= content[i] < 58]
                if digits:
                    content[data.draw(st.sampled_from(digits))] = data.draw(st.integers(48, 57))
            case "insert":
                content[place:place] = data.draw(st.binary(min_size=1, max_size=8))
            case "remove":
                del content[place : place + data.draw(st.integers(1, 8))]
            case "cut":
                del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path_factory.mktemp("d") / "x.safetensors"
    path.write_bytes(content)
    try:
        ours = read_all(path)
    except CheckpointError:
        return
    assert sum(tensor.nbytes for tensor in ours.values()) <= len(content)
    try:
        theirs = load_file(path)
    except SafetensorError:
        theirs = TENSORS
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[name], theirs[name]) for name in ours)


@given(st.integers(0, 600))
@settings(max_examples=80)
def test_every_cut_is_refused(tmp_path_factory, good, length):
    path = tmp_path_factory.mktemp("c") / "x.safetensors"
    path.write_bytes(good[: min(length, len(good) - 1)])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is (damaged, )?cut short"):
        read_header(path)


# -- writing --------------------------------------------------------------------------------------


def test_pieces_that_break_their_promise_are_caught(tmp_path):
    """A writer's mistake must not become a file that reads wrongly."""
    wrong_type = Outgoing("x", "F32", (2,), lambda: [torch.zeros(2, dtype=torch.float16)])
    too_short = Outgoing("x", "F32", (2,), lambda: [torch.zeros(1)])
    for outgoing in (wrong_type, too_short):
        with pytest.raises(AssertionError, match="x"):
            write_file(tmp_path / "x.safetensors", [outgoing], lambda _: None)


def test_pieces_that_are_no_blocks_of_memory(tmp_path):
    """Transposed, strided and expanded pieces are written as what they show."""
    base = torch.arange(12.0).reshape(3, 4)
    views = {"t": base.T, "s": base[:, ::2], "e": base[:1].expand(3, 4)}
    outgoing = [Outgoing(n, "F32", tuple(v.shape), lambda v=v: [v]) for n, v in views.items()]
    write_file(tmp_path / "x.safetensors", outgoing, lambda _: None)
    held = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(held[name], view) for name, view in views.items())


def test_place_names_file_and_tensor():
    tensor = FileTensor(Path("f.safetensors"), "x", "BF16", (3, 2), 8)
    assert tensor.place == "f.safetensors: x"
    assert tensor.stored_bytes == 12
