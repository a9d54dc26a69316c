"""The doctor: what is whole is called whole; every fault is found, named, and has a remedy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qiusuo
from qiusuo.checkpoint.export import export
from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.huggingface import save_huggingface
from qiusuo.checkpoint.load import checkpoint_of
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.doctor import PROBES, Examination, Finding, Mark, examine
from qiusuo.model.transformer import Transformer
from tests.commands import Ask, asker, refused
from tests.model.shapes import tiny_model

DENSE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
HEAD, FIRST = "lm_head.weight", "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe([*PROBES] * 3, 340)


def learned(tokenizer: Tokenizer, **changes: Any) -> Transformer:
    """A random model with a head that is a little better than chance on the probe."""
    model = tiny_model(
        vocab_size=tokenizer.vocab_size, **({"eos_token_id": tokenizer.eos_id} | changes)
    )
    ids = [*tokenizer.text_start, *tokenizer.encode(" ".join(PROBES[:2]))]
    with torch.no_grad():
        hidden_TD = model(torch.tensor([ids])).x_BTD[0, :-1]
        head_WD = torch.randn(model.lm_head.weight.shape) * 1e-3
        head_WD[ids[1:]] += hidden_TD * 0.02
        model.lm_head.weight.copy_(head_WD)
    return model


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return save_huggingface(learned(tokenizer), tmp_path / "m", tokenizer=tokenizer)


def diagnosis(place: Path) -> tuple[Examination, list[Finding], str]:
    examination = Examination(str(place))
    found = list(examine(examination))
    assert found == examination.findings
    return examination, found, examination.verdict()


def marks(found: list[Finding], mark: Mark) -> list[str]:
    return [f"{finding.subject}: {finding.text}" for finding in found if finding.mark is mark]


def only_fault(place: Path) -> str:
    """The one fault there is; the verdict counts it and says what to do."""
    _, found, verdict = diagnosis(place)
    (fault,) = marks(found, Mark.FAULT)
    subject = fault.partition(":")[0]
    assert verdict == (
        f"Not usable as it is, 1 fault above. Mend the first ({subject}), then look again: "
        f"qiusuo doctor {place}"
    )
    return fault


def only_remark(place: Path) -> str:
    _, found, verdict = diagnosis(place)
    assert marks(found, Mark.FAULT) == []
    (remark,) = marks(found, Mark.REMARK)
    assert verdict.startswith("Usable, 1 remark above. ")
    return remark


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def change_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(content), encoding="utf-8")


# Healthy


def test_a_whole_model_is_healthy(folder: Path) -> None:
    _, found, verdict = diagnosis(folder)
    assert [finding.mark for finding in found] == [Mark.GOOD] * 7
    assert verdict == f"Healthy. Talk with it: qiusuo chat {folder}"
    parameters = sum(p.numel() for p in qiusuo.load(folder).model.state_dict().values())
    assert f"Hugging Face at {folder}: deepseek_v3, 3 layers, {parameters:,} parameters" in (
        found[0].text
    )
    last = r"48 tokens, all finite; \d\.\d\d nats a token of text \(chance: 5\.83\)"
    assert re.fullmatch(last, found[-1].text)


@pytest.mark.parametrize(
    ("changes", "format", "dtype"),
    [
        ({"num_nextn_predict_layers": 2}, "hf", None),
        ({"num_nextn_predict_layers": 1}, "hf", "fp8"),
        ({}, "hf", "bfloat16"),
        (DENSE, "hf", None),
        (DENSE | {"tie_word_embeddings": False}, "gguf", "bfloat16"),
        (DENSE, "gguf", "q8_0"),
    ],
    ids=["mtp", "fp8", "bf16", "llama", "gguf", "q8_0"],
)
def test_every_format_and_family_is_healthy(
    tokenizer: Tokenizer, tmp_path: Path, changes: dict[str, Any], format: str, dtype: str | None
) -> None:
    place = tmp_path / ("m.gguf" if format == "gguf" else "m")
    export(checkpoint_of(learned(tokenizer, **changes), tokenizer), place, format, dtype)
    _, found, verdict = diagnosis(place)
    assert [marks(found, mark) for mark in (Mark.FAULT, Mark.REMARK)] == [[], []]
    assert verdict == f"Healthy. Talk with it: qiusuo chat {place}"
    kinds = {"fp8": "F8_E4M3", "q8_0": "Q8_0", "bfloat16": "BF16", None: "F32"}
    assert kinds[dtype] in found[1].text
    assert ("more in MTP" in found[0].text) == ("num_nextn_predict_layers" in changes)


def test_without_a_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "Tokenizer: none (no tokenizer.json)" in only_remark(folder)
    _, found, verdict = diagnosis(folder)
    assert "nats a token of arbitrary ids" in found[-1].text
    assert f"In Python: qiusuo.load({str(folder)!r}).generate([token_ids])" in verdict


def test_a_base_model_is_not_sent_to_chat(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    del content["chat_template"]
    config.write_text(json.dumps(content), encoding="utf-8")
    assert only_remark(folder) == "Chat template: none: a base model, which continues texts"
    assert diagnosis(folder)[2].endswith(
        f"In Python: qiusuo.load({str(folder)!r}).generate([text])"
    )


# Faults


def test_one_nan_is_named(folder: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[FIRST][3, 5] = float("nan")

    change_weights(folder, poison)
    fault = only_fault(folder)
    assert FIRST in fault
    assert "holds NaN or infinity" in fault
    assert "fetch it again" in fault


@pytest.mark.parametrize("number", [float("inf"), float("-inf")])
def test_infinity_is_a_fault(folder: Path, number: float) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][-1] = number

    change_weights(folder, poison)
    assert "model.norm.weight" in only_fault(folder)


def test_overflow_on_the_way_is_a_fault(folder: Path) -> None:
    """Every weight is finite, and the answer is not."""

    def swell(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD].fill_(3e38)

    change_weights(folder, swell)
    assert "Forward pass: NaN or infinity after 48 tokens" in only_fault(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop(FIRST))
    fault = only_fault(folder)
    assert fault.startswith("Tensors: ")
    assert f"missing: {FIRST}" in fault


def test_a_wrong_vocabulary(folder: Path) -> None:
    change_json(folder / "config.json", vocab_size=339)
    fault = only_fault(folder)
    assert fault.startswith("Tensors: ")
    assert "has shape (340, 48), expected (339, 48)" in fault


def test_an_end_outside_the_vocabulary(folder: Path) -> None:
    change_json(folder / "config.json", eos_token_id=[1, 340])
    _, found, _ = diagnosis(folder)
    assert marks(found, Mark.FAULT) == [
        "Config: eos_token_id 340 is outside the 340 tokens of vocab_size"
    ]


def test_a_tokenizer_larger_than_the_embedding(folder: Path) -> None:
    Tokenizer.train_bpe([*PROBES] * 3, 350).save(folder)
    fault = only_fault(folder)
    assert "the tokenizer has 350 tokens, the embedding only 340 rows" in fault
    assert fault.startswith("Tokenizer: ")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "not valid Jinja"),
        ("{{ raise_exception('only systems') }}", "refuses these messages: only systems"),
        ("{{ nothing.at.all }}", "refuses these messages"),
    ],
)
def test_a_broken_template(folder: Path, template: str, message: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    fault = only_fault(folder)
    assert fault.startswith("Chat template: ")
    assert message in fault


def test_a_truncated_file(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 100)
    fault = only_fault(folder)
    assert fault.startswith("Files and config: ")
    assert "model.safetensors" in fault
    gguf = tmp_path / "m.gguf"
    export(checkpoint_of(learned(tokenizer, **DENSE), tokenizer), gguf, "gguf")
    with gguf.open("r+b") as opened:
        opened.truncate(gguf.stat().st_size - 100)
    assert "m.gguf" in only_fault(gguf)


def test_another_family(folder: Path) -> None:
    change_json(folder / "config.json", model_type="gpt2")
    assert "model_type 'gpt2' is not one of" in only_fault(folder)


def test_several_faults_are_counted(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for %}")
    change_weights(folder, lambda tensors: tensors[HEAD].fill_(float("nan")))
    _, found, verdict = diagnosis(folder)
    assert [finding.subject for finding in found if finding.mark is Mark.FAULT] == [
        "Numbers",
        "Chat template",
    ]
    assert verdict.startswith("Not usable as it is, 2 faults above. Mend the first (Numbers)")


# Remarks


def test_a_matrix_of_zeros(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors[FIRST].zero_())
    assert only_remark(folder) == f"Numbers: all zeros: {FIRST}"


def test_ends_that_are_not_the_same(folder: Path, tokenizer: Tokenizer) -> None:
    def end_with(ends: list[int] | None) -> None:
        for name in ("config.json", "generation_config.json"):
            change_json(folder / name, eos_token_id=ends)

    own = f"{tokenizer.eos_id} ({tokenizer.eos_token})"
    end_with([5, 6])
    assert f"Tokenizer: its end token is {own}, the config's are 5, 6" in only_remark(folder)
    end_with(None)
    assert f"its end token is {own}, the config has none" in only_remark(folder)
    assert qiusuo.load(folder).stop_ids == {tokenizer.eos_id}
    change_json(folder / "tokenizer_config.json", eos_token=None)
    remark = only_remark(folder)
    assert "End: neither the config (eos_token_id) nor a tokenizer names an end" in remark
    assert qiusuo.load(folder).stop_ids == frozenset()


def test_a_tokenizer_that_changes_text(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    characters = Tokenizer.train_characters([PROBES[0]])
    assert characters.vocab_size < tokenizer.vocab_size
    characters.save(folder)
    _, found, _ = diagnosis(folder)
    assert marks(found, Mark.FAULT) == []
    lacking = [remark for remark in marks(found, Mark.REMARK) if "vocabulary lacks" in remark]
    assert len(lacking) == 1
    assert "rows of padding" in found[3].text


def test_a_model_that_learned_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id)
    save_huggingface(model, tmp_path / "m", tokenizer=tokenizer)
    assert "no better than chance on everyday text" in only_remark(tmp_path / "m")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_too_large_for_the_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Is no fault of the model's, whatever its numbers are stored as."""
    place = qiusuo.load(folder).save(tmp_path / dtype, dtype=dtype)
    count = sum(p.numel() for p in qiusuo.load(folder).model.state_dict().values())
    needed = count * (4 if dtype == "float32" else 2)
    for module in ("qiusuo.doctor", "qiusuo.checkpoint.load"):
        monkeypatch.setattr(f"{module}.available_memory", lambda: needed - 1)
    _, found, verdict = diagnosis(place)
    assert marks(found, Mark.FAULT) == []
    assert found[-1].mark is Mark.REMARK
    assert "Forward pass: not run: it needs" in marks(found, Mark.REMARK)[0]
    assert verdict == (
        f"Whole, as far as could be seen without running it here. Talk with it: qiusuo chat {place}"
    )


