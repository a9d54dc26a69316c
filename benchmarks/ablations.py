"""What each part of the DeepSeek recipe is worth at this size, with seeds, whatever comes out.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/ablations.py --folder runs/ablations

Four questions, each answered by models that differ in one thing (ablation_variants.py):

1. cost to equal loss: a DeepSeek-shaped MoE against dense models with equal active parameters and
   with equal parameters in all;
2. attention: MLA against MHA, GQA and MQA with equal parameters;
3. multi-token prediction: none, at equal tokens, at equal FLOPs; and what its drafts are worth;
4. balancing: the bias of V3, a faster one, the auxiliary loss, nothing.

Every run is a `qiusuo train` of its own, in a run folder that stays. What is finished is not run
again and what was interrupted goes on, so the same command can be given until all is done. All
variants of one seed are trained before the next seed begins. Seconds of a clock are only comparable
where runs had the machine to themselves, so costs are told in FLOPs, and beside them in seconds of
processor time. `--quick` is a smoke of the
whole in about a minute; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ablation_page import write_page
from ablation_readings import beside, draft_acceptance, read_run
from ablation_tables import markdown, tables
from ablation_variants import LOOKS, Variant, recipes, variants
from qiusuo.runs.durable import write_json
from qiusuo.runs.folder import read_recipe as stored_recipe
from qiusuo.runs.folder import read_status
from qiusuo.runs.words import format_duration
from qiusuo.training.recipe import parse_recipe, read_recipe

QUICK_VARIANTS = ["moe", "dense-active", "mha", "mtp"]
QUICK_TOKENS = 1024  # of a validation


@dataclass(frozen=True)
class Job:
    """One run: a variant with a seed, so many steps, and where."""

    variant: Variant
    seed: int
    steps: int
    run: Path
    quick: bool

    @property
    def changes(self) -> list[str]:
        """What ``--set`` is given."""
        stage = [f"steps={self.steps}", f"validation_steps={max(1, self.steps // LOOKS)}"]
        if self.quick:
            stage.append(f"validation_tokens={QUICK_TOKENS}")
        return [
            f"seed={self.seed}",
            *(f"stages.0.{change}" for change in stage),
            *self.variant.changes,
        ]

    @property
    def finished(self) -> bool:
        return self.run.exists() and read_status(self.run).get("state") == "finished"


def main() -> None:
    options = parse()
    chosen = [variant for variant in variants().values() if variant.name in options.variants]
    options.folder.mkdir(parents=True, exist_ok=True)
    for family, text in recipes().items():
        (options.folder / f"{family}.toml").write_text(text, encoding="utf-8")
    jobs = [job(options, variant, seed) for seed in options.seeds for variant in chosen]
    for one in jobs:
        refuse_other_recipe(one, options.folder)
    if not options.report_only:
        train_all(jobs, options.folder)
    finished = [one for one in jobs if one.finished]
    if not finished:
        sys.exit(f"no run in {options.folder} is finished: there is nothing to report")
    report(finished, len(jobs), options.folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="of the runs and the report")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=400, help=f"of 2,048 tokens; at least {LOOKS}")
    parser.add_argument("--variants", nargs="+", choices=list(variants()), default=list(variants()))
    parser.add_argument("--quick", action="store_true", help="a smoke: few runs of few steps")
    parser.add_argument("--report-only", action="store_true", help="of what is finished")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps, options.variants = [1], LOOKS, QUICK_VARIANTS
    if options.steps < LOOKS:
        parser.error(f"--steps must be at least {LOOKS}, one for each validation")
    return options


def job(options: argparse.Namespace, variant: Variant, seed: int) -> Job:
    steps = round(options.steps * variant.share)
    run = options.folder / f"{variant.name}-{seed}"
    return Job(variant, seed, steps, run, options.quick)


def refuse_other_recipe(one: Job, folder: Path) -> None:
    """A folder of other runs is not gone on with: half of a comparison would be another's."""
    if not (one.run / "recipe.toml").is_file():
        return
    asked = read_recipe(folder / f"{one.variant.family}.toml", one.changes)
    if parse_recipe(stored_recipe(one.run)) != asked:
        sys.exit(f"{one.run} was trained by another recipe: give another --folder, or its --steps")


def train_all(jobs: list[Job], folder: Path) -> None:
    """Train what is not finished, telling how far it is and how long it will take."""
    waiting = [one for one in jobs if not one.finished]
    began, steps_done = time.perf_counter(), 0
    for number, one in enumerate(waiting):
        place = f"[{len(jobs) - len(waiting) + number + 1}/{len(jobs)}]"
        print(f"{place} {one.variant.name}, seed {one.seed} ...", file=sys.stderr, flush=True)
        train(one, folder)
        steps_done += one.steps
        spent = time.perf_counter() - began
        left = spent / steps_done * sum(other.steps for other in waiting[number + 1 :])
        reading = read_run(one.run, one.variant.name, one.seed)
        print(
            f"{place} {one.variant.name}, seed {one.seed}: loss {reading.final_loss:.4f}, "
            f"{reading.seconds[-1]:.0f} s of training, {reading.tokens_per_second:,.0f} tokens/s; "
            f"{format_duration(spent)} so far, about {format_duration(left)} left",
            file=sys.stderr,
            flush=True,
        )


def train(one: Job, folder: Path) -> None:
    """One child process to the end; its seconds of processor time are kept beside the run."""
    command = [sys.executable, "-m", "qiusuo", "train"]
    if (one.run / "recipe.toml").is_file():
        command += ["--resume", "--run", str(one.run)]
    else:
        command += [str(folder / f"{one.variant.family}.toml"), "--run", str(one.run)]
        command += [word for change in one.changes for word in ("--set", change)]
    log = beside(one.run, "output")
    with log.open("ab") as output:
        before = os.times()
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        stopped = False
        try:
            code = child.wait()
        except KeyboardInterrupt:
            stopped = True
            code = child.wait()  # the terminal told it too: it finishes its step and saves
    after = os.times()
    spent = after.children_user - before.children_user
    spent += after.children_system - before.children_system
    kept = beside(one.run, "cpu.json")
    earlier = json.loads(kept.read_text()) if kept.is_file() else []
    write_json(kept, [*earlier, spent])
    if stopped:
        sys.exit("stopped and saved: the same command goes on")
    if code:
        tail = log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
        sys.exit(f"{one.run} did not finish (exit code {code}); its last words:\n{tail}")


def report(finished: list[Job], wanted: int, folder: Path) -> None:
    """Tables to the terminal, and everything into results.json and report.html."""
    readings = [read_run(one.run, one.variant.name, one.seed) for one in finished]
    drafts = {
        (one.variant.name, one.seed): draft_acceptance(one.run)
        for one in finished
        if one.variant.name == "mtp"
    }
    told = tables(readings, drafts)
    for table in told:
        print(markdown(table))
    missing = wanted - len(finished)
    write_json(
        folder / "results.json",
        {
            "missing_runs": missing,
            "runs": [reading.record() for reading in readings],
            "draft_acceptance": {f"{name}-{seed}": v for (name, seed), v in drafts.items()},
            "tables": [table.record() for table in told],
        },
    )
    page = write_page(folder, readings, told, missing)
    print(f"{len(finished)} of {wanted} runs are finished. Report: {page}")


if __name__ == "__main__":
    main()
