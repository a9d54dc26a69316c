"""Plans: held to what DeepSeek published, to hand counts, and to what must add up."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from qiusuo.model.config import ModelConfig
from qiusuo.model.cost import measure
from qiusuo.model.families import config_from_hf
from qiusuo.training.layout import Layout, PlanError, kept_bytes, memory, traffic
from qiusuo.training.planning import (
    DEVICES,
    HOUR,
    Plan,
    find_device,
    flops_per_token,
    implied_share,
    plan,
    read_count,
)
from tests.commands import asker, refused
from tests.model.shapes import tiny_config
from tests.model.test_published import V2, V3

H800 = DEVICES["h800"]
# arXiv:2505.09343, table 4: V3 on 2,048 H800, causal attention, against bf16's peak. Table 2 of the
# same paper counts 250 GFLOPs a token, which leaves the MTP module out, and so does this share.
PUBLISHED_SHARE = 0.3894
# arXiv:2401.02954, table 2, and its config.json.
DEEPSEEK_67B = {
    "model_type": "llama",
    "vocab_size": 102400,
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 95,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
LARGE = Layout(  # arXiv:2412.19437 §3.2 and §4.2: 16 stages, experts over 64, 15,360 sequences
    devices=2048, batch=15360, sequence_length=4096, pipeline=16, expert=64, precision="fp8"
)
SMALL = Layout(devices=1, batch=8, sequence_length=16)


@pytest.fixture(scope="module")
def v3() -> ModelConfig:
    return config_from_hf(V3)


def on_one(config: ModelConfig, share: float, tokens: float = 1e12) -> Plan:
    layout = Layout(devices=1, batch=1, sequence_length=4096)
    return plan(config, H800, layout, tokens, share, mtp=False)


# -- arithmetic and hours -----------------------------------------------------------------


@pytest.mark.parametrize(("raw", "published"), [(V3, 250e9), (V2, 155e9)], ids=["V3", "V2"])
def test_published_arithmetic_of_a_token(raw: dict[str, object], published: float) -> None:
    """arXiv:2505.09343, table 2, in sequences of 4,096."""
    cost = measure(config_from_hf(raw))
    assert flops_per_token(cost, 4096, mtp=False) == pytest.approx(published, rel=0.005)


def test_v3_took_the_hours_that_its_published_share_says(v3: ModelConfig) -> None:
    """Share and hours come from two papers: 2.664M hours are of arXiv:2412.19437, table 1."""
    run = plan(v3, H800, LARGE, 14.8e12, PUBLISHED_SHARE, mtp=False)
    assert run.device_hours == pytest.approx(2.664e6, rel=0.01)
    assert run.device_hours / 14.8 == pytest.approx(180e3, rel=0.01)
    assert run.seconds / 14.8 / (24 * HOUR) == pytest.approx(3.7, abs=0.05)
    # arXiv:2505.09343, table 4: 272.80 billion tokens a day, 19.926 s a step, 385 TFLOP/s.
    assert 24 * HOUR * 2048 * run.token_rate == pytest.approx(272.80e9, rel=0.01)
    assert run.step_seconds == pytest.approx(19.926, rel=0.01)
    assert run.token_rate * run.flops_per_token == pytest.approx(385e12, rel=0.01)


def test_the_share_that_the_hours_of_v3_imply(v3: ModelConfig) -> None:
    """With the MTP module, which was trained in those hours."""
    share = implied_share(v3, H800, LARGE, 14.8e12, 2.664e6)
    assert share == pytest.approx(0.4067, abs=0.0005)
    assert share * H800.bf16 / (H800.fp8 or 0) == pytest.approx(0.2032, abs=0.0005)
    again = plan(v3, H800, LARGE, 14.8e12, share)
    assert again.device_hours == pytest.approx(2.664e6)


def test_the_same_share_tells_a_dense_models_hours() -> None:
    """DeepSeek 67B: 300.6K hours a trillion tokens (arXiv:2405.04434 §3.2.3)."""
    config = config_from_hf(DEEPSEEK_67B)
    assert measure(config).parameters == pytest.approx(67e9, rel=0.01)
    assert on_one(config, PUBLISHED_SHARE).device_hours == pytest.approx(300.6e3, rel=0.01)


def test_the_same_share_does_not_tell_those_of_v2() -> None:
    """172.8K hours a trillion tokens (the same place): a quarter of the peak, not two fifths."""
    config = config_from_hf(V2)
    assert on_one(config, PUBLISHED_SHARE).device_hours < 0.66 * 172.8e3
    layout = Layout(devices=1, batch=1, sequence_length=4096)
    assert implied_share(config, H800, layout, 1e12, 172.8e3) == pytest.approx(0.252, abs=0.002)


def test_layers_computed_again_take_a_third_longer() -> None:
    config = tiny_config()
    hours = [
        plan(config, H800, replace(SMALL, recompute=how), 1e9, 0.4).device_hours
        for how in ("parts", "layers")
    ]
    assert hours[1] / hours[0] == pytest.approx(4 / 3)


def test_this_machine() -> None:
    device = find_device("measured")
    assert 1e9 < device.bf16 < 1e15
    assert (device.fp8, device.network) == (None, None)
    run = plan(tiny_config(), device, SMALL, 1e6, 0.1)
    assert run.network_seconds is None
    assert run.token_rate == pytest.approx(0.1 * device.bf16 / run.flops_per_token)


# -- memory and traffic -------------------------------------------------------------------

LAYOUTS = [
    SMALL,
    Layout(devices=4, batch=8, sequence_length=16),
    Layout(devices=8, batch=8, sequence_length=16, pipeline=2, expert=4),
    Layout(devices=24, batch=16, sequence_length=16, pipeline=3, expert=8, precision="fp8"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda one: f"{one.devices}-{one.pipeline}")
@pytest.mark.parametrize("mtp", [0, 1])
def test_the_devices_hold_the_model(layout: Layout, mtp: int) -> None:
    """Optimizer states lie once on all devices together, gradients once a copy of the weights."""
    config = tiny_config(num_nextn_predict_layers=mtp)
    cost = measure(config)
    numbers = cost.parameters + cost.mtp_parameters
    need = memory(config, layout)
    assert need.optimizer * layout.devices == pytest.approx(8 * numbers)
    routed = (2 + mtp) * 8 * 3 * 48 * 24  # MoE layers, experts, matrices of 48 by 24
    copies = layout.replicas
    held = (numbers - routed) * copies + routed * copies / layout.expert
    assert need.gradients * layout.devices == pytest.approx(4 * held)
    if layout.precision == "bfloat16":
        assert need.weights * layout.devices == pytest.approx(2 * held)
    else:
        assert held < need.weights * layout.devices < 2 * held


def test_what_a_token_of_v3_leaves(v3: ModelConfig) -> None:
    """By hand: the stream twice, latents of 1536 + 512 + 64 and attention's output in bf16, its
    log-sum-exp; of MoE layers SwiGLU's inputs of nine experts and eight inputs in a byte each, of
    the three dense ones SwiGLU's inputs."""
    every = 2 * (2 * 7168 + 1536 + 576 + 128 * 128) + 4 * 128
    moe = 9 * 2 * 2048 + 8 * 7168
    expected = every + (59 * moe + 3 * 2 * 18432) / 62
    assert kept_bytes(v3, LARGE) == pytest.approx(expected)
    assert kept_bytes(v3, replace(LARGE, recompute="layers")) == 2 * 7168
    # 16 micro-batches of 4,096 tokens wait, in four layers each.
    assert memory(v3, LARGE).activations == pytest.approx(16 * 4096 * 4 * expected)
    assert memory(v3, LARGE).total < H800.memory


