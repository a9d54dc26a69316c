"""What training a model would take: arithmetic, device hours, memory, traffic, checkpoints.

The arithmetic of a token is exact (model/cost.py); what a device makes of it is one number, the
*share* of its bf16 peak that ends up in the model's products (MFU). It is never known beforehand:
it is assumed, or taken from a run that was measured. ``implied_share`` reads it back from the hours
that a run took. docs/planning.md holds all this to what DeepSeek published.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from qiusuo.model.config import ModelConfig
from qiusuo.model.cost import Cost, available_memory, measure
from qiusuo.runs.words import format_large, format_number
from qiusuo.training.hardware import matmul_peak
from qiusuo.training.layout import Layout, Memory, PlanError, Traffic, memory, state_bytes, traffic

HOUR = 3600.0
MAGNITUDES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Device:
    """Peaks of dense matrix products in operations a second, memory in bytes, and bytes a second
    that it can send to other machines; None where there is none."""

    name: str
    bf16: float
    fp8: float | None
    memory: float
    network: float | None


# Peaks and memory: NVIDIA's data sheets, without sparsity; H800's are H100's. Networks: 50 GB/s in
# DeepSeek's cluster (arXiv:2412.19437 §3.2.2); of H100 and A100 those of DGX machines.
DEVICES = {
    "h800": Device("NVIDIA H800", 989e12, 1979e12, 80e9, 50e9),
    "h100": Device("NVIDIA H100 SXM", 989e12, 1979e12, 80e9, 50e9),
    "a100": Device("NVIDIA A100 80GB", 312e12, None, 80e9, 25e9),
}


@dataclass(frozen=True)
class Plan:
    """Of one run: ``flops_per_token`` forward and backward, ``share`` of the device's bf16 peak."""

    cost: Cost
    device: Device
    layout: Layout
    tokens: float
    share: float
    flops_per_token: float
    memory: Memory
    traffic: Traffic
    state_bytes: float

    @property
    def flops(self) -> float:
        return self.flops_per_token * self.tokens

    @property
    def token_rate(self) -> float:
        """Tokens a second of one device. A forward pass that is computed again is no arithmetic of
        the model, but takes its time."""
        again = 4 / 3 if self.layout.recompute == "layers" else 1.0
        return self.share * self.device.bf16 / self.flops_per_token / again

    @property
    def device_hours(self) -> float:
        return self.tokens / self.token_rate / HOUR

    @property
    def seconds(self) -> float:
        return self.device_hours * HOUR / self.layout.devices

    @property
    def step_seconds(self) -> float:
        return self.layout.step_tokens / self.token_rate / self.layout.devices

    @property
    def network_seconds(self) -> float | None:
        """How long one step's traffic between machines takes, beside the arithmetic or after it."""
        fast = self.device.network
        return None if fast is None else self.traffic.network / fast


def plan(
    config: ModelConfig,
    device: Device,
    layout: Layout,
    tokens: float,
    share: float,
    mtp: bool = True,
) -> Plan:
    """Reckon a run. ``mtp``: count the MTP modules' arithmetic; published shares often leave it
    out. PlanError where the model cannot lie so, or a number is none."""
    if not 0 < share <= 1:
        raise PlanError(f"--share {share:g} must be above 0 and at most 1: a part of the peak")
    if tokens <= 0:
        raise PlanError(f"--tokens {tokens:g} must be above 0")
    layout.check(config)
    cost = measure(config)
    return Plan(
        cost=cost,
        device=device,
        layout=layout,
        tokens=tokens,
        share=share,
        flops_per_token=flops_per_token(cost, layout.sequence_length, mtp),
        memory=memory(config, layout),
        traffic=traffic(config, layout),
        state_bytes=state_bytes(config),
    )


def flops_per_token(cost: Cost, sequence_length: int, mtp: bool = True) -> float:
    """Of a token forward and backward in a sequence of which, being causal, it sees half."""
    return 3.0 * cost.forward_flops(sequence_length / 2, mtp=mtp)


def implied_share(
    config: ModelConfig,
    device: Device,
    layout: Layout,
    tokens: float,
    hours: float,
    mtp: bool = True,
) -> float:
    """The share of the bf16 peak that a run had which took so many device hours. PlanError where
    that is more than all of it."""
    if hours <= 0:
        raise PlanError(f"--hours {hours:g} must be above 0")
    whole = plan(config, device, layout, tokens, 1.0, mtp)
    share = whole.device_hours / hours
    if share > 1:
        raise PlanError(
            f"--hours {hours:g} are too few: {device.name} needs "
            f"{format_number(whole.device_hours)} for {format_large(tokens)} tokens at its "
            "bf16 peak"
        )
    return share


def find_device(name: str) -> Device:
    """A device of the list, or "measured": this machine's processor, its bf16 peak measured now."""
    if name == "measured":
        peak = matmul_peak(torch.bfloat16, "cpu")
        threads = torch.get_num_threads()
        return Device(f"this CPU, {threads} threads", peak, None, available_memory(), None)
    if name.lower() not in DEVICES:
        known = ", ".join([*DEVICES, "measured"])
        raise PlanError(f"--device {name}: expected one of {known}")
    return DEVICES[name.lower()]


def read_count(text: str, option: str) -> float:
    """A number with or without a magnitude: 14.8T, 300B, 2.664M, 180K, 1e12."""
    found = re.fullmatch(r"([0-9][0-9_,]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*([KMBGT]?)", text.strip())
    number = float(re.sub("[_,]", "", found[1])) * MAGNITUDES[found[2]] if found else math.inf
    if not math.isfinite(number):
        raise PlanError(f"{option} {text}: expected a number such as 14.8T, 300B, 2.5M or 1e9")
    return number
