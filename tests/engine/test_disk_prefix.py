"""Beginnings on disk: found by the next process, and by no one else; damage costs time only."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import qiusuo
from qiusuo.checkpoint.huggingface import save_huggingface
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.engine import disk_prefix
from qiusuo.engine.core import Engine
from qiusuo.engine.disk_prefix import model_mark
from qiusuo.engine.language_model import LanguageModel, Message
from qiusuo.engine.limits import Limits
from qiusuo.engine.paged_cache import PagedCache
from qiusuo.engine.request import Request, RequestError, Sequence
from qiusuo.engine.sampling import Sampling
from tests.engine.oracle import (
    POISON,
    HashModel,
    alone,
    assert_as_expected,
    check_pages,
    full_logits,
    run,
)
from tests.model.shapes import tiny_model

MODEL = HashModel()
PROMPT = tuple(i * i % 11 for i in range(22))
GREEDY = Sampling(max_tokens=8)
TEXT = "路漫漫其修远兮，吾将上下而求索。"


def engine_of(
    folder: Path, model: torch.nn.Module = MODEL, most: int = 1 << 20, pages: int = 12
) -> Engine:
    weight = model.model.embed_tokens.weight
    size = PagedCache.page_bytes(model.config, weight.dtype, 4)
    limits = Limits(
        cache_bytes=pages * size, page_tokens=4, prefix_folder=folder, prefix_disk_bytes=most
    )
    engine = Engine(model, limits)
    engine.keep_on_disk()
    return engine


def ask(engine: Engine, prompt: tuple[int, ...] = PROMPT, **options: str) -> Sequence:
    [sequence] = engine.submit(Request(prompt, GREEDY, **options))
    while not engine.idle:
        engine.step()
        check_pages(engine)
    if sequence.finish_reason != "error":
        assert_as_expected(sequence, alone(engine.model, sequence.request), exact=False)
    return sequence


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*") if path.is_file())


# -- one process after another --------------------------------------------------------------------


def test_the_next_engine_finds_what_was_full(tmp_path):
    assert ask(engine_of(tmp_path)).cached_tokens == 0
    assert len(files(tmp_path)) == (22 + 8 - 1) // 4  # prompt and answer, but for the last token
    engine = engine_of(tmp_path)
    assert ask(engine).cached_tokens == 20
    assert engine.statistics.disk_tokens == 20
    assert ask(engine, (*PROMPT[:13], 0, 1)).cached_tokens == 12
    assert engine.statistics.disk_tokens == 20  # from memory this time
    assert ask(engine_of(tmp_path), (5, *PROMPT)).cached_tokens == 0


@pytest.mark.parametrize("changes", [{}, {"num_nextn_predict_layers": 1}], ids=["plain", "mtp"])
def test_real_models_go_on_with_the_same_numbers(tmp_path, changes):
    """All layers come back, the MTP module's too: what it guesses from them is the same."""
    prompt = [j * j % 97 for j in range(70)]
    limits = Limits(cache_bytes=1 << 20, page_tokens=4, prefix_folder=tmp_path)
    model = tiny_model(**changes)
    caches, found = [], []
    for _ in range(2):
        lm = LanguageModel(model, None, limits)
        [answer] = lm.generate([prompt], max_tokens=10)
        logprobs = full_logits(model, [*prompt, *answer.token_ids]).log_softmax(-1)
        expected = [float(logprobs[69 + i, token]) for i, token in enumerate(answer.token_ids)]
        assert answer.token_ids == [int(row.argmax()) for row in logprobs[69:-1]]
        assert answer.logprobs == pytest.approx(expected, abs=1e-4)
        found.append(lm.engine.statistics.disk_tokens)
        pool, cache = lm.engine.pool, lm.engine.cache
        caches.append({k: cache.entries_LpsW[:, p].clone() for k, p in pool.page_of.items()})
    assert found == [0, 68]
    assert caches[0].keys() == caches[1].keys()
    shared = list(caches[0])[:17]
    assert all(torch.equal(caches[0][key], caches[1][key]) for key in shared)
    assert all(bool(caches[0][key].abs().sum((1, 2)).all()) for key in shared)  # no empty layer


