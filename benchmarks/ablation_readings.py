"""What a finished run of benchmarks/ablations.py says: one curve and a few figures."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qiusuo.data.corpora import open_corpus
from qiusuo.engine.language_model import LanguageModel
from qiusuo.engine.limits import Limits
from qiusuo.engine.loading import load
from qiusuo.model.cost import measure
from qiusuo.model.families import config_from_file
from qiusuo.runs.durable import write_json
from qiusuo.runs.folder import read_recipe
from qiusuo.runs.log import read_log
from qiusuo.runs.series import expert_loads, of_kind, table, typical

CACHE_BYTES = 2  # a number of the cache is bf16
PROMPTS, PROMPT_LENGTH, ANSWER = 8, 64, 64  # of the measurement of drafts


@dataclass(frozen=True)
class Reading:
    """``loss``: validation loss of the main model, nats a token, at each look; beside it what had
    been spent by then: ``tokens``, ``flops`` (arithmetic by model/cost.py), ``seconds`` of training
    steps. ``cpu_seconds``: processor time of the whole process, start, looks and saving included:
    on a shared machine the seconds to compare. ``violation``: MaxVio of a step, mean of layers over
    the last quarter of the steps; ``pooled_violation``: of those steps' logged loads added up,
    which the chance of one batch hardly touches."""

    variant: str
    seed: int
    tokens: list[int]
    flops: list[float]
    seconds: list[float]
    loss: list[float]
    steps: int
    decay_step: int
    parameters: int
    active: int
    flops_per_token: float
    cache_bytes: int
    tokens_per_second: float
    cpu_seconds: float
    violation: float | None
    pooled_violation: float | None
    violations: list[list[float]]
    mtp_agreement: float | None

    @property
    def cpu(self) -> list[float]:
        """Processor seconds spent by each look, spread evenly over the tokens."""
        return [self.cpu_seconds * tokens / self.tokens[-1] for tokens in self.tokens]

    @property
    def final_loss(self) -> float:
        return self.loss[-1]

    def at_loss(self, mark: float, spent: str) -> float:
        """How much of ``spent`` ("tokens", "flops", "cpu", "seconds") it took to reach a loss for
        the first time, on a straight line between two looks; NaN where it was not reached."""
        costs = getattr(self, spent)
        for place, loss in enumerate(self.loss):
            if loss <= mark:
                if place == 0:
                    return math.nan  # somewhere before the first look
                before = self.loss[place - 1]
                share = (before - mark) / (before - loss)
                return float(costs[place - 1] + share * (costs[place] - costs[place - 1]))
        return math.nan

    def loss_at(self, spent: str, cost: float) -> float:
        """The loss when so much was spent; NaN outside of the curve."""
        return float(np.interp(cost, getattr(self, spent), self.loss, math.nan, math.nan))

    def record(self) -> dict[str, Any]:
        return asdict(self)


def beside(run: Path, ending: str) -> Path:
    """A file of ours next to a run folder. Not ``with_suffix``: a name such as aux-0.001-1 has a
    dot of its own, and what follows it would be lost."""
    return run.with_name(f"{run.name}.{ending}")


def read_run(run: Path, variant: str, seed: int) -> Reading:
    """Read the run folder of a finished run."""
    records = read_log(run / "log.jsonl")
    stage = read_recipe(run)["stages"][0]
    config = config_from_file(run / "model")
    cost = measure(config)
    steps = of_kind(records, "step")
    looks = of_kind(records, "validation")
    of_step = {step["step"]: step for step in steps}
    tokens = [of_step[look["step"]]["tokens"] for look in looks]
    per_token = cost.training_flops(stage["sequence_length"])
    late = [step for step in steps if step["step"] > 0.75 * stage["steps"]]
    places, violations = table(steps, "max_violation")
    recent = table(late, "max_violation")[1]
    loads = expert_loads(late)[1]
    kept = beside(run, "cpu.json")
    return Reading(
        variant=variant,
        seed=seed,
        tokens=tokens,
        flops=[per_token * count for count in tokens],
        seconds=[look["seconds"] for look in looks],
        loss=[look["loss"] for look in looks],
        steps=stage["steps"],
        decay_step=round(stage["steps"] * (1 - stage["schedule"]["decay_fraction"])),
        parameters=cost.parameters + cost.mtp_parameters,
        active=cost.active,
        flops_per_token=per_token,
        cache_bytes=CACHE_BYTES * cost.cache_elements,
        tokens_per_second=typical(steps, "tokens_per_second") or math.nan,
        cpu_seconds=sum(json.loads(kept.read_text())) if kept.is_file() else math.nan,
        violation=float(recent.mean()) if recent.size else None,
        pooled_violation=float((loads.mean(0).max(-1) - 1).mean()) if loads.size else None,
        violations=[[float(p), float(v)] for p, v in zip(places, violations.mean(1), strict=True)]
        if violations.size
        else [],
        mtp_agreement=looks[-1].get("mtp_agreement"),
    )


def draft_acceptance(run: Path) -> float:
    """The share of the MTP module's drafts that the engine accepts when the finished model goes on,
    greedily and in float32, from pieces of the text that was held out; measured once a run."""
    kept = beside(run, "drafts.json")
    if kept.is_file():
        return float(json.loads(kept.read_text())["accepted"])
    loaded = load(run, dtype="float32")
    text = next(open_corpus("tinyshakespeare").documents())
    held_out = text[-len(text) // 60 :]  # the last fiftieth is no training text
    starts = range(0, len(held_out) - PROMPT_LENGTH, len(held_out) // PROMPTS)
    prompts = [held_out[start : start + PROMPT_LENGTH] for start in starts][:PROMPTS]
    limits = Limits(cache_bytes=1 << 26, prefix_cache=False)
    lm = LanguageModel(loaded.model, loaded.tokenizer, limits, draft="mtp")
    lm.generate(prompts, max_tokens=ANSWER, ignore_eos=True)
    told = lm.engine.statistics
    write_json(kept, {"drafted": told.drafted, "accepted": told.accepted / max(1, told.drafted)})
    return float(told.accepted / max(1, told.drafted))
