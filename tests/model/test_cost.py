"""What a model costs: against the published numbers, the bytes on disk and counted arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from qiusuo.checkpoint.huggingface import load_huggingface, save_huggingface
from qiusuo.checkpoint.tensors import mtp_copies
from qiusuo.kernels.cross_entropy import cross_entropy_reference
from qiusuo.model.cost import Cost, available_memory, measure, needed_bytes
from qiusuo.model.families import config_from_hf
from tests.model.shapes import VARIANTS, tiny_config, tiny_model
from tests.model.test_published import V2, V2_LITE, V3


@pytest.fixture(scope="module")
def v3() -> Cost:
    return measure(config_from_hf(V3))


def test_v3(v3: Cost) -> None:
    assert v3.parameters == 671_026_419_200
    assert round(v3.mtp_parameters / 1e9, 2) == 11.61
    assert round(v3.active / 1e9, 2) == 36.63
    assert v3.cache_elements == 35_136
    assert v3.expanded_cache_elements == 61 * 128 * (192 + 128)


@pytest.mark.parametrize(
    ("raw", "parameters", "active"),
    # Active as the papers say it: 2.4B and 21B.
    [(V2_LITE, 15_706_484_224, 2.4e9), (V2, 235_741_434_880, 21e9)],
    ids=["V2-Lite", "V2"],
)
def test_v2(raw: dict[str, Any], parameters: int, active: float) -> None:
    cost = measure(config_from_hf(raw))
    assert (cost.parameters, cost.mtp_parameters) == (parameters, 0)
    assert cost.active == pytest.approx(active, rel=0.025)


def test_weights_in_memory(v3: Cost) -> None:
    stored = 671_026_419_200 + v3.mtp_parameters
    assert v3.weight_bytes("float32") == 4 * stored
    assert v3.weight_bytes("bfloat16") == 2 * stored
    assert v3.weight_bytes("int8 (blocks of 32)") == int(1.0625 * stored)
    assert v3.weight_bytes("int4 (blocks of 32)") == int(0.5625 * stored)
    assert stored < v3.weight_bytes("fp8 (128×128 blocks)") < 1.001 * stored


SHAPES = VARIANTS | {
    "mtp": {"num_nextn_predict_layers": 2},
    "mtp-tied": {"num_nextn_predict_layers": 1, "tie_word_embeddings": True},
    "dense": {"n_routed_experts": 0},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_counts_are_what_is_written(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**changes)
    save_huggingface(model, tmp_path / "m")
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    for name, _ in mtp_copies(model.config):
        del sizes[name]
    cost = measure(model.config)
    assert cost.parameters + cost.mtp_parameters == sum(sizes.values())
    layers = [f"model.layers.{3 + depth}." for depth in range(2)]
    mtp = sum(n for name, n in sizes.items() if name.startswith(tuple(layers)))
    assert cost.mtp_parameters == mtp


def test_active_leaves_out_experts_that_are_not_chosen() -> None:
    config = tiny_config(num_nextn_predict_layers=1)
    cost = measure(config)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    embedding = config.vocab_size * config.hidden_size
    layers = config.num_hidden_layers - config.first_k_dense_replace
    idle = layers * (config.n_routed_experts - config.num_experts_per_tok) * expert
    assert cost.active == cost.parameters - idle - (embedding - config.hidden_size)
    everyone = measure(
        tiny_config(num_experts_per_tok=8, n_group=1, topk_group=1, num_nextn_predict_layers=1)
    )
    assert everyone.active - cost.active == idle


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_multiplies_all_the_same(tied: bool) -> None:
    cost = measure(tiny_config(tie_word_embeddings=tied))
    assert cost.matmul_active == measure(tiny_config()).matmul_active
    embedding = 97 * 48
    assert cost.parameters == measure(tiny_config()).parameters - tied * embedding
    # A row of the embedding is read; of a tied one it is a row that the head multiplies with.
    assert cost.active == measure(tiny_config()).active - tied * 48


LENGTH = 64


@pytest.mark.parametrize(
    "changes",
    [{"n_routed_experts": 0}, {"n_routed_experts": 0, "q_lora_rank": None}, {}],
    ids=["dense", "full-query", "experts"],
)
def test_flops_of_a_forward_pass_are_torchs(changes: dict[str, Any]) -> None:
    """Torch counts attention over all places, masked or not: a context of the whole length."""
    model = tiny_model(**changes)
    tokens_BT = torch.randint(97, (2, LENGTH))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(tokens_BT).x_BTD)
    # Experts are given rows in a few sizes, some of them padding: up to an eighth more.
    room = 0.1 if model.config.n_routed_experts else 0.02
    expected = measure(model.config).forward_flops(LENGTH) * tokens_BT.numel()
    assert counter.get_total_flops() == pytest.approx(expected, rel=room)


def test_flops_of_training_are_torchs() -> None:
    model = tiny_model(n_routed_experts=0, num_nextn_predict_layers=1)
    tokens_BT = torch.randint(97, (2, LENGTH))
    labels_M = tokens_BT.flatten()
    with FlopCounterMode(display=False) as counter:
        hidden = model(tokens_BT).x_BTD
        ahead = model.predict_ahead(hidden, tokens_BT, 0, model.context(tokens_BT)).x_BTD
        head = model.lm_head.weight
        loss = sum(
            cross_entropy_reference(x.flatten(0, 1), head, labels_M) for x in (hidden, ahead)
        )
        loss.backward()
    cost = measure(model.config)
    counted = counter.get_total_flops() / tokens_BT.numel()
    # Ours has a causal token see half the sequence; torch's counter the whole of it.
    assert cost.forward_flops(LENGTH, mtp=True) * 3 == pytest.approx(counted, rel=0.08)
    whole, half = (cost.forward_flops(n, mtp=True) for n in (LENGTH, LENGTH / 2))
    assert cost.training_flops(LENGTH) == 3 * half
    width = cost.attention_width + cost.attention_width_mtp
    assert whole - half == 2.0 * (LENGTH / 2) * width


def test_context_costs_attention_only() -> None:
    cost = measure(tiny_config())
    assert cost.forward_flops(0) == 2 * cost.matmul_active
    assert cost.forward_flops(10) - cost.forward_flops(0) == 20 * 3 * 3 * (12 + 8 + 10)


def test_available_memory_is_a_machines() -> None:
    assert 1 << 26 < available_memory() < 1 << 50
    missing = Path("not there")
    assert 1 << 26 < available_memory(missing, missing) < 1 << 50


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("groups", "free"),
    [
        ({}, 8192),  # what the machine has left
        ({"memory.max": "max", "memory.current": "9", "memory.stat": ""}, 8192),
        ({"memory.max": "5000", "memory.current": "1000", "memory.stat": "anon 700\n"}, 4000),
        (  # what is kept of files makes room when it is needed
            {
                "memory.max": "5000",
                "memory.current": "4500",
                "memory.stat": "anon 700\ninactive_file 1000\nactive_file 200\nfile 1300\n",
            },
            1700,
        ),
        (  # the group above is smaller
            {
                "memory.max": "9000",
                "memory.current": "100",
                "memory.stat": "",
                "../memory.max": "3000",
                "../memory.current": "1000",
                "../memory.stat": "",
            },
            2000,
        ),
        ({"memory.max": "50", "memory.current": "90", "memory.stat": ""}, 0),
    ],
)
def test_memory_of_a_control_group(tmp_path: Path, groups: dict[str, str], free: int) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:       8 kB\n")
    (tmp_path / "self" / "cgroup").write_text("0::/pod/one\n")
    place = tmp_path / "cgroup" / "pod" / "one"
    place.mkdir(parents=True)
    write_files(place, groups)
    assert available_memory(tmp_path, tmp_path / "cgroup") == free


def test_memory_of_an_older_control_group(tmp_path: Path) -> None:
    """In a container the path is the host's, and the limits lie at the root."""
    write_files(
        tmp_path,
        {
            "meminfo": "MemAvailable: 8 kB\n",
            "self/cgroup": "9:name=systemd:/x\n4:cpu,memory:/docker/abc\n0::/\n",
            "cgroup/memory/memory.limit_in_bytes": "5000\n",
            "cgroup/memory/memory.usage_in_bytes": "4000\n",
            "cgroup/memory/memory.stat": "total_inactive_file 300\ninactive_file 7\n",
        },
    )
    assert available_memory(tmp_path, tmp_path / "cgroup") == 1300


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_needed_bytes_are_those_of_a_loaded_model(tmp_path: Path, tied: bool, dtype) -> None:
    save_huggingface(tiny_model(tie_word_embeddings=tied), tmp_path / "m")
    held = load_huggingface(tmp_path / "m", dtype=dtype)
    expected = sum({t.data_ptr(): t.nbytes for t in held.state_dict().values()}.values())
    assert needed_bytes(held.config, dtype) == expected