ASK = """
import json, os, signal, sys
import qiusuo, torch
from qiusuo.engine.limits import Limits
torch.set_num_threads(1)
folder, prefixes, text, killed = sys.argv[1:]
limits = Limits(cache_bytes=1 << 20, page_tokens=4, prefix_folder=prefixes)
lm = qiusuo.load(folder, limits=limits)
message = lm.chat([{"role": "user", "content": text}], max_tokens=9)
print(json.dumps([message.token_ids, message.usage.cached_tokens]), flush=True)
if killed:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def process(folder: Path, prefixes: Path, killed: bool = False) -> subprocess.Popen[str]:
    arguments = [str(folder), str(prefixes), TEXT * 2, "yes" if killed else ""]
    return subprocess.Popen([sys.executable, "-c", ASK, *arguments], stdout=-1, text=True)


def told(asked: subprocess.Popen[str], code: int = 0) -> tuple[list[int], int]:
    out, _ = asked.communicate(timeout=120)
    assert asked.returncode == code
    answer, cached = json.loads(out)
    return answer, cached


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = Tokenizer.train_characters([TEXT])
    model = tiny_model(vocab_size=tokenizer.vocab_size, eos_token_id=None)
    return save_huggingface(model, tmp_path_factory.mktemp("m") / "m", tokenizer=tokenizer)


def chat(folder: Path, limits: Limits | None = None) -> Message:
    lm = qiusuo.load(folder, limits=limits)
    return lm.chat([{"role": "user", "content": TEXT * 2}], max_tokens=9)


def test_a_killed_process_leaves_its_beginnings_to_the_next(folder, tmp_path):
    plain = chat(folder)
    assert told(process(folder, tmp_path, killed=True), -signal.SIGKILL) == (plain.token_ids, 0)
    again = chat(folder, Limits(cache_bytes=1 << 20, page_tokens=4, prefix_folder=tmp_path))
    assert again.token_ids == plain.token_ids
    assert again.usage.cached_tokens == (plain.usage.prompt_tokens - 1) // 4 * 4


def test_two_processes_at_once(folder, tmp_path):
    together = [process(folder, tmp_path) for _ in range(2)]
    answers = [told(one)[0] for one in together]
    assert answers[0] == answers[1]
    assert all(len(path.name) == 64 for path in files(tmp_path))  # nothing half written is left
    limits = Limits(cache_bytes=1 << 20, page_tokens=4, prefix_folder=tmp_path)
    assert chat(folder, limits).usage.cached_tokens > 30


# -- who may find it ------------------------------------------------------------------------------


def test_namespaces_share_nothing(tmp_path):
    ask(engine_of(tmp_path), namespace="a")
    assert ask(engine_of(tmp_path), namespace="b").cached_tokens == 0
    assert ask(engine_of(tmp_path), namespace="a").cached_tokens == 20


def test_every_difference_is_another_mark():
    def mark(*changes, page_tokens=4, beside="", **config):
        model = tiny_model(**config)
        for change in changes:
            change(model.state_dict())
        return model_mark([model], page_tokens, beside)

    def one_bit(state):
        state["model.layers.1.mlp.gate.weight"].view(torch.int32)[3, 5] ^= 1

    def swapped_experts(state):
        stacked = max((t for t in state.values() if t.ndim == 3), key=torch.numel)
        stacked[[0, 1]] = stacked[[1, 0]].clone()

    def swapped_columns(state):
        table = state["model.embed_tokens.weight"]
        table[:, [0, 1]] = table[:, [1, 0]].clone()

    same = mark()
    assert same == mark()
    others = [
        mark(one_bit),
        mark(swapped_experts),
        mark(swapped_columns),
        mark(page_tokens=8),
        mark(beside="another tokenizer"),
        mark(rope_theta=5e4),
        model_mark([tiny_model().bfloat16()], 4, ""),
        model_mark([tiny_model(), tiny_model()], 4, ""),
    ]
    assert len({same, *others}) == len(others) + 1


def test_another_tokenizer_model_or_type_finds_nothing(folder, tmp_path):
    limits = Limits(cache_bytes=1 << 20, page_tokens=4, prefix_folder=tmp_path)

    def found(lm: LanguageModel) -> int:
        lm.generate([list(range(30))], max_tokens=4)
        return lm.engine.statistics.disk_tokens

    lm = qiusuo.load(folder, limits=limits)
    assert [found(lm), found(qiusuo.load(folder, limits=limits))] == [0, 28]
    assert found(LanguageModel(lm.model, None, limits)) == 0
    assert found(qiusuo.load(folder, dtype="bfloat16", limits=limits)) == 0
    small = LanguageModel(tiny_model(2, vocab_size=lm.config.vocab_size), None)
    assert found(LanguageModel(lm.model, lm.tokenizer, limits, draft=small)) == 0
    again = LanguageModel(lm.model, lm.tokenizer, limits, draft=small)
    assert found(again) == 28  # the draft model's entries too


def test_swapped_weights_neither_find_nor_leave_anything(tmp_path):
    model, state = tiny_model(), tiny_model(1).state_dict()
    prompt = tuple(range(22))
    ask(engine_of(tmp_path, model, pages=40), prompt)
    before = files(tmp_path)
    engine = engine_of(tmp_path, tiny_model(), pages=40)
    engine.swap_weights(state)
    assert ask(engine, prompt).cached_tokens == 0
    assert files(tmp_path) == before


def test_what_ended_in_nan_is_not_kept(tmp_path):
    engine = engine_of(tmp_path)
    assert ask(engine, (*PROMPT[:7], POISON)).finish_reason == "error"
    assert files(tmp_path) == []


# -- damage and limits ----------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5:6] = b"\0" if data[5:6] != b"\0" else b"\1"
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def another(path: Path) -> None:
    """A whole page under a wrong name."""
    other = next(one for one in files(path.parent.parent) if one != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [cut, lengthen, flip, empty, another])
def test_a_damaged_page_is_computed_anew(tmp_path, damage):
    ask(engine_of(tmp_path))
    before = {path: path.read_bytes() for path in files(tmp_path)}
    third = hashed(2)
    damage(next(path for path in before if path.name == third))
    assert ask(engine_of(tmp_path)).cached_tokens == 8
    assert {path: path.read_bytes() for path in files(tmp_path)} == before  # whole again


def hashed(place: int) -> str:
    engine = engine_of_memory()
    sequence = Sequence(Request(PROMPT, GREEDY), 0, 8, 0, list(PROMPT))
    return engine.scheduler._key(sequence, place).hex()


def engine_of_memory() -> Engine:
    return Engine(MODEL, Limits(cache_bytes=1 << 16, page_tokens=4))


def test_files_unused_for_longest_go_first_and_others_stay(tmp_path):
    """Of all models that share the folder; what is not ours is not touched."""
    mine = tmp_path / "notes.txt"
    mine.write_text("keep me")
    inside = tmp_path / ("0" * 64)
    inside.mkdir()
    (inside / "mine").write_bytes(b"x" * 10_000)
    ask(engine_of(tmp_path))
    size = files(tmp_path)[-1].stat().st_size
    pages = [path for path in files(tmp_path) if len(path.name) == 64]
    for age, path in enumerate(sorted(pages, key=lambda one: one.name != hashed(0))):
        os.utime(path, (1000 - age, 1000 - age))
    engine = engine_of(tmp_path, most=4 * size)
    assert sum(path.stat().st_size for path in files(tmp_path) if len(path.name) == 64) <= 4 * size
    ask(engine, (7,) * 20)
    kept = [path for path in files(tmp_path) if len(path.name) == 64]
    assert 1 <= len(kept) <= 4
    assert mine.read_text() == "keep me"
    assert (inside / "mine").stat().st_size == 10_000


def test_use_keeps_a_page_young(tmp_path):
    """Found in memory or on disk."""
    engine = engine_of(tmp_path)
    ask(engine)
    for use in (engine, engine_of(tmp_path)):
        for path in files(tmp_path):
            os.utime(path, (1000, 1000))
        ask(use)
        first = next(path for path in files(tmp_path) if path.name == hashed(0))
        assert first.stat().st_mtime > 1000


def test_what_another_process_removed_is_written_again(tmp_path):
    engine = engine_of(tmp_path)
    ask(engine)
    for path in files(tmp_path):
        path.unlink()
    ask(engine)
    assert len(files(tmp_path)) >= 5
    assert ask(engine_of(tmp_path)).cached_tokens == 20


def test_what_a_killed_writer_left_is_removed_in_the_end(tmp_path):
    ask(engine_of(tmp_path))
    left = files(tmp_path)[0].with_suffix(".123")
    fresh = files(tmp_path)[0].with_suffix(".124")
    for path in (left, fresh):
        path.write_bytes(b"half")
    os.utime(left, (1000, 1000))
    engine_of(tmp_path)
    assert not left.exists()
    assert fresh.exists()


def test_a_full_disk_is_left_alone_with_one_warning(tmp_path):
    """Linux has a file that is always full."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    engine = engine_of(tmp_path)
    [own] = tmp_path.iterdir()
    for place in (1, 3):
        (own / f"{hashed(place)}.{os.getpid()}").symlink_to("/dev/full")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ask(engine)
        ask(engine, (3,) * 20)
    assert [one.category for one in caught] == [RuntimeWarning]
    assert str(caught[0].message) == (
        f"{tmp_path}: beginnings are no longer kept on disk (No space left on device)"
    )
    assert [path.name for path in files(tmp_path) if len(path.name) == 64] == [hashed(0)]
    for path in own.glob("*.*"):
        path.unlink()
    assert ask(engine_of(tmp_path)).cached_tokens == 4