def test_what_a_device_of_v3_sends(v3: ModelConfig) -> None:
    """By hand: a byte there and two back for each of a token's eight experts, of which one in 64 is
    at home, and the same for gradients; at most four machines, of which one in eight is home."""
    tokens = 15360 * 4096 / 128
    a_copy = tokens * 59 / 16 * 2 * (1 + 2) * 7168
    sent = traffic(v3, LARGE)
    assert sent.experts == pytest.approx(a_copy * 8 * 63 / 64)
    assert sent.between_nodes == pytest.approx(a_copy * 4 * 7 / 8)
    assert sent.pipeline == pytest.approx(2 * tokens * 2 * 7168)


def test_one_device_sends_nothing() -> None:
    sent = traffic(tiny_config(), SMALL)
    assert (sent.experts, sent.pipeline, sent.data) == (0, 0, 0)


def test_copies_of_a_model_reduce_and_gather() -> None:
    """Four copies: three quarters of the float32 gradients, and of the bf16 weights."""
    config = config_from_hf(DEEPSEEK_67B)
    layout = Layout(devices=4, batch=8, sequence_length=4096)
    sent = traffic(config, layout)
    assert sent.data == pytest.approx(0.75 * (4 + 2) * measure(config).parameters)
    assert (sent.experts, sent.pipeline) == (0, 0)


