"""The model card says what the run folder says, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qiusuo.runs.card import count_parameters, write_model_card
from qiusuo.runs.durable import RunError
from qiusuo.runs.folder import RunFolder
from qiusuo.runs.summary import write_summary


def front_matter(card: str) -> dict[str, object]:
    """The little YAML that a card uses: scalars and lists of scalars."""
    first, block, _ = card.split("---\n", 2)
    assert first == ""
    found: dict[str, object] = {}
    key = ""
    for line in block.splitlines():
        if line.startswith("- "):
            items = found[key]
            assert isinstance(items, list)
            items.append(json.loads(line[2:]) if line[2] == '"' else line[2:])
        else:
            key, _, value = line.partition(":")
            found[key] = value.strip() or []
    return found


def test_a_finished_model(make: Callable[..., Path], tmp_path: Path) -> None:
    run = make(tmp_path / "run", steps=40)
    model = run / "model"
    model.mkdir()
    config = {"model_type": "deepseek_v3", "n_routed_experts": 32, "kv_lora_rank": 128}
    (model / "config.json").write_text(json.dumps(config))
    path = write_model_card(run, model)
    assert path == run / "README.md"
    card = path.read_text(encoding="utf-8")
    assert front_matter(card) == {
        "license": "mit",
        "language": ["zh", "en"],
        "library_name": "qiusuo",
        "pipeline_tag": "text-generation",
        "tags": ["qiusuo", "deepseek_v3", "moe", "mla"],
    }
    assert "| Parameters | 27,262,976 |" in card
    assert "| Active parameters per token | 11,534,336 |" in card
    assert "- Tang poems: public domain, built in" in card
    assert "| Exact match, addition | 0.9375 (95 % interval 0.91 to 0.96) |" in card
    assert 'qiusuo.load("model")' in card
    assert 'qiusuo.load(".")' in (model / "README.md").read_text(encoding="utf-8")


def test_nothing_is_invented(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", {}, version="1").close()
    card = write_model_card(tmp_path / "run", tmp_path / "elsewhere").read_text(encoding="utf-8")
    assert "license" not in front_matter(card)
    assert "language" not in front_matter(card)
    assert "carry no stated licence" in card
    assert "does not say what data" in card
    assert "logged no results" in card
    assert "not a finished model" in card
    assert "Parameters" not in card
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(RunError, match="no run folder"):
        write_model_card(tmp_path / "absent", tmp_path)


def test_parameters_are_counted_from_the_files(tmp_path: Path) -> None:
    assert count_parameters(tmp_path) is None
    weights = {"a.weight": torch.zeros(3, 4), "a.weight_scale_inv": torch.zeros(1, 1)}
    save_file(weights, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(5)}, tmp_path / "model-00002-of-00002.safetensors")
    assert count_parameters(tmp_path) == 17
    (tmp_path / "torn.safetensors").write_bytes(b"\x10")
    with pytest.raises(RunError, match=r"torn\.safetensors"):
        count_parameters(tmp_path)


def test_text_cannot_break_the_card(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", {"title": "a\n---\n# <b>|x|*", "license": "no"}).close()
    write_summary(tmp_path / "run", {"A | B": "c\n| d", "Limits": ["only\npoems"]})
    card = write_model_card(tmp_path / "run", tmp_path / "m").read_text(encoding="utf-8")
    assert front_matter(card)["license"] == '"no"'  # YAML would read a bare no as false
    assert "# a --- # &lt;b>\\|x\\|\\*\n" in card
    assert "| A \\| B | c \\| d |" in card
    assert "- only poems" in card


@pytest.mark.parametrize("data", [[], None])
def test_no_data_is_said_to_be_unsaid(
    make: Callable[..., Path], tmp_path: Path, data: object
) -> None:
    run = make(tmp_path / "run", steps=2)
    write_summary(run, {"Base": "smollm2 (Apache-2.0)", "Data": data})
    card = write_model_card(run, run / "model").read_text(encoding="utf-8")
    _, _, about = card.partition("## Data and licences")
    assert about.strip().startswith("The run folder does not say what data")
    assert "- Begun with the weights of smollm2 (Apache-2.0)." in about
    assert card.count("smollm2") == 1  # and not among the results


def test_the_snippet_asks_as_the_model_was_asked(make: Callable[..., Path], tmp_path: Path) -> None:
    run = make(tmp_path / "run", steps=2)
    with (run / "log.jsonl").open("a") as log:
        log.write('{"kind": "validation", "step": 2, "tasks": {"sums/1": {"accuracy": 1.0}}}\n')
    kept = {"step": 1, "prompt": "What is 1+1?", "right": True, "reward": 1.5, "response": "2"}
    (run / "rollouts.jsonl").write_text(json.dumps(kept) + "\n")
    recipe = (run / "recipe.toml").read_text(encoding="utf-8")
    turn = '{"role": "user", "content": "What is 1+1?"}'
    for said, messages in (
        ("", f"[{turn}]"),
        ('system = "Think."', f'[{{"role": "system", "content": "Think."}}, {turn}]'),
    ):
        (run / "recipe.toml").write_text(f"{recipe}\n[ask]\n{said}\n", encoding="utf-8")
        card = write_model_card(run, run / "model").read_text(encoding="utf-8")
        assert f"lm.chat({messages}, thinking=True)" in card
