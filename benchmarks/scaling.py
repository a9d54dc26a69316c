"""A training step in one process and in several: what N of them gain, and where their time goes.

    .venv/bin/python benchmarks/scaling.py [--nproc 1 2] [--threads 1] [--rounds 5] [--out FILE]

The steps are those of `qiusuo bench train`, a recipe's first stage on random tokens, and the batch
is the same for all settings: N processes share it. Every setting runs in processes of its own, and
the settings take turns; a figure is the median of the rounds, and a ratio that of a round's own
figures. Efficiency is the time of one process with as many threads as each of the N has, over N
times theirs. Beside it stands one process with all the threads, because that is what a person
with this machine would choose otherwise.

A step's time is measured without clocks. Then as many steps are taken with clocks on every
collective, each behind a barrier: what a process stands at the barrier is waiting, the rest is the
collective's. What is left of the step is arithmetic, and copies into and out of what is sent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qiusuo.training.parallel.launch import launch
from qiusuo.training.parallel.traffic import CountedAllGather, CountedReduceScatter
from qiusuo.training.parallel.world import Several, join_world
from qiusuo.training.recipe import Recipe, read_recipe
from qiusuo.training.stages import SupervisedStage
from qiusuo.training.step_profile import WARM_UP, random_steps, take_step
from qiusuo.training.supervised import SupervisedSteps

COMPUTE, OPTIMIZER, WAITING = "passes", "optimizer", "waiting"
GATHER, SCATTER, VISITS = "gather", "scatter", "to experts"
EXCHANGE, SUMS = "Muon's exchange", "sums"
PARTS = (COMPUTE, OPTIMIZER, GATHER, SCATTER, VISITS, EXCHANGE, SUMS, WAITING)


@dataclass(frozen=True)
class Setting:
    processes: int
    threads: int  # of each process

    def __str__(self) -> str:
        return f"{self.processes} × {self.threads}"


@dataclass(frozen=True)
class Found:
    """Of one setting in one round: seconds of a step, and of its parts a mean over the processes;
    bytes that all of them sent in a step, counted and foretold."""

    seconds: float
    parts: dict[str, float]
    counted: float
    modelled: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--recipe", default="quickstart", help="a built-in recipe or a file")
    parser.add_argument("--set", action="append", default=[], help="change a key of the recipe")
    parser.add_argument("--nproc", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--precision", choices=("bfloat16", "float32", "fp8", "fp8_ue8m0"))
    parser.add_argument("--batch", type=int, default=32, help="sequences, of all processes")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--expert-parallel", action="store_true")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    recipe = changed(options)
    found: dict[Setting, list[Found]] = defaultdict(list)
    for number in range(options.rounds):
        for setting in settings(options):
            one = measured(setting, recipe, options)
            found[setting].append(one)
            print(f"round {number + 1}, {setting}: {one.seconds * 1e3:.1f} ms", flush=True)
    show(found, options)
    if options.out:
        content = {str(setting): [vars(one) for one in each] for setting, each in found.items()}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def changed(options: argparse.Namespace) -> Recipe:
    """The recipe with the batch, the length and the precision that were asked for."""
    recipe = read_recipe(options.recipe, options.set)
    names = [stage.name for stage in recipe.stages if isinstance(stage, SupervisedStage)]
    if not names:
        raise SystemExit(f"{options.recipe} has no stage of kind pretrain, sft or distil")
    keys = {"batch_size": options.batch, "sequence_length": options.length}
    if options.precision:
        keys["precision"] = options.precision
    sets = [f"stages.{names[0]}.{key}={value}" for key, value in keys.items()]
    return read_recipe(options.recipe, [*options.set, *sets])


def settings(options: argparse.Namespace) -> list[Setting]:
    """One process with the threads of each, one with all threads, and the several."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    several = [Setting(count, options.threads) for count in options.nproc if count > 1]
    return list(dict.fromkeys([Setting(1, options.threads), Setting(1, cores or 1), *several]))


# -- in processes of their own ------------------------------------------------------------


def measured(setting: Setting, recipe: Recipe, options: argparse.Namespace) -> Found:
    os.environ["OMP_NUM_THREADS"] = str(setting.threads)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        shared = options.expert_parallel and setting.processes > 1
        launch(setting.processes, measure, recipe, options.steps, shared, out, tell=print)
        return Found(**json.loads(out.read_text(encoding="utf-8")))