def test_a_folder_that_is_taken_away_disturbs_no_answer(tmp_path):
    engine = engine_of(tmp_path / "f")
    shutil.rmtree(tmp_path / "f")
    with pytest.warns(RuntimeWarning, match="no longer kept on disk"):
        ask(engine)


class Restarts(RuleBasedStateMachine):
    """Engines come and go on one small folder, which is damaged at random: no answer is wrong."""

    @initialize(most=st.integers(1, 9), pages=st.integers(8, 14))
    def begin(self, most, pages) -> None:
        self.place = tempfile.TemporaryDirectory()
        self.folder, self.pages = Path(self.place.name), pages
        self.most = most * 160
        self.engines = [engine_of(self.folder, most=self.most, pages=pages)]

    @rule()
    def restart(self) -> None:
        self.engines = [engine_of(self.folder, most=self.most, pages=self.pages)]

    @rule()
    def another_process(self) -> None:
        self.engines.append(engine_of(self.folder, most=self.most, pages=self.pages))

    @rule(
        data=st.data(),
        shared=st.integers(0, 22),
        own=st.lists(st.integers(0, 5), min_size=1, max_size=3),
        namespaces=st.lists(st.sampled_from(["", "b"]), min_size=1, max_size=3),
    )
    def ask(self, data, shared, own, namespaces) -> None:
        engine = data.draw(st.sampled_from(self.engines))
        prompt = (*PROMPT[:shared], *own)
        asked = [engine.submit(Request(prompt, GREEDY, namespace=n))[0] for n in namespaces]
        run(engine)
        for one in asked:
            assert_as_expected(one, alone(MODEL, one.request, capacity=engine.capacity))

    @rule(data=st.data(), damage=st.sampled_from([cut, flip, empty, Path.unlink]))
    def hurt(self, data, damage) -> None:
        if found := files(self.folder):
            damage(data.draw(st.sampled_from(found)))

    @invariant()
    def within_the_limit(self) -> None:
        if hasattr(self, "folder") and len(self.engines) == 1:
            assert sum(path.stat().st_size for path in files(self.folder)) <= self.most

    def teardown(self) -> None:
        if hasattr(self, "place"):
            self.place.cleanup()


TestRestarts = Restarts.TestCase
TestRestarts.settings = settings(max_examples=30, stateful_step_count=12)


def test_a_cache_too_small_for_what_is_on_disk(tmp_path):
    ask(engine_of(tmp_path))
    engine = engine_of(tmp_path, pages=8)
    sequences = [engine.submit(Request(PROMPT, GREEDY, namespace=n))[0] for n in ("", "b", "")]
    run(engine)
    for one in sequences:
        assert_as_expected(one, alone(MODEL, one.request))


def test_refused(tmp_path):
    with pytest.raises(RequestError, match="prefix_disk_bytes 10 is less than one page, "):
        engine_of(tmp_path, most=10)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="file cannot be written: Not a directory"):
        engine_of(tmp_path / "file")
    with pytest.raises(ValueError, match="prefix_folder keeps what prefix_cache finds"):
        Limits(prefix_folder=tmp_path, prefix_cache=False)
    with pytest.raises(ValueError, match="prefix_cache"):
        dataclasses.replace(Limits(prefix_folder=tmp_path), prefix_cache=False)
    assert disk_prefix.OURS.fullmatch("notes") is None