def test_of_very_many_bytes_only_the_first_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qiusuo.doctor.WHOLE_BYTES", 1000)
    _, found, verdict = diagnosis(folder)
    assert "the first rows of every tensor" in found[2].text
    assert verdict.startswith("Healthy")


def test_progress_reaches_the_end(folder: Path) -> None:
    heard: list[tuple[int, int]] = []
    list(examine(Examination(str(folder), lambda done, total: heard.append((done, total)))))
    assert any(done == total for done, total in heard)
    assert all(0 < done <= total for done, total in heard)


# On the command line


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    return asker(monkeypatch, capsys)


def test_the_exit_code_tells(folder: Path, ask: Ask) -> None:
    answer = ask("doctor", folder)
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert [line[0] for line in lines[:-3]] == ["✓"] * 7
    assert lines[-3][2:].startswith("Kernels: ")  # "!" where there is no compiler
    assert lines[-2:] == ["", f"Healthy. Talk with it: qiusuo chat {folder}"]
    change_weights(folder, lambda tensors: tensors[FIRST].zero_())
    answer = ask("doctor", folder)
    assert answer.code == 0
    assert f"\n! Numbers: all zeros: {FIRST}\n" in answer.out
    change_weights(folder, lambda tensors: tensors.pop(FIRST))
    answer = ask("doctor", folder)
    assert (answer.code, answer.err) == (1, "")
    assert "\n✗ Tensors: " in answer.out
    assert f"  missing: {FIRST}\n" in answer.out


