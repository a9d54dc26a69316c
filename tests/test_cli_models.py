"""Models on the command line: pull, chat, export, inspect."""

from __future__ import annotations

import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import qiusuo
from qiusuo.checkpoint.huggingface import save_huggingface
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.cost import measure
from tests.commands import Ask, asker, refused
from tests.model.shapes import tiny_model
from tests.training import lives

TEXT = "路漫漫其修远兮，吾将上下而求索。 The road is long: abcdefghijklmnopqrstuvwxyz?\n"
DENSE: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QIUSUO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    return asker(monkeypatch, capsys)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe([TEXT], 300)


def made(tokenizer: Tokenizer | None, place: str = "m", **changes: Any) -> str:
    """A random model in a folder of that name."""
    size = 97 if tokenizer is None else tokenizer.vocab_size
    model = tiny_model(**({"vocab_size": size, "eos_token_id": None} | changes))
    save_huggingface(model, place, tokenizer=tokenizer)
    return place


def probe(place: str | Path) -> torch.Tensor:
    return qiusuo.load(place, dtype="float32").logits([1, 2, 3, 4])


# Pull


def test_pull_lists_what_there_is_and_what_kind(ask: Ask) -> None:
    answer = ask("pull")
    assert answer.code == 0
    assert re.search(r"^smollm2 +model +SmolLM2\S* .* \(Apache-2.0\)$", answer.out, re.MULTILINE)
    assert re.search(r"^tinyshakespeare +corpus +\S", answer.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", "unknown name 'nope'"),
        ("smolm2", "did you mean 'smollm2'?"),
        ("tang-poems", "always there and need not be pulled"),
        ("owner/name/more", "'owner/name/more' does not name a model"),
        ("ftp://host/model.gguf", "is no http(s) address"),
    ],
)
def test_pull_of_what_is_not_there(ask: Ask, name: str, message: str) -> None:
    """One line, without a bar and before anyone is asked."""
    answer = ask("pull", name)
    assert message in refused(answer)
    assert answer.out == ""
    assert not Path("home").exists()


# Export


def test_export_to_a_folder_and_back(ask: Ask, tokenizer: Tokenizer) -> None:
    source = made(tokenizer, num_nextn_predict_layers=1)
    code, said, _ = ask("export", source, "again")
    assert (code, said.startswith("m is in again: ")) == (0, True)
    assert said.endswith(" of F32\n")
    assert "is the checkpoint itself" in refused(ask("export", source, source))
    assert torch.equal(probe("again"), probe(source))
    assert Path("again/model.safetensors").read_bytes() == Path("m/model.safetensors").read_bytes()
    assert ask("export", source, "plain", "--no-mtp").code == 0
    assert qiusuo.load("plain").config.num_nextn_predict_layers == 0
    assert torch.equal(probe("plain"), probe(source))
    for dtype, kind, error in (("bfloat16", "BF16", 0.1), ("fp8", "F8_E4M3", 1.0)):
        assert ask("export", source, dtype, "--dtype", dtype).code == 0
        kinds = {tensor.kind for tensor in open_checkpoint(dtype).tensors.values()}
        assert kind in kinds
        assert 0 < (probe(dtype) - probe(source)).abs().max() < error
        assert qiusuo.load(dtype).tokenizer.fingerprint == tokenizer.fingerprint
    answer = ask("export", "fp8", "again", "--dtype", "float32")  # in the place of a model
    assert answer.code == 0
    assert torch.equal(probe("again"), probe("fp8"))


