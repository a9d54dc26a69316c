"""The programs that `cpu_inference.py` compares, each measured in a process of its own.

Every figure is a rate in tokens a second but for

    start      seconds from the call that loads to the first token of a prompt of one token
    launch     the same from the start of the process: the interpreter and its imports too
    peak       the process's high-water mark (VmHWM) after a context of 4,096, bytes
    before     what stood in memory before loading, bytes

A Python program runs here as ``cpu_inference.py --child``; llama.cpp is measured with its own
llama-bench and llama-batched-bench, which draw no tokens. Ours draws them greedily, and that time
counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SHORT, DECODE = 32, 64  # tokens of context before, tokens answered
LONG_DECODE = 16  # after a long prompt
SEQUENCES, BESIDE, BESIDE_DECODE = 16, 64, 32  # at once, tokens of each prompt and of each answer
FIRST, SECOND, LONGEST = 512, 4096, 16384  # tokens of the longer prompts
PARTS = ("start", "decode", "prefill", "long", "longest", "sixteen")
Figures = dict[str, float]


@dataclass(frozen=True)
class Took:
    """Seconds until every sequence had its first token, and of the passes after that."""

    first: float
    rest: float


# -- Python programs ----------------------------------------------------------------------


class Qiusuo:
    def __init__(self, model: Path, cache: str | None = None) -> None:
        import qiusuo
        from qiusuo.checkpoint.open import open_checkpoint
        from qiusuo.engine.limits import Limits
        from qiusuo.engine.paged_cache import PAGE_TOKENS, PagedCache

        config = open_checkpoint(model).config
        tokens = min(LONGEST + 4 * DECODE, config.max_position_embeddings)
        page = PagedCache.page_bytes(config, torch.bfloat16, cache=cache)
        room = (-(-tokens // PAGE_TOKENS) + 2 * SEQUENCES) * page
        self.lm = qiusuo.load(model, draft="none", limits=Limits(cache_bytes=room), cache=cache)

    def answer(self, prompts: list[list[int]], passes: int, keep_experts: bool = False) -> Took:
        from qiusuo.engine.request import Request
        from qiusuo.engine.sampling import Sampling

        engine, sampling = self.lm.engine, Sampling(max_tokens=2048, ignore_eos=True)
        began = time.perf_counter()
        self.sequences = [
            engine.submit(Request(tuple(prompt), sampling, keep_experts=keep_experts))[0]
            for prompt in prompts
        ]
        while min(sequence.answered for sequence in self.sequences) == 0:
            engine.step()
        middle = time.perf_counter()
        for _ in range(passes):
            engine.step()
        ended = time.perf_counter()
        for sequence in self.sequences:
            engine.cancel(sequence)
        return Took(middle - began, ended - middle)

    def touched(self, prompts: list[list[int]], passes: int) -> float:
        """How many of a layer's experts one pass of all sequences uses, on average."""
        self.answer(prompts, passes, keep_experts=True)
        chosen = [s.experts_between(s.routed - passes, s.routed) for s in self.sequences]
        choices_NLBK = torch.stack(chosen, 2)
        of_passes = choices_NLBK.flatten(2).flatten(0, 1)
        return sum(len(experts.unique()) for experts in of_passes) / len(of_passes)