def test_where_there_is_nothing_to_examine(tmp_path: Path, ask: Ask) -> None:
    """As every other command says it: one line, not a diagnosis."""
    for place in (tmp_path / "none", tmp_path):
        answer = ask("doctor", place)
        assert str(place) in refused(answer)
        assert answer.out == ""
    with pytest.raises(CheckpointError, match="is not there"):
        next(examine(Examination(str(tmp_path / "none"))))


# What a checkpoint does to its doctor


def test_a_context_of_one_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """There is nothing to foretell, and an MTP module has nothing to look at."""
    model = tiny_model(
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_id,
        max_position_embeddings=1,
        num_nextn_predict_layers=1,
    )
    save_huggingface(model, tmp_path / "m", tokenizer=tokenizer)
    _, found, _ = diagnosis(tmp_path / "m")
    assert (found[-1].mark, found[-1].text) == (Mark.GOOD, "1 tokens, all finite")


def test_a_forward_pass_that_stops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object) -> None:
        raise IndexError("no such row")

    monkeypatch.setattr(Transformer, "logits", stop)
    assert only_fault(folder) == "Forward pass: stopped after 48 tokens by IndexError: no such row"


CLEAR = "\x1b[2J\x1b]0;mine\x07"


def test_a_checkpoint_does_not_steer_the_terminal(folder: Path, ask: Ask) -> None:
    change_weights(folder, lambda tensors: tensors.update({f"x{CLEAR}": torch.ones(1)}))
    for answer in (ask("doctor", folder), ask("export", folder, folder.parent / "new")):
        assert answer.code == 1
        assert "x[2J]0;mine" in answer.out + answer.err
        assert "\x1b" not in answer.out + answer.err


def test_a_template_does_not_steer_the_terminal(folder: Path, ask: Ask) -> None:
    words = "{{ raise_exception('" + CLEAR + "') }}"
    change_json(folder / "tokenizer_config.json", chat_template=words)
    answer = ask("doctor", folder)
    assert answer.code == 1
    assert "refuses these messages: [2J]0;mine" in answer.out
    assert "\x1b" not in answer.out


def test_a_terminal_that_knows_ascii_alone(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qiusuo", "doctor", str(folder)],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "? Files and config: Hugging Face at" in done.stdout