def test_export_to_a_file_and_back(ask: Ask, tokenizer: Tokenizer) -> None:
    source = made(tokenizer, **DENSE)
    code, said, _ = ask("export", source, "m.gguf", "--to", "gguf")
    assert (code, said.startswith("m is in m.gguf: ")) == (0, True)
    assert (probe("m.gguf") - probe(source)).abs().max() < 1e-4
    assert ask("export", "m.gguf", "back", "--dtype", "float32").code == 0
    assert torch.equal(probe("back"), probe("m.gguf"))
    assert ask("export", source, "q8.gguf", "--to", "gguf", "--dtype", "q8_0").code == 0
    kinds = {tensor.kind for tensor in open_checkpoint("q8.gguf").tensors.values()}
    assert "Q8_0" in kinds
    assert 0 < (probe("q8.gguf") - probe(source)).abs().max() < 0.5
    assert ask("export", "q8.gguf", "from-q8").code == 0
    assert next(iter(qiusuo.load("from-q8").model.parameters())).dtype == torch.bfloat16
    again = qiusuo.load("m.gguf").tokenizer
    assert again.encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "out", "--to", "onnx"], "format 'onnx' is not written; expected hf or gguf"),
        (["m", "out", "--dtype", "int3"], "dtype 'int3' is not written as hf; expected float32"),
        (["m", "out", "--dtype", "q8_0"], "dtype 'q8_0' is not written as hf"),
        (["m", "o.gguf", "--to", "gguf", "--dtype", "fp8"], "'fp8' is not written as gguf"),
        (
            ["m", "out.gguf", "--to", "hf"],
            "out.gguf: the format hf is written to a folder; for a file ask for",
        ),
        (["m", "out", "--to", "gguf"], "out: the format gguf is written to a file NAME.gguf"),
        (["m", "thesis"], "thesis holds no model but chapter.txt; saving would replace it all"),
        (["m", "thesis/chapter.txt"], "chapter.txt is a file; give a folder for the model"),
        (["m", "notes.gguf", "--to", "gguf"], "notes.gguf is there and is not a GGUF file"),
        (["none", "out"], "none is not there"),
    ],
)
def test_export_refuses(ask: Ask, words: list[str], message: str) -> None:
    made(None, "m")
    Path("thesis").mkdir()
    for file in ("thesis/chapter.txt", "notes.gguf"):
        Path(file).write_text("years of work")
    assert message in refused(ask("export", *words))
    assert Path("thesis/chapter.txt").read_text() == "years of work"
    assert Path("notes.gguf").read_text() == "years of work"
    left = {path.name for path in Path().iterdir()}
    assert left <= {"m", "thesis", "notes.gguf", "home"}


# Inspect


@pytest.mark.parametrize(
    ("changes", "to", "dtype", "stored"),
    [
        ({}, "hf", None, "Hugging Face, .* F32 tensors"),
        ({"num_nextn_predict_layers": 1}, "hf", "fp8", "Hugging Face, .* F8_E4M3"),
        (DENSE, "hf", "bfloat16", "Hugging Face, .* BF16 tensors"),
        (DENSE | {"model_type": "llama"}, "hf", "float16", "Hugging Face, .* F16 tensors"),
        (DENSE, "gguf", "q8_0", "GGUF, .* Q8_0"),
        (DENSE | {"model_type": "llama"}, "gguf", "bfloat16", "GGUF, .* BF16"),
    ],
)
def test_inspect_of_every_format(
    ask: Ask, tokenizer: Tokenizer, changes: dict[str, Any], to: str, dtype: str, stored: str
) -> None:
    place = "x.gguf" if to == "gguf" else "x"
    words = [] if dtype is None else ["--dtype", dtype]
    assert ask("export", made(tokenizer, **changes), place, "--to", to, *words).code == 0
    answer = ask("inspect", place)
    assert (answer.code, answer.err) == (0, "")
    family = changes.get("model_type", "deepseek_v3")
    assert re.search(rf"^Architecture +{family}, 3 layers", answer.out, re.MULTILINE)
    assert re.search(rf"^Stored +{stored}", answer.out, re.MULTILINE)
    cost = measure(qiusuo.load("m").config)
    assert re.search(rf"^Parameters +{cost.parameters:,} *$", answer.out, re.MULTILINE)
    assert ("MTP parameters" in answer.out) == ("num_nextn_predict_layers" in changes)


def test_inspect_of_a_pulled_name_and_of_a_folder_without_weights(ask: Ask) -> None:
    shutil.copytree(made(None), "home/models/smollm2")
    pulled = ask("inspect", "smollm2")
    *facts, _free_memory = pulled.out.splitlines()
    assert ask("inspect", "m").out.splitlines()[:-1] == facts
    assert "Stored" in pulled.out
    Path("m/model.safetensors").unlink()
    without = ask("inspect", "m")
    assert without.code == 0
    assert "Stored" not in without.out
    assert re.search(r"^Parameters +\d", without.out, re.MULTILINE)
    *facts, _free_memory = without.out.splitlines()
    assert ask("inspect", "m/config.json").out.splitlines()[:-1] == facts
    assert "holds neither model.safetensors nor" in refused(ask("chat", "m"))