def measure(recipe: Recipe, steps: int, expert_parallel: bool, out: Path) -> int:
    """In one of the processes. The first writes what was found."""
    torch.set_flush_denormal(True)
    with join_world("cpu", expert_parallel) as (world, device):
        work = random_steps(recipe, device, world)
        for _ in range(WARM_UP):
            take_step(work)
        world.traffic.take()
        plain, modelled = [], 0.0
        for _ in range(steps):
            began = time.perf_counter()
            result = take_step(work)
            plain.append(time.perf_counter() - began)
            modelled = result.more.get("communication_bytes_modelled", 0.0)
        counted = world.traffic.take() / steps
        timed = []
        with clocks(work) as clock:
            for _ in range(steps):
                began = time.perf_counter()
                take_step(work)
                clock[COMPUTE] += time.perf_counter() - began
                timed.append([clock.pop(part, 0.0) for part in PARTS])
        parts = [statistics.median(each) for each in zip(*timed, strict=True)]
        told = torch.tensor([*parts, counted], dtype=torch.float64)
        *parts, sent = world.sum(told).tolist()
        if world.leads:
            mean = {part: each / world.size for part, each in zip(PARTS, parts, strict=True)}
            found = Found(statistics.median(plain), mean, sent, modelled)
            out.write_text(json.dumps(vars(found)), encoding="utf-8")
    return 0


@contextmanager
def clocks(work: SupervisedSteps) -> Iterator[dict[str, float]]:
    """Seconds by part, as they go by within. What is told apart is taken from what it is a part
    of, so that the parts add up to the step."""
    seconds: dict[str, float] = defaultdict(float)
    optimizing = False

    def add(part: str, taken: float) -> None:
        seconds[part] += taken
        seconds[OPTIMIZER if optimizing else COMPUTE] -= taken

    def timed(function: Callable[..., Any], part: Callable[[], str]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            dist.barrier()
            met = time.perf_counter()
            result = function(*given, **named)
            add(WAITING, met - began)
            add(part(), time.perf_counter() - met)
            return result

        return run

    def apply_gradients(loss: float) -> float:
        nonlocal optimizing
        began, optimizing = time.perf_counter(), True
        norm = type(work).apply_gradients(work, loss)
        optimizing = False
        add(OPTIMIZER, time.perf_counter() - began)
        return norm

    with ExitStack() as stack:
        stack.callback(setattr, work, "apply_gradients", work.apply_gradients)
        work.apply_gradients = apply_gradients  # type: ignore[method-assign]
        if work.world.size > 1:
            each: list[tuple[type, str, Callable[[], str]]] = [
                (CountedAllGather, "__call__", lambda: GATHER),
                (CountedReduceScatter, "__call__", lambda: SCATTER),
                (Several, "exchange", lambda: EXCHANGE if optimizing else VISITS),
                (Several, "sum", lambda: SUMS),
            ]
            for owner, name, part in each:
                function = getattr(owner, name)
                stack.callback(setattr, owner, name, function)
                setattr(owner, name, timed(function, part))
        yield seconds


# -- what was found -----------------------------------------------------------------------


def show(found: dict[Setting, list[Found]], options: argparse.Namespace) -> None:
    """Both tables."""
    tokens = options.batch * options.length
    one, whole = settings(options)[0], settings(options)[:2][-1]
    print(
        f"\n{options.recipe}, {options.batch} × {options.length} tokens a step\n\n"
        "| processes × threads | ms a step | tokens/s | efficiency | "
        f"times {whole} | MB a step | modelled |\n" + "| --- " * 7 + "|"
    )
    for setting, each in found.items():
        own = statistics.median(f.seconds for f in each)
        share = _ratio(found[one], each) / setting.processes
        against = _ratio(found[whole], each)
        counted, modelled = (statistics.median(x) / 1e6 for x in _sent(each))
        efficiency = f"{share:.0%}" if setting.threads == one.threads else "–"
        sent = f"{counted:.2f} | {modelled:.2f}" if setting.processes > 1 else "– | –"
        print(
            f"| {setting} | {own * 1e3:.1f} | {tokens / own:,.0f} | {efficiency} | "
            f"{against:.2f} | {sent} |"
        )
    shown = [part for part in PARTS if any(f.parts[part] for each in found.values() for f in each)]
    print(f"\n| ms, with clocks | {' | '.join(shown)} | together |")
    print("| --- " * (len(shown) + 2) + "|")
    for setting, each in found.items():
        parts = [statistics.median(f.parts[part] for f in each) * 1e3 for part in shown]
        print(f"| {setting} | {' | '.join(f'{p:.1f}' for p in parts)} | {sum(parts):.1f} |")


def _ratio(base: list[Found], each: list[Found]) -> float:
    """How many times as fast as ``base``."""
    pairs = zip(base, each, strict=True)
    return statistics.median(other.seconds / own.seconds for other, own in pairs)


def _sent(each: list[Found]) -> tuple[list[float], list[float]]:
    return [f.counted for f in each], [f.modelled for f in each]


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keep the docstring's lines."""


if __name__ == "__main__":
    from scaling import main  # the name by which the processes find what they shall do

    main()