# -- mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"devices": 3, "pipeline": 2}, "--devices 3 is not a multiple of --pipeline 2"),
        ({"devices": 4, "pipeline": 4}, "more stages than layers"),
        ({"devices": 3, "expert": 3, "batch": 3}, "does not divide the model's 8 routed experts"),
        ({"devices": 4, "expert": 8}, "does not divide the 4 devices of a stage"),
        ({"devices": 4, "batch": 6}, "--batch 6 is not a multiple of 4"),
        ({"sequence_length": 129}, "over the model's max_position_embeddings 128"),
    ],
)
def test_layouts_that_cannot_be(changes: dict[str, int], expected: str) -> None:
    with pytest.raises(PlanError, match=expected):
        plan(tiny_config(), H800, replace(SMALL, **changes), 1e9, 0.4)


def test_a_dense_model_has_no_experts_to_spread() -> None:
    layout = Layout(devices=2, batch=2, sequence_length=16, expert=2)
    with pytest.raises(PlanError, match="0 routed experts"):
        plan(tiny_config(model_type="llama"), H800, layout, 1e9, 0.4)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(PlanError, match="--share"):
        plan(tiny_config(), H800, SMALL, 1e9, share)


@pytest.mark.parametrize(
    ("text", "count"),
    [("14.8T", 14.8e12), ("2.664M", 2.664e6), ("180K", 180e3), ("1e12", 1e12), ("1,000", 1000.0)],
)
def test_counts(text: str, count: float) -> None:
    assert read_count(text, "--tokens") == pytest.approx(count)


@pytest.mark.parametrize("text", ["", "T", "1x", "-3", "1.2.3", "nan", "1e999"])
def test_counts_that_are_none(text: str) -> None:
    with pytest.raises(PlanError, match="--tokens"):
        read_count(text, "--tokens")


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(V3))
    ask = asker(monkeypatch, capsys)
    layout = "--devices 2048 --batch 15360 --pipeline 16 --expert 64 --precision fp8".split()
    told = ask("plan", file, "--tokens", "14.8T", "--hours", "2.664M", *layout)
    assert told.code == 0
    for words in ("40.7%, 20.3% of fp8's (implied by the hours)", "2.66 M, 180 k a trillion"):
        assert words in told.out
    assert "40.0%, 20.0% of fp8's (assumed)" in ask("plan", file).out
    assert "--share or --hours" in refused(ask("plan", file, "--share", "0.4", "--hours", "1"))
    assert "are too few" in refused(ask("plan", file, "--hours", "3"))
    assert "expected one of h800" in refused(ask("plan", file, "--device", "abacus"))
    assert "expected fp8 or bfloat16" in refused(ask("plan", file, "--precision", "fp4"))
    message = refused(ask("plan", "no/such"))
    assert "no/such" in message
    assert "a config.json or a recipe does too: countdown, " in message


def test_small_numbers_in_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    ask = asker(monkeypatch, capsys)
    assert "--share 0 must be above 0" in refused(ask("plan", "quickstart", "--share", "0"))
    message = refused(ask("plan", "quickstart", "--hours", "0.0001"))
    assert re.search(r"--hours 0\.0001 are too few: .* needs 5\.\d+ for 1\.00 T tokens", message)
    told = ask("plan", "quickstart").out
    assert re.search(r"\d+\.\d M tokens/s a device", told)
    assert re.search(r"8,192 tokens: 0\.\d+ ms", told)
    assert not re.search(r"\de[+-]\d", told.replace("e+19 FLOPs", ""))
