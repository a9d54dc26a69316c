"""`qiusuo plan`: words for what a training run would take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qiusuo.model.config import ModelConfig
    from qiusuo.training.planning import Plan

ASSUMED_SHARE = 0.4
SEQUENCE = 4096  # as V3's pre-training


def plan(
    model: Annotated[
        str, typer.Argument(help="A model, a run, a .gguf file, a config.json or a recipe.")
    ],
    tokens: Annotated[str, typer.Option(help="To train on: 14.8T, 300B, 2.5M.")] = "1T",
    device: Annotated[str, typer.Option(help="h800, h100, a100; measured: this CPU.")] = "h800",
    devices: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    share: Annotated[
        float | None, typer.Option(help="Of a device's bf16 peak; without it 0.4 is assumed.")
    ] = None,
    hours: Annotated[
        str | None, typer.Option(help="Device hours it took: says the share that they imply.")
    ] = None,
    sequence: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a sequence; without it 4096, or the model's most."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences of a step; without it eight of each device."),
    ] = None,
    micro_batch: Annotated[int, typer.Option(min=1, help="Sequences of one pass.")] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="Stages the layers are divided into.")] = 1,
    expert: Annotated[int, typer.Option(min=1, help="Devices a layer's experts lie on.")] = 1,
    precision: Annotated[str, typer.Option(help="Of matrix products: fp8 or bfloat16.")] = (
        "bfloat16"
    ),
    recompute: Annotated[
        str, typer.Option(help="parts (norms and up-projections, as V3) or layers (all of them).")
    ] = "parts",
    mtp: Annotated[bool, typer.Option(help="Count the MTP modules' arithmetic.")] = True,
) -> None:
    """Say what training a model would take: device hours, memory, traffic, checkpoints."""
    from qiusuo.terminal import find_config
    from qiusuo.training import planning
    from qiusuo.training.layout import Layout, checked_choice

    if share is not None and hours is not None:
        raise planning.PlanError("give --share or --hours: one follows from the other")
    config, _ = find_config(model)
    found = planning.find_device(device)
    count = planning.read_count(tokens, "--tokens")
    layout = Layout(
        devices=devices,
        batch=batch or 8 * micro_batch * devices,
        sequence_length=sequence or min(SEQUENCE, config.max_position_embeddings),
        pipeline=pipeline,
        expert=expert,
        micro_batch=micro_batch,
        precision=checked_choice("--precision", precision, ("fp8", "bfloat16")),
        recompute=checked_choice("--recompute", recompute, ("parts", "layers")),
    )
    known = "assumed" if share is None else "as given"
    if hours is not None:
        spent = planning.read_count(hours, "--hours")
        share = planning.implied_share(config, found, layout, count, spent, mtp)
        known = "implied by the hours"
    share = ASSUMED_SHARE if share is None else share
    _show(config, planning.plan(config, found, layout, count, share, mtp), known)


def _show(config: ModelConfig, plan: Plan, known: str) -> None:
    """What a training run would take. ``known``: where its share of the peak comes from."""
    from rich.console import Console

    from qiusuo.terminal import plain_table

    table = plain_table()
    for label, text in (*_run_rows(config, plan, known), *_device_rows(plan)):
        table.add_row(label, text)
    Console().print(table)


def _run_rows(config: ModelConfig, plan: Plan, known: str) -> Iterator[tuple[str, str]]:
    """The model, and the whole run."""
    from qiusuo.runs.words import format_duration, format_large, format_number

    cost, device, layout = plan.cost, plan.device, plan.layout
    hours, trillions = plan.device_hours, plan.tokens / 1e12
    mtp = f", and {format_large(cost.mtp_parameters)} of MTP" if cost.mtp_parameters else ""
    yield (
        "Model",
        f"{config.model_type}, {config.num_hidden_layers} layers, {format_large(cost.parameters)} "
        f"parameters, {format_large(cost.active)} active{mtp}",
    )
    yield (
        "Arithmetic of a token",
        f"{format_number(plan.flops_per_token / 1e9)} GFLOPs forward and backward, in "
        f"{layout.sequence_length:,} tokens of causal attention",
    )
    yield "Of the run", f"{plan.flops:.3g} FLOPs for {format_large(plan.tokens)} tokens"
    yield "Device", f"{device.name}, {device.bf16 / 1e12:,.4g} TFLOP/s in bf16"
    of_fp8 = f", {plan.share * device.bf16 / device.fp8:.1%} of fp8's" if device.fp8 else ""
    rate = f"{format_large(plan.token_rate)} tokens/s a device"
    yield "Share of its peak", f"{plan.share:.1%}{of_fp8} ({known}): {rate}"
    each = f"{format_large(hours / trillions)} a trillion tokens"
    yield "Device hours", f"{format_large(hours)}, {each}"
    each = f"{format_duration(plan.seconds / trillions)} a trillion tokens"
    yield "Time", f"{format_duration(plan.seconds)} on {layout.devices:,} of them, {each}"
    yield (
        "A step",
        f"{layout.batch:,} sequences, {format_large(layout.step_tokens)} tokens: "
        f"{_short(plan.step_seconds)}",
    )


def _device_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """What one device holds and sends, and what lies on the disk."""
    from qiusuo.runs.words import format_bytes

    need, sent, fast = plan.memory, plan.traffic, plan.device.network
    parts = ("weights", "gradients", "optimizer", "activations")
    listed = ", ".join(f"{part} {format_bytes(getattr(need, part))}" for part in parts)
    verdict = "fits" if need.total < plan.device.memory else "does not fit"
    room = format_bytes(plan.device.memory)
    yield "Memory a device", f"{format_bytes(need.total)} of {room}: {verdict} ({listed})"
    if plan.layout.devices > 1:
        yield (
            "Sent a step, by each",
            f"to experts {format_bytes(sent.experts)} (between machines at most "
            f"{format_bytes(sent.between_nodes)}), to other stages {format_bytes(sent.pipeline)}, "
            f"gradients and weights {format_bytes(sent.data)}",
        )
        if plan.network_seconds is not None and fast is not None:
            yield (
                "Between machines",
                f"{_short(plan.network_seconds)} of a step at {format_bytes(fast)}/s, beside "
                f"{_short(plan.step_seconds)} of arithmetic",
            )
    in_bf16, in_fp8 = map(plan.cost.weight_bytes, ("bfloat16", "fp8 (128×128 blocks)"))
    yield (
        "Checkpoint",
        f"{format_bytes(in_bf16)} in bf16, {format_bytes(in_fp8)} in fp8; to train on from: "
        f"{format_bytes(plan.state_bytes)}",
    )


def _short(seconds: float) -> str:
    """A time of a step, mostly of seconds: "19.9 s", "0.42 ms"."""
    from qiusuo.runs.words import format_number

    return f"{format_number(seconds, 3)} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