# Chat


def talk(ask: Ask, monkeypatch: pytest.MonkeyPatch, typed: str, *words: str) -> Any:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return ask("chat", *words)


def expected(place: str, *questions: str, system: str | None = None, **settings: Any) -> list[str]:
    """The answers of a conversation, as the library gives them."""
    lm = qiusuo.load(place)
    turns: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for question in questions:
        turns.append({"role": "user", "content": question})
        answers.append(lm.chat(turns, **settings).content)
        turns.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_questions_on_the_command_line(ask: Ask, tokenizer: Tokenizer) -> None:
    made(tokenizer, max_position_embeddings=400)
    answers = expected("m", "road?", "long?", system="the", max_tokens=9)
    words = ("chat", "m", "--system", "the", "--max-tokens", "9", "-m", "road?")
    assert ask(*words) == (0, f"{answers[0]}\n", "")
    assert ask(*words, "-m", "long?") == (0, f"{answers[0]}\n{answers[1]}\n", "")
    draws = {"temperature": 2.0, "top_p": 0.9, "seed": 3, "max_tokens": 9}
    drawn = expected("m", "road?", **draws)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in draws.items()]
    assert ask("chat", "m", "-m", "road?", *options).out == f"{drawn[0]}\n"
    assert drawn[0] != answers[0]


def test_questions_from_a_pipe(
    ask: Ask, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tokenizer, max_position_embeddings=400)
    settings = {"max_tokens": 9}
    one, two = expected("m", "road?", "long?", **settings)
    [alone] = expected("m", "long?", **settings)
    [told] = expected("m", "long?", system="the road", **settings)
    assert len({one, two, alone, told}) == 4
    typed = {
        "road?\n\nlong?\n": [one, two],
        "road?\n/new\nlong?": [one, alone],
        "road?\n/undo\nlong?\n": [one, alone],
        "/undo\nlong?\n": [alone],
        "road?\n/system the road\nlong?\n": [one, told],
        "/system the road\n/system\nlong?\n": [alone],
        "road?\n/exit\nlong?\n": [one],
        "": [],
    }
    for lines, answers in typed.items():
        answer = talk(ask, monkeypatch, lines, "m", "--max-tokens", "9")
        assert answer == (0, "".join(f"{text}\n" for text in answers), ""), lines
    helped = talk(ask, monkeypatch, "/help\n/nwe [red]\n", "m").out
    assert helped.count("/undo         take back") == 2
    assert "/nwe is no command. There are:\n/new " in helped


def test_thoughts_are_marked_where_they_cannot_be_dimmed(ask: Ask, tokenizer: Tokenizer) -> None:
    made(tokenizer)
    lm = qiusuo.load("m")
    for seed in range(300):
        settings = {"temperature": 3.0, "seed": seed, "max_tokens": 24}
        message = lm.chat([{"role": "user", "content": "road?"}], thinking=True, **settings)
        if message.reasoning_content and message.content:
            break
    words = ("chat", "m", "-m", "road?", "--temperature", "3", "--max-tokens", "24")
    answer = ask(*words, "--seed", str(seed), "--thinking")
    thought, content = message.reasoning_content, message.content
    assert answer.out == f"<think>\n{thought}\n</think>\n\n{content}\n"


def test_a_conversation_that_grows_too_long_goes_on(
    ask: Ask, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tokenizer, max_position_embeddings=40)
    long = "road " * 60
    [first], [second] = expected("m", "a", max_tokens=4), expected("m", "b", max_tokens=4)
    lines = f"a\n{long}\n/new\nb\n"
    answer = talk(ask, monkeypatch, lines, "m", "--max-tokens", "4")
    assert answer.out == f"{first}\n{second}\n"
    assert re.fullmatch(
        r"qiusuo: the conversation has \d+ tokens and leaves no room for an answer: the context "
        r"holds 40; shorten it, or begin anew\n",
        answer.err,
    )
    assert answer.code == 1
    assert "leaves no room" in refused(ask("chat", "m", "-m", long))


