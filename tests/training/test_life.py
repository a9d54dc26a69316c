"""What a finished run leaves behind."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import qiusuo
from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.cost import measure
from qiusuo.runs.folder import RunFolder
from qiusuo.runs.log import read_log
from qiusuo.runs.summary import read_summary
from qiusuo.training.finish import facts
from qiusuo.training.recipe import RecipeError, parse_recipe
from qiusuo.training.sample import Sampling
from tests.training import lives, tasks


def test_the_run_folder_has_everything(undisturbed: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {
        ".lock",
        "README.md",
        "checkpoints",
        "environment.json",
        "log.jsonl",
        "model",
        "tokenizer",
        "recipe.toml",
        "report.html",
        "samples.jsonl",
        "status.json",
        "summary.json",
    }
    status = RunFolder.open(undisturbed, lock=False).status()
    assert (status["state"], status["error"]) == ("finished", None)
    assert (status["step"], status["steps"]) == (lives.STEPS, lives.STEPS)
    assert [path.name for path in sorted((undisturbed / "checkpoints").iterdir())] == [
        "step-00000016",
        "step-00000024",
    ]
    assert "tiny" in (undisturbed / "README.md").read_text(encoding="utf-8")
    assert "<html" in (undisturbed / "report.html").read_text(encoding="utf-8")
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {
        path.name for path in (undisturbed / "model").iterdir()
    }


def test_the_log_tells_every_step(undisturbed: Path, corpus: Path) -> None:
    log = read_log(undisturbed / "log.jsonl")
    steps = [record for record in log if record["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, lives.STEPS + 1))
    for record in steps:
        for key in ("loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "seconds"):
            assert math.isfinite(record[key])
        assert len(record["max_violation"]) == 2  # one MoE layer and the MTP module's
        assert 0 < record["peak_share"] < 1
    assert all(a["tokens"] < b["tokens"] for a, b in itertools.pairwise(steps))
    assert [r["step"] for r in steps if "expert_load" in r] == [10, 20, lives.STEPS]
    looks = [record for record in log if record["kind"] == "validation"]
    assert [record["step"] for record in looks] == [8, 16, 24]
    assert [record["tokens"] > 128 for record in looks] == [False, False, True]
    assert [(s["step"], s["prompt"]) for s in lives.samples(undisturbed)] == [
        (8, "the"),
        (16, "the"),
        (24, "the"),
    ]


def test_the_loss_goes_down(undisturbed: Path) -> None:
    log = read_log(undisturbed / "log.jsonl")
    steps = [record for record in log if record["kind"] == "step"]
    assert steps[0]["loss"] == pytest.approx(math.log(61), rel=0.02)  # knows nothing yet
    assert steps[-1]["loss"] < steps[0]["loss"] - 1.0
    assert steps[-1]["mtp_loss"] < steps[0]["mtp_loss"] - 0.4
    looks = [record["loss"] for record in log if record["kind"] == "validation"]
    assert looks == sorted(looks, reverse=True)


def test_the_summary_says_what_was_measured(undisturbed: Path) -> None:
    summary = read_summary(undisturbed)
    last = read_log(undisturbed / "log.jsonl")[-1]
    assert last["kind"] == "validation"
    cost = measure(qiusuo.load(undisturbed).config)
    assert summary["Parameters"] == cost.parameters + cost.mtp_parameters
    assert summary["Active parameters"] == cost.active
    assert summary["Validation loss"]["value"] == round(last["loss"], 4)
    assert summary["Validation"]["value"] == round(last["bits_per_character"], 4)
    assert summary["MTP agreement"]["value"] == round(100 * last["mtp_agreement"], 1)
    assert summary["Cache per token"]["value"] == 2 * cost.cache_elements
    assert summary["Tokens seen"] > 2000


def test_the_recipe_of_the_folder_is_the_one_lived(undisturbed: Path, corpus: Path) -> None:
    resolved = RunFolder.open(undisturbed, lock=False).recipe
    assert parse_recipe(resolved) == lives.recipe_for(corpus)


def test_the_model_is_the_last_state(undisturbed: Path) -> None:
    lm = qiusuo.load(undisturbed)
    state = torch.load(lives.last_checkpoint(undisturbed) / "state.pt")["model"]
    for name, tensor in lm.model.state_dict().items():
        dtype = torch.float32 if name.endswith("bias") else torch.bfloat16
        assert tensor.dtype == dtype
        assert torch.equal(tensor, state[name].to(dtype)), name
    assert any(state[n].any() for n in state if n.endswith("e_score_correction_bias"))
    [sample] = lm.generate(["the road"], max_tokens=5)
    assert len(sample.token_ids) == 5
    assert isinstance(sample.text, str)


def test_transformers_reads_the_model(undisturbed: Path) -> None:
    from transformers import AutoModelForCausalLM

    peer, info = AutoModelForCausalLM.from_pretrained(
        undisturbed / "model", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    # It leaves MTP aside for V3's own number of layers only.
    assert all(name.startswith("model.layers.2.") for name in info["unexpected_keys"])
    lm = qiusuo.load(undisturbed, dtype="float32")
    tokens = [1, 5, 9, 30, 7]
    with torch.no_grad():
        theirs = peer(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(lm.logits(tokens), theirs, rtol=1e-4, atol=1e-4)


def test_save_dtype_is_kept(corpus: Path, tmp_path: Path) -> None:
    table = lives.recipe_table(corpus, steps=1) | {"save_dtype": "float32"}
    assert lives.live(parse_recipe(table), tmp_path / "run")
    assert qiusuo.load(tmp_path / "run").model.lm_head.weight.dtype == torch.float32


def test_two_lives_of_one_seed_are_one(
    corpus: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qiusuo.training.finish.write_report", lambda path: path)
    assert lives.live(lives.recipe_for(corpus), tmp_path / "twin")
    lives.assert_same_life(tmp_path / "twin", undisturbed)
    other = parse_recipe(lives.recipe_table(corpus) | {"seed": 2, "name": "other"})
    assert lives.live(other, tmp_path / "other")
    assert lives.losses(tmp_path / "other")[0] != lives.losses(undisturbed)[0]


def test_training_leaves_the_processes_arithmetic_alone(undisturbed: Path) -> None:
    """Training rounds denormal numbers to zero; what comes after it does not."""
    assert (torch.full((4,), 1e-40) * 0.5).all()


def test_a_corpus_without_text_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"text": " "}) + "\n")
    with pytest.raises(DataError, match="empty"):
        lives.live(lives.recipe_for(empty), tmp_path / "run")
    assert lives.state_of(tmp_path / "run") == "failed"


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    lives.write_corpus(tmp_path / "road.jsonl", 3)
    with pytest.raises(DataError, match=r"raod\.jsonl.*road\.jsonl"):
        lives.live(lives.recipe_for(tmp_path / "raod.jsonl"), tmp_path / "run")


def test_a_package_that_is_missing_is_named_before_there_is_a_folder(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    data = {"corpora": [{"source": str(corpus)}], "deduplicate": "near"}
    with pytest.raises(DataError, match=r"needs datasketch: pip install 'qiusuo\[data\]'"):
        lives.live(lives.recipe_for(corpus, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_documented_install_has_what_the_documented_recipe_needs() -> None:
    """The first recipe of docs/training.md finds near-duplicates; `make run` installs for it."""
    root = Path(__file__).parents[2]
    text = (root / "docs/training.md").read_text(encoding="utf-8")
    recipe = parse_recipe(tomllib.loads(text.split("```toml\n")[1].split("```")[0]))
    assert recipe.stages[0].data.deduplicate == "near"
    installed = re.search(r"ready-run:.*?-e '\.\[(.*?)\]'", (root / "Makefile").read_text(), re.S)
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [p for e in installed[1].split(",") for p in extras["optional-dependencies"][e]]
    assert any(package.startswith("datasketch") for package in wanted)


def test_a_corpus_shorter_than_a_window_is_named(tmp_path: Path) -> None:
    short = lives.write_corpus(tmp_path / "short.jsonl", 3)
    roomy = {"max_position_embeddings": 100_000}
    recipe = lives.recipe_for(short, model=roomy, sequence_length=100_000)
    with pytest.raises(DataError, match=r"tokens, fewer than one window of 100002"):
        lives.live(recipe, tmp_path / "run")
    assert lives.state_of(tmp_path / "run") == "failed"


def test_two_stages_share_one_tokenizer_and_one_card(tmp_path: Path) -> None:
    first = lives.write_corpus(tmp_path / "first.jsonl")
    second = tmp_path / "second.jsonl"
    lines = [f'{{"text": "WHOLLY OTHER LETTERS, AND {number} OF THEM"}}' for number in range(200)]
    second.write_text("\n".join(lines))
    table = lives.recipe_table(first, steps=4)
    stage = lives.recipe_table(second, steps=3)["stages"][0]
    table["stages"].append(stage | {"name": "second"})
    assert lives.live(parse_recipe(table), tmp_path / "run")
    assert lives.state_of(tmp_path / "run") == "finished"
    kept, last = (Tokenizer.load(tmp_path / "run" / part) for part in ("tokenizer", "model"))
    assert kept.fingerprint == last.fingerprint
    assert "W" not in kept.backend.get_vocab()
    assert lives.steps_done(tmp_path / "run") == [1, 2, 3, 4, 5, 6, 7]
    named = [entry["name"] for entry in read_summary(tmp_path / "run")["Data"]]
    assert named == ["first", "second"]


def test_what_a_card_needs_of_data_and_licences(taught: Path, corpus: Path, tmp_path: Path) -> None:
    """Corpora that problems are made of too, those of the looks as well."""
    poems = lives.write_corpus(tmp_path / "poems.jsonl", documents=1)
    entries = [tasks.PARITY | {"corpus": str(path)} for path in (poems, corpus)]
    stages = tasks.sample(tasks=[tasks.PARITY]), tasks.sft(sources=[{"task": entries[0]}])
    recipe = tasks.recipe(*stages, base=taught, evaluation={"tasks": entries})
    table = facts(recipe, Sampling(lives.scene_of(recipe, tmp_path / "run")).state, None)
    assert [entry["source"] for entry in table["Data"]] == [str(poems), str(corpus)]
    assert table["Base"] == str(taught)
    pulled = recipe.model_copy(update={"base": "smollm2"})
    table = facts(pulled, Sampling(lives.scene_of(recipe, tmp_path / "other")).state, None)
    assert table["Base"] == "smollm2 (Apache-2.0)"


def test_a_prompt_over_the_context_is_refused_before_the_first_step(
    tmp_path: Path, corpus: Path
) -> None:
    recipe = lives.recipe_for(corpus, samples={"prompts": ["the road " * 50]})
    with pytest.raises(RecipeError, match="sample prompt"):
        lives.live(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "log.jsonl").exists()
    # Such a run never began: its folder may be used for the mended recipe.
    assert lives.live(lives.recipe_for(corpus, steps=2), tmp_path / "run")
