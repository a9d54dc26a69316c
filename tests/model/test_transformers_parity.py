"""The same folder in transformers and here: same keys, same logits, both ways."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qiusuo.checkpoint.huggingface import load_huggingface, save_huggingface
from tests.model.shapes import DENSE, FAMILIES, tiny_config, tiny_model

TOKENS = torch.randint(97, (2, 37), generator=torch.Generator().manual_seed(1))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_transformers_reads_what_we_write(changes, tmp_path):
    model = tiny_model(**changes)
    save_huggingface(model, tmp_path / "m")
    peer, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info)
    assert not any(info.values()), info
    ours, theirs = model.logits(model(TOKENS).x_BTD), peer(TOKENS).logits
    assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("name", ["v3", "v3-yarn", "v2-lite", "v2-groups", *DENSE])
@torch.no_grad()
def test_we_read_what_transformers_writes(name, tmp_path):
    changes = FAMILIES[name]
    model = tiny_model(**changes)
    save_huggingface(model, tmp_path / "ours")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    peer.save_pretrained(tmp_path / "theirs")
    back = load_huggingface(tmp_path / "theirs")
    assert back.config == tiny_config(**changes)
    assert all(map(torch.equal, back.state_dict().values(), model.state_dict().values()))


@torch.no_grad()
def test_mtp_layers_are_left_aside_by_transformers(tmp_path):
    """The main model loads whole; what transformers does not know is exactly the MTP layer."""
    model = tiny_model(num_nextn_predict_layers=1)
    save_huggingface(model, tmp_path / "m")
    peer, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert info["unexpected_keys"]
    assert all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])
    assert relative_error(model.logits(model(TOKENS).x_BTD), peer(TOKENS).logits) <= 1e-5