def test_what_a_template_refuses(
    ask: Ask, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tokenizer)
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    )
    Path("m/chat_template.jinja").write_text(template + "{% endif %}{{ m.content }}{% endfor %}")
    [plain] = expected("m", "road", max_tokens=5)
    typed = "/system the\nroad\n/system\nroad\n"
    answer = talk(ask, monkeypatch, typed, "m", "--max-tokens", "5")
    assert answer.out == f"{plain}\n"
    assert answer.err == "qiusuo: the chat template refuses these messages: no system\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "none is not there: expected a model folder, a run, a .gguf file or one of"),
        (["smollm2"], "smollm2 is not here yet: run `qiusuo pull smollm2`"),
        (["base"], "base has no chat template: it is a base model, which continues texts; in Pyt"),
        (["bare"], "bare has no chat template"),
        (["m", "--dtype", "int3"], "dtype 'int3' is not one of float32, bfloat16, float16"),
        (["m", "--device", "warp"], "device 'warp' cannot be used"),
    ],
)
def test_chat_refuses(ask: Ask, tokenizer: Tokenizer, words: list[str], message: str) -> None:
    made(tokenizer)
    made(Tokenizer(tokenizer.backend, bos_token=tokenizer.bos_token), "base")
    made(None, "bare")
    assert message in refused(ask("chat", *words, "-m", "road?"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--top-p", "2", "top_p must be in (0, 1], not 2.0"),
        ("--top-p", "0", "top_p must be in (0, 1], not 0.0"),
        ("--temperature", "nan", "temperature must be 0 or a positive number, not nan"),
        ("--temperature", "-1", "temperature must be 0 or a positive number, not -1.0"),
        ("--seed", "-1", "seed must be in 0..2**64-1, not -1"),
        ("--max-tokens", "0", "max_tokens must be at least 1, not 0"),
    ],
)
def test_settings_are_checked_before_a_model_is_loaded(
    ask: Ask, option: str, value: str, message: str
) -> None:
    answer = ask("chat", "none", option, value)
    assert answer.code == 2
    assert message in answer.err
    assert "Traceback" not in answer.err


# Real processes


@pytest.fixture
def endless(tokenizer: Tokenizer) -> str:
    """A model whose answer does not end while a test lasts."""
    plain = Tokenizer(tokenizer.backend, chat_template="{{ messages[-1].content }}")
    return made(plain, max_position_embeddings=1 << 20)


ENDLESS = ["--max-tokens", str(1 << 19), "--temperature", "1"]


def test_ctrl_c_from_a_pipe_ends_the_program(endless: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        lives.command("chat", endless, *ENDLESS),
        env=lives.environment(tmp_path / "home"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"road\nlong\n")
        process.stdin.flush()
        first = process.stdout.read(1)
        assert first, process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_person_at_a_terminal(endless: str, tmp_path: Path) -> None:
    """The prompt, an answer that is stopped, what is said then, and the way out."""
    import pty

    own, theirs = pty.openpty()
    process = subprocess.Popen(
        lives.command("chat", endless, *ENDLESS),
        env=lives.environment(tmp_path / "home") | {"TERM": "xterm", "COLUMNS": "100"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)

    def until(text: str) -> str:
        seen = b""
        while text.encode() not in seen:
            assert select.select([own], [], [], 60)[0], f"no {text!r} after {seen!r}"
            seen += os.read(own, 4096)
        return seen.decode(errors="replace")

    def type_in(text: str) -> None:
        os.write(own, text.encode())

    try:
        first = until(">>> ")
        assert "/help lists the commands; Ctrl-D leaves." in first
        type_in("road\n")
        until("road\r\n")
        os.read(own, 1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        stopped = until(">>> ")
        assert "(stopped; question and answer are forgotten)" in stopped
        type_in("/undo\n")
        assert "(there is nothing to take back)" in until(">>> ")
        type_in("\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(own)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1_000_000},
        {"n_routed_experts": 10**8},
        {"num_nextn_predict_layers": 10**6},
        {"vocab_size": 10**30},
        {"intermediate_size": 2**31 - 1, "hidden_size": 2**31 - 1},
    ],
    ids=str,
)
def test_inspect_a_config_beyond_any_model(ask: Ask, changes: dict[str, int]) -> None:
    raw = tiny_model().config.to_hf() | changes
    Path("config.json").write_text(json.dumps(raw), encoding="utf-8")
    message = refused(ask("inspect", "config.json"))
    assert re.search(r"beyond what any model has|no model can have", message)
