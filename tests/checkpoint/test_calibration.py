"""Which columns matter, against hooks of another kind, and what quantising makes of it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qiusuo.checkpoint.calibration import FLOOR, PRIOR, calibrate, token_rows
from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.huggingface import save_huggingface
from qiusuo.checkpoint.open import open_checkpoint
from qiusuo.checkpoint.quantize import quantize_checkpoint
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.low_bit import low_bit_weights
from tests.commands import Ask, asker, refused
from tests.model.shapes import tiny_model

ROWS = [[1, 5, 9, 33, 2, 70, 14, 8], [3, 3, 7], [60, 61, 62, 63, 64]]

ask = pytest.fixture(asker)


def mean_squares(sums: torch.Tensor, count: float, mean: torch.Tensor) -> torch.Tensor:
    drawn = (sums + PRIOR * mean) / (count + PRIOR)
    return drawn / mean.mean() + FLOOR


def test_every_quantised_weight_has_its_columns() -> None:
    model = tiny_model()
    found = calibrate(model, ROWS)
    assert found.tokens == 16
    state = model.state_dict()
    assert set(found.importance) == set(low_bit_weights(model, 4))
    for name, importance in found.importance.items():
        stacked = state[name].ndim == 3
        assert importance.shape == (*state[name].shape[:1][: int(stacked)], state[name].shape[-1])
        assert bool((importance > 0).all())


@torch.no_grad()
def test_numbers_of_a_projection_and_of_experts() -> None:
    model = tiny_model()
    found = calibrate(model, ROWS).importance
    inputs: dict[str, list[torch.Tensor]] = {}
    block = model.model.layers[1]
    block.input_layernorm.register_forward_hook(
        lambda module, given, out: inputs.setdefault("attention", []).append(out[1][0])
    )
    block.mlp.experts.register_forward_pre_hook(
        lambda module, given: inputs.setdefault("experts", []).append(given)
    )
    for row in ROWS:
        model(torch.tensor([row]))
    x_MD = torch.cat(inputs["attention"])
    squares = x_MD.square().sum(0)
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    torch.testing.assert_close(found[name], mean_squares(squares, 16, squares / 16))
    x_MD = torch.cat([given[0] for given in inputs["experts"]])
    indices_MK = torch.cat([given[1].indices_MK for given in inputs["experts"]])
    weights_MK = torch.cat([given[1].weights_MK for given in inputs["experts"]])
    pairs = indices_MK.numel()
    mean_D = sum(x_MD[(indices_MK == e).any(1)].square().sum(0) for e in range(8)) / pairs
    outs = torch.zeros(8, block.mlp.experts.down_proj.shape[2])
    for expert in range(8):
        token, choice = torch.where(indices_MK == expert)
        mine = x_MD[token]
        got = found["model.layers.1.mlp.experts.gate_up_proj"][expert]
        torch.testing.assert_close(got, mean_squares(mine.square().sum(0), len(token), mean_D))
        gate, up = (mine @ block.mlp.experts.gate_up_proj[expert].T).chunk(2, 1)
        outs[expert] = (F.silu(gate) * up * weights_MK[token, choice, None]).square().sum(0)
    for expert in range(8):
        count = int((indices_MK == expert).sum())
        wanted = mean_squares(outs[expert], count, outs.sum(0) / pairs)
        got = found["model.layers.1.mlp.experts.down_proj"][expert]
        torch.testing.assert_close(got, wanted)


def test_outputs_of_what_was_read_are_nearer(tmp_path: Path) -> None:
    """A model whose inputs differ much in size: what it says after int4 is nearer with it."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.data = torch.rand(parameter.shape, generator=generator) ** 3 * 3 + 0.01
    save_huggingface(model, tmp_path / "plain")
    source = open_checkpoint(tmp_path / "plain")
    quantize_checkpoint(source, tmp_path / "bare", "int4")
    known = calibrate(model, ROWS)
    quantize_checkpoint(source, tmp_path / "known", "int4", calibration=known)
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    matters = known.importance[name]
    errors = {}
    for folder in ("bare", "known"):
        made = open_checkpoint(tmp_path / folder).tensors[name]
        lost = made.rows(0, made.shape[0]) - model.state_dict()[name]
        errors[folder] = float((lost.square() * matters).sum())
    assert errors["known"] < errors["bare"]
    facts = open_checkpoint(tmp_path / "known")
    assert facts.low_bit is not None
    assert '"calibration_tokens": 16' in (tmp_path / "known" / "config.json").read_text()


def test_rows_of_texts() -> None:
    tokenizer = Tokenizer.train_bpe(["the road is long and far " * 40], 300)
    one, two = ["the road " * 300, "is long"], ["far " * 2000]
    rows = token_rows(tokenizer, [one, two], tokens=400, context=64)
    assert max(map(len, rows)) <= 64
    assert sum(map(len, rows)) <= 400
    ends = [tokenizer.decode(row) for row in rows]
    assert any("road" in text for text in ends)
    assert any("far" in text for text in ends)
    with pytest.raises(CheckpointError, match="nothing to calibrate with"):
        calibrate(tiny_model(), [])


def test_command(ask: Ask, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train_bpe(["the road is long and far " * 40], 300)
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    save_huggingface(model, tmp_path / "plain", tokenizer=tokenizer)
    text = tmp_path / "text.txt"
    text.write_text("the road is long " * 200)
    words = ["quantize", tmp_path / "plain", tmp_path / "small", "--to", "int4"]
    answer = ask(*words, "--calibrate", text, "--calibration-tokens", "100")
    assert answer.code == 0, answer.err
    read = open_checkpoint(tmp_path / "small")
    assert '"calibration_tokens": 100' in (tmp_path / "small" / "config.json").read_text()
    assert read.low_bit is not None
    words[2] = tmp_path / "other"
    assert "no file or folder" in refused(ask(*words, "--calibrate", tmp_path / "nothing.txt"))
    assert not (tmp_path / "other").exists()