class Transformers:
    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, experts_implementation="grouped_mm"
        )

    @torch.inference_mode()
    def answer(self, prompts: list[list[int]], passes: int) -> Took:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        began = time.perf_counter()
        tokens = self._next(torch.tensor(prompts), cache)
        middle = time.perf_counter()
        for _ in range(passes):
            tokens = self._next(tokens, cache)
        return Took(middle - began, time.perf_counter() - middle)

    def _next(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        out = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        chosen: torch.Tensor = out.logits[:, -1].argmax(-1, keepdim=True)
        return chosen


PYTHON: dict[str, Callable[[Path], Any]] = {"qiusuo": Qiusuo, "transformers": Transformers}


def measure_here(options: argparse.Namespace) -> None:
    """In the child: one line of JSON, the figures."""
    torch.set_num_threads(options.threads)
    if options.child == "transformers":
        import transformers  # noqa: F401  its import is not part of loading
    else:
        import qiusuo.engine.loading  # noqa: F401
    parts, figures = set(options.parts), {"before": float(status("VmRSS"))}
    began = time.perf_counter()
    more = {"cache": options.cache} if options.child == "qiusuo" else {}
    program = PYTHON[options.child](options.models, **more)
    program.answer([prompt_of(1, options.seed)], 0)
    figures["start"] = time.perf_counter() - began
    figures["launch"] = time.time() - options.launched
    number = iter(range(options.seed + 1, options.seed + 1000))

    def answered(tokens: int, passes: int, sequences: int = 1) -> Took:
        # Another prompt each time: no program may know its beginning.
        prompts = [prompt_of(tokens, next(number)) for _ in range(sequences)]
        took: Took = program.answer(prompts, passes)
        return took

    if "decode" in parts:
        answered(SHORT, 4)  # llama-bench warms up as well
        figures["decode"] = DECODE / answered(SHORT, DECODE).rest
    if "prefill" in parts:
        answered(SHORT, 0)
        figures[f"prefill {FIRST}"] = FIRST / answered(FIRST, 0).first
    for part, tokens in (("long", SECOND), ("longest", LONGEST)):
        if part == "longest":
            figures["peak"] = status("VmHWM")
        if part in parts:
            took = answered(tokens, LONG_DECODE)
            figures[f"prefill {tokens}"] = tokens / took.first
            figures[f"decode at {tokens}"] = LONG_DECODE / took.rest
    if "sixteen" in parts:
        answered(BESIDE, 2, SEQUENCES)
        took = answered(BESIDE, BESIDE_DECODE, SEQUENCES)
        figures["sixteen"] = SEQUENCES * BESIDE_DECODE / took.rest
        if isinstance(program, Qiusuo):
            prompts = [prompt_of(BESIDE, next(number)) for _ in range(SEQUENCES)]
            figures["touched"] = program.touched(prompts, BESIDE_DECODE)
    print(json.dumps(figures), flush=True)


def prompt_of(tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 32000, (tokens,), generator=generator).tolist()


def python_figures(program: str, model: Path, options: argparse.Namespace, seed: int) -> Figures:
    command = [sys.executable, str(Path(__file__).with_name("cpu_inference.py"))]
    command += ["--child", program, "--models", str(model), "--threads", str(options.threads)]
    command += ["--seed", str(seed), "--launched", str(time.time())]
    command += ["--cache", options.cache] if options.cache else []
    lines, _, _ = run([*command, "--parts", *options.parts], options.threads)
    return dict(json.loads(lines[-1]))


# -- llama.cpp ----------------------------------------------------------------------------


def llama_figures(model: Path, options: argparse.Namespace) -> Figures:
    """By its own programs. Where it is asked for a long context, its prompt's rate is measured
    apart from the answer's, as llama-bench does."""
    bench = [str(options.llama_cpp / "llama-bench"), "-m", str(model), "-o", "jsonl", "-r", "1"]
    bench += ["-t", str(options.threads), "-fa", options.flash_attention]
    parts, figures = set(options.parts), Figures()
    peaks = []

    def asked(*more: object) -> list[dict[str, Any]]:
        lines, peak, seconds = run([*bench, *map(str, more)], options.threads)
        peaks.append(peak)
        figures.setdefault("start", seconds)  # the first of all does nothing else
        return [json.loads(line) for line in lines if line.startswith("{")]

    asked("-p", 0, "-n", 1, "--no-warmup")
    figures["launch"] = figures["start"]
    depths = [SHORT] * ("decode" in parts) + [SECOND] * ("long" in parts)
    for depth in depths:
        count = DECODE if depth == SHORT else LONG_DECODE
        [line] = asked("-p", 0, "-n", count, "-d", depth)
        figures["decode" if depth == SHORT else f"decode at {depth}"] = line["avg_ts"]
    prompts = [SHORT] + [FIRST] * ("prefill" in parts) + [SECOND] * ("long" in parts)
    if len(prompts) > 1:  # the shortest is the warm-up
        for line in asked("-p", ",".join(map(str, prompts)), "-n", 0, "--no-warmup")[1:]:
            figures[f"prefill {line['n_prompt']}"] = line["avg_ts"]
    figures["peak"] = max(peaks)
    if "longest" in parts:
        [line] = asked("-p", 0, "-n", LONG_DECODE, "-d", LONGEST)
        figures[f"decode at {LONGEST}"] = line["avg_ts"]
    if "sixteen" in parts:
        figures["sixteen"] = _batched(model, options)
    return figures


def _batched(model: Path, options: argparse.Namespace) -> float:
    command = [options.llama_cpp / "llama-batched-bench", "-m", model, "-t", options.threads]
    command += ["-npp", BESIDE, "-ntg", BESIDE_DECODE, "-npl", SEQUENCES]
    command += ["-c", SEQUENCES * (BESIDE + BESIDE_DECODE), "-fa", options.flash_attention]
    command += ["--output-format", "jsonl"]
    lines, _, _ = run(list(map(str, command)), options.threads)
    [line] = [json.loads(line) for line in lines if line.startswith("{")]
    return float(line["speed_tg"])


# -- processes ----------------------------------------------------------------------------


def run(command: list[str], threads: int) -> tuple[list[str], int, float]:
    """Lines printed, high-water mark of memory, seconds to the first line."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        peak, faults = _Peak(child.pid), _Drain(child.stderr)
        lines, seconds = [], 0.0
        for line in child.stdout:
            seconds = seconds or time.perf_counter() - began
            lines.append(line)
    faults.join()
    if child.returncode or not lines:
        shown = " ".join(command)
        raise SystemExit(f"{shown}\nended with {child.returncode}:\n{faults.text[-3000:]}")
    return lines, peak.stopped(), seconds


class _Peak(threading.Thread):
    """Looks at a process until it is gone: what the kernel tells afterwards (ru_maxrss) would
    have this process's own memory in it, from before the program was begun."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.process, self.peak = process, 0
        self.start()

    def run(self) -> None:
        try:
            while mark := status("VmHWM", self.process):
                self.peak = mark
                time.sleep(0.02)
        except (OSError, ValueError):
            pass

    def stopped(self) -> int:
        self.join()
        return self.peak


class _Drain(threading.Thread):
    """What a program complains of, read as it comes: a full pipe would stop it."""

    def __init__(self, stream: Iterator[str]) -> None:
        super().__init__(daemon=True)
        self.stream, self.text = stream, ""
        self.start()

    def run(self) -> None:
        for line in self.stream:
            self.text = (self.text + line)[-10_000:]


def status(key: str, process: int | str = "self") -> int:
    """Bytes that the kernel tells of a process; 0 once it has ended."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0
