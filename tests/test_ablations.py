"""The ablation report: what is compared is comparable, and its arithmetic is right."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qiusuo.model.cost import Cost, measure
from qiusuo.training.recipe import Recipe, read_recipe
from tests.training import lives

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def in_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def recipes(tmp_path: Path) -> dict[str, Recipe]:
    """The resolved recipe of every variant."""
    import ablation_variants

    found = {}
    for family, text in ablation_variants.recipes().items():
        tomllib.loads(text)
        (tmp_path / f"{family}.toml").write_text(text)
    for name, variant in ablation_variants.variants().items():
        found[name] = read_recipe(tmp_path / f"{variant.family}.toml", list(variant.changes))
    return found


def cost(recipe: Recipe) -> Cost:
    return measure(recipe.model_for(65))


def test_what_is_compared_has_equal_parameters(recipes: dict[str, Recipe]) -> None:
    costs = {name: cost(recipe) for name, recipe in recipes.items()}
    moe = costs["moe"]
    assert costs["dense-active"].active == pytest.approx(moe.active, rel=0.015)
    assert costs["dense-total"].parameters == pytest.approx(moe.parameters, rel=0.015)
    for name in ("mha", "gqa", "mqa"):  # beside MLA's norms of its latents
        assert costs[name].parameters + 4 * 48 == costs["dense-active"].parameters
    caches = [costs[name].cache_elements for name in ("dense-active", "mqa", "gqa", "mha")]
    assert caches == [4 * 64, 4 * 96, 4 * 160, 4 * 240]


def test_all_read_the_same_with_the_same_optimizer(recipes: dict[str, Recipe]) -> None:
    """Nothing but the model and its balancing differs."""
    stages = [
        recipe.stages[0].model_dump(exclude={"balance", "steps"}) for recipe in recipes.values()
    ]
    assert all(stage == stages[0] for stage in stages)


def test_mtp_with_equal_flops() -> None:
    import ablation_variants as av

    share = av.equal_flops_share()
    assert 0.7 < share < 0.85
    assert av.variants()["mtp-flops"].share == share


def test_runs_share_no_file() -> None:
    """Names with a dot, aux-0.001 and aux-0.01, once wrote their seconds into one file."""
    import ablation_readings as ar
    import ablation_variants as av

    runs = [Path("runs", f"{name}-{seed}") for name in av.variants() for seed in (1, 2, 3)]
    for ending in ("cpu.json", "drafts.json", "output"):
        assert len({ar.beside(run, ending) for run in runs}) == len(runs)
    assert ar.beside(Path("runs", "aux-0.001-1"), "cpu.json") == Path("runs/aux-0.001-1.cpu.json")


def reading(module: ModuleType, variant: str, seed: int, loss: list[float], **changes: Any) -> Any:
    looks = len(loss)
    values: dict[str, Any] = {
        "variant": variant,
        "seed": seed,
        "tokens": [100 * (i + 1) for i in range(looks)],
        "flops": [1e12 * (i + 1) for i in range(looks)],
        "seconds": [2.0 * (i + 1) for i in range(looks)],
        "loss": loss,
        "steps": looks,
        "decay_step": looks,
        "parameters": 10,
        "active": 5,
        "flops_per_token": 1e10,
        "cache_bytes": 64,
        "tokens_per_second": 50.0,
        "cpu_seconds": 20.0,
        "violation": None,
        "pooled_violation": None,
        "violations": [],
        "mtp_agreement": None,
    }
    return module.Reading(**values | changes)


def test_cost_to_reach_a_loss() -> None:
    import ablation_readings as ar

    run = reading(ar, "moe", 1, [3.0, 2.0, 2.5, 1.5])
    assert run.at_loss(2.5, "tokens") == 150  # the first time, between two looks
    assert run.at_loss(1.75, "flops") == pytest.approx(3.75e12)
    assert run.at_loss(2.0, "cpu") == 10
    assert math.isnan(run.at_loss(1.0, "tokens"))
    assert math.isnan(run.at_loss(3.5, "tokens"))  # before the first look
    assert run.loss_at("tokens", 150) == 2.5
    assert math.isnan(run.loss_at("tokens", 401))


def test_tables() -> None:
    import ablation_readings as ar
    import ablation_tables as at

    falling = [3.0, 2.8, 2.6, 2.4, 2.2, 2.0, 1.9, 1.8]
    dense = [reading(ar, "dense-active", seed, falling) for seed in (1, 2, 3)]
    better = [[loss - 0.1 - 0.001 * seed for loss in falling] for seed in (1, 2, 3)]
    moe = [reading(ar, "moe", seed, loss) for seed, loss in zip((1, 2, 3), better, strict=True)]
    torn = [[*falling[:-1], 1.8 + (-1) ** seed * 0.1] for seed in (1, 2, 3)]
    mha = [reading(ar, "mha", seed, loss) for seed, loss in zip((1, 2, 3), torn, strict=True)]
    found = {table.title: table for table in at.tables([*dense, *moe, *mha], {})}
    cost_row = found["1. MoE against dense"].rows[0]
    # Differences of 0.101, 0.102, 0.103: 4.303 · 0.001 / √3.
    assert cost_row[-2:] == ["-0.1020 ± 0.0025", "better"]
    assert found["2. MLA against MHA, GQA, MQA"].rows[1][-1] == "not told apart"
    marks = found["Cost to reach equal loss"]
    assert marks.header[1].startswith("to 2.600")
    # 2.6 is half a look earlier where everything is 0.1 lower: 2.495 of 3 looks, in the mean.
    assert marks.rows[0][1].startswith("2.49 ± 0.01 (× 0.83")
    assert "× 1.00" in marks.rows[1][1]
    assert "Multi-token prediction" in " ".join(found)
    assert at.markdown(marks).count("\n| ") == 4


def test_one_seed_tells_nothing() -> None:
    import ablation_readings as ar
    import ablation_tables as at

    runs = [reading(ar, name, 1, [3.0] * 7 + [end]) for name, end in (("moe", 1), ("mtp", 2))]
    rows = next(t.rows for t in at.tables(runs, {("mtp", 1): 0.5}) if t.title.startswith("3."))
    assert rows[1][-2:] == ["+1.0000", "one seed"]
    assert "50.0 %" in rows[1]


@pytest.mark.long
def test_the_whole_in_quick(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    command = [sys.executable, str(BENCHMARKS / "ablations.py"), "--folder", str(folder), "--quick"]
    environment = lives.environment(tmp_path / "home")
    first = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "4 of 4 runs are finished" in first.stdout
    results = json.loads((folder / "results.json").read_text())
    assert (len(results["runs"]), results["missing_runs"]) == (4, 0)
    assert 0 <= results["draft_acceptance"]["mtp-1"] <= 1
    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 5
    assert "http" not in page.replace("http://www.w3.org", "")
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert (again.stdout, again.stderr) == (first.stdout, "")  # nothing is run twice
    other = [*command[:-1], "--steps", "9", "--seeds", "1"]
    refused = subprocess.run(other, capture_output=True, text=True, env=environment, check=False)
    assert refused.returncode == 1
    assert "was trained by another recipe" in refused.stderr
