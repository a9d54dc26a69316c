"""What the terminal knows about a training: the latest numbers, as the log has them, and the time
left of the stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qiusuo.runs.outcomes import in_order, measure_name, share
from qiusuo.runs.series import is_number
from qiusuo.runs.words import format_duration, format_large, format_number

_MOST_HISTORY = 512
_MOST_TASKS = 4  # named of a look at problems
_KNOWN = {"step", "loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "tokens", "seconds"}
_KNOWN |= {"tokens_per_second", "flops_per_second", "peak_share"}
_KNOWN |= {"communication_bytes", "communication_bytes_modelled", "minutes"}


class Progress:
    """Takes in log records and answers in words; knows nothing of terminals.

    `history` is of the loss, or of the reward while a stage of reinforcement trains:
    there `rollout` is the latest rollout record, and the loss (of the policy) says little.
    """

    def __init__(self, total: int, title: str, start_step: int, now: float) -> None:
        self.total, self.title = total, title
        self.step = self._start_step = start_step
        self.history: list[float] = []
        self.loss: float | None = None
        self.mtp_loss: float | None = None
        self.rollout: dict[str, Any] = {}
        self.validation: dict[str, Any] = {}
        self.sample: tuple[str, str] | tuple[()] = ()
        self.others: dict[str, float] = {}
        self._record: dict[str, Any] = {}
        self._began = self._stepped = now
        self._merged, self._pending = 1, [0.0, 0]
        self._violation: float | None = None

    def add(self, record: Mapping[str, Any], now: float) -> None:
        """Take in one log record, seen at `now` seconds."""
        kind = record.get("kind", "step")
        if kind == "validation":
            self.validation = dict(record)
        elif kind == "sample":
            self.sample = (str(record.get("prompt", "")), str(record.get("continuation", "")))
        elif kind == "rollout":
            self._add_rollout(record, now)
        elif kind == "step":
            self._add_step(record, now)

    def _add_step(self, record: Mapping[str, Any], now: float) -> None:
        self.step, self._stepped = int(record["step"]), now
        self._record = dict(record)
        if self.rollout and record.get("stage") != self.rollout.get("stage"):
            self.rollout = {}  # a stage of another kind has begun
            self._begin_history()
        if self.rollout:
            self.loss = None
        elif is_number(record.get("loss")):
            self.loss = float(record["loss"])
            self._remember(self.loss)
        if is_number(record.get("mtp_loss")):
            self.mtp_loss = float(record["mtp_loss"])
        if record.get("max_violation"):
            self._violation = max(record["max_violation"])
        fresh = {k: v for k, v in record.items() if is_number(v) and k not in _KNOWN}
        self.others = dict(list(fresh.items())[:4])

    def _add_rollout(self, record: Mapping[str, Any], now: float) -> None:
        self.step, self._stepped = int(record["step"]), now
        if not self.rollout:
            self.loss = self.mtp_loss = None
            self._begin_history()
        self.rollout = dict(record)
        if is_number(record.get("reward")):
            self._remember(float(record["reward"]))

    def _begin_history(self) -> None:
        self.history, self._merged, self._pending = [], 1, [0.0, 0]

    def _remember(self, value: float) -> None:
        """Keep the whole history in a bounded list: when it is full, neighbours merge."""
        self._pending[0] += value
        self._pending[1] += 1
        if self._pending[1] < self._merged:
            return
        self.history.append(self._pending[0] / self._pending[1])
        self._pending = [0.0, 0]
        if len(self.history) >= _MOST_HISTORY:
            pairs = zip(self.history[::2], self.history[1::2], strict=True)
            self.history = [(a + b) / 2 for a, b in pairs]
            self._merged *= 2

    def elapsed(self, now: float) -> float:
        """Seconds since the view was made."""
        return now - self._began

    def seconds_left(self, now: float) -> float | None:
        """Seconds to the last step at the pace so far, or to the end of the minutes that the stage
        has, where these are not steps yet; None before there is a pace."""
        done = self.step - self._start_step
        if done < 2 or self._stepped <= self._began:
            return None
        spent = self._stepped - self._began
        left = (self.total - self.step) * spent / done
        if is_number(self._record.get("minutes")):
            left = min(left, 60 * self._record["minutes"] - spent)
        return max(left - (now - self._stepped), 0.0)

    def rollout_words(self) -> str:
        """The latest rollouts but for their reward: pass@1 and pass@k, length, entropy."""
        r, parts = self.rollout, []
        if is_number(r.get("pass_at_1")):
            parts.append(f"pass@1 {share(r['pass_at_1'])}")
        if is_number(r.get("pass_at_k")):
            parts.append(f"pass@{r.get('k', 'k')} {share(r['pass_at_k'])}")
        if is_number(r.get("length")):
            parts.append(f"length {format_number(r['length'], 3)}")
        if is_number(r.get("entropy")):
            parts.append(f"entropy {format_number(r['entropy'], 3)}")
        return "  ".join(parts)

    def validation_words(self) -> str:
        """The last validation: accuracies by task, or bits per character and loss; and, if it is
        past, its step."""
        parts = []
        tasks = self.validation.get("tasks") or {}
        for task in in_order(list(tasks))[:_MOST_TASKS]:
            for measure in ("accuracy", "pass_at_1"):
                if is_number(tasks[task].get(measure)):
                    name = "" if measure == "accuracy" else f"{measure_name(measure)} "
                    parts.append(f"{task} {name}{share(tasks[task][measure])}")
                    break
        if len(tasks) > _MOST_TASKS:
            parts.append(f"and {len(tasks) - _MOST_TASKS} more")
        if is_number(self.validation.get("bits_per_character")):
            parts.append(f"{self.validation['bits_per_character']:.4f} bits/char.")
        if is_number(self.validation.get("loss")):
            parts.append(f"loss {self.validation['loss']:.4f}")
        if is_number(self.validation.get("tokens")):
            parts.append(f"over {self.validation['tokens']:,} tokens")
        if self.validation.get("step", self.step) != self.step:
            parts.append(f"at step {self.validation['step']:,}")
        return "  ".join(parts)

    def speed_words(self) -> str:
        """Tokens a second, the share of the machine's peak, tokens so far."""
        r, parts = self._record, []
        if is_number(r.get("tokens_per_second")):
            parts.append(f"{format_large(r['tokens_per_second'])} tokens/s")
        if is_number(r.get("peak_share")):
            parts.append(f"{r['peak_share']:.0%} of peak")
        if is_number(r.get("tokens")):
            parts.append(f"{format_large(r['tokens'])} tokens")
        return "  ".join(parts)

    def balance_words(self) -> str:
        """The worst layer's MaxVio, and what it means."""
        if self._violation is None:
            return ""
        if not math.isfinite(self._violation):
            return "MaxVio is not finite"
        return f"MaxVio {self._violation:.2f}: the busiest has {1 + self._violation:.1f}× its share"

    def lr_words(self) -> str:
        """The learning rate and the gradient's norm."""
        r, parts = self._record, []
        if is_number(r.get("lr")):
            parts.append(f"lr {r['lr']:.2e}")
        if is_number(r.get("grad_norm")):
            parts.append(f"gradient norm {format_number(r['grad_norm'], 3)}")
        return "  ".join(parts)

    def plan(self) -> str:
        """The steps to take: how many, or which ones where others were before."""
        if not self._start_step:
            return f"{self.total:,} steps"
        if self._start_step >= self.total:
            return f"all {self.total:,} steps are done"
        return f"steps {self._start_step + 1:,} to {self.total:,}"

    def place(self) -> str:
        """The step of how many."""
        return f"step {self.step:,}/{self.total:,}"

    def line(self, now: float) -> str:
        """Everything on one plain line."""
        parts = [self.place()]
        if is_number(self.rollout.get("reward")):
            parts.append(f"reward {self.rollout['reward']:.3f}")
        if self.rollout_words():
            parts.append(self.rollout_words())
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.mtp_loss is not None:
            parts.append(f"MTP {self.mtp_loss:.4f}")
        parts += [f"{name} {format_number(value)}" for name, value in self.others.items()]
        parts += [words for words in (self.lr_words(), self.speed_words()) if words]
        if self._violation is not None:
            parts.append(f"MaxVio {self._violation:.2f}")
        left = self.seconds_left(now)
        if left is not None and self.step < self.total:
            parts.append(f"{format_duration(left)} left of this stage")
        return "  ".join(parts)
