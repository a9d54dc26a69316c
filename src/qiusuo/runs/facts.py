"""What a run folder says about itself, read once for the report and the model card.

Nothing here is invented: a number that no file holds is absent from every sentence and table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qiusuo.runs.durable import read_json
from qiusuo.runs.folder import read_recipe, read_status
from qiusuo.runs.lock import writer_of
from qiusuo.runs.log import read_log
from qiusuo.runs.series import is_number, of_kind, typical
from qiusuo.runs.summary import read_summary
from qiusuo.runs.words import format_duration, format_large, format_number


@dataclass(frozen=True)
class RunFacts:
    """The files of a run folder as values; empty ones where a file is absent."""

    path: Path
    recipe: dict[str, Any]
    environment: dict[str, Any]
    status: dict[str, Any]
    summary: dict[str, Any]
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def title(self) -> str:
        """The recipe's title or name, else the folder's."""
        for key in ("title", "name"):
            if isinstance(self.recipe.get(key), str) and self.recipe[key].strip():
                return str(self.recipe[key])
        return self.path.resolve().name

    @property
    def state(self) -> str:
        """The state last set; "killed" when it says running and no process is."""
        state = str(self.status.get("state", "unknown"))
        return "killed" if state == "running" and writer_of(self.path) is None else state

    @property
    def error(self) -> str | None:
        """What the run failed with, if it failed."""
        return self.status.get("error") if self.state in {"failed", "interrupted"} else None

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The step records."""
        return of_kind(self.records, "step")

    @property
    def validations(self) -> list[dict[str, Any]]:
        """The validation records."""
        return of_kind(self.records, "validation")

    def last(self, key: str) -> float | None:
        """The latest value of the numeric field `key` among the step records."""
        values = (r[key] for r in reversed(self.steps) if is_number(r.get(key)))
        return next(values, None)

    def best_validation(self) -> dict[str, Any] | None:
        """The validation with the lowest finite loss, the earliest of equals."""
        finite = [r for r in self.validations if math.isfinite(r.get("loss", math.nan))]
        return min(finite, key=lambda record: record["loss"], default=None)

    def key_figures(self) -> list[tuple[str, str, str]]:
        """The numbers to read first, as (label, value, unit)."""
        final = self.validations[-1] if self.validations else {}
        share = typical(self.steps, "peak_share")
        candidates: list[tuple[str, float | None, Callable[[float], str], str]] = [
            ("Validation loss", final.get("loss"), format_number, "nats/token"),
            ("Validation", final.get("bits_per_character"), format_number, "bits/char."),
            ("Last training loss", self.last("loss"), format_number, "nats/token"),
            ("Tokens", self.last("tokens"), format_large, ""),
            ("Training time", self.last("seconds"), format_duration, ""),
            ("Typical speed", typical(self.steps, "tokens_per_second"), format_large, "tokens/s"),
            ("Share of peak", share, "{:.1%}".format, ""),
        ]
        return [(a, form(v), unit) for a, v, form, unit in candidates if v is not None]

    def paragraph(self) -> str:
        """The run in a few sentences."""
        sentences = [self._progress()]
        tokens, seconds = self.last("tokens"), self.last("seconds")
        if tokens is not None and seconds is not None:
            sentences.append(
                f"It has trained on {format_large(tokens)} tokens in {format_duration(seconds)}"
                + self.machine()
                + "."
            )
        if self.validations and "loss" in self.validations[-1]:
            first, final = self.validations[0], self.validations[-1]
            words = f"The validation loss is {format_number(final['loss'])} nats per token"
            if "bits_per_character" in final:
                words += f" ({format_number(final['bits_per_character'])} bits per character)"
            if len(self.validations) > 1 and "loss" in first:
                words += f", from {format_number(first['loss'])} at step {first['step']:,}"
            sentences.append(words + ".")
        return " ".join(sentences)

    def _progress(self) -> str:
        step, steps = self.status.get("step", 0), self.status.get("steps", 0)
        where = f" after {step:,} of {steps:,} steps" if steps else f" after {step:,} steps"
        if self.status.get("stage"):
            where += f" in stage {self.status['stage']}"
        return {
            "finished": f"This run is finished{where}.",
            "running": f"This run is still training: it stands{where}.",
            "failed": f"This run failed{where}.",
            "interrupted": f"This run was interrupted{where} and can be resumed.",
            "killed": f"This run was stopped from outside{where} or later, and can be resumed.",
        }.get(self.state, "This run has not begun to train.")

    def machine(self) -> str:
        """Where it ran, as the end of a sentence: " on <processor> (2 cores)"; "" if unknown."""
        cpu, cores = self.environment.get("cpu"), self.environment.get("cores")
        if not cpu and not cores:
            return ""
        count = f" ({cores} cores)" if cpu and cores else f" {cores} cores" if cores else ""
        return f" on {cpu or ''}{count}".replace("  ", " ")


def read_facts(path: Path) -> RunFacts:
    """Read the run folder; absent files give empty values, damaged ones raise RunError."""
    environment = path / "environment.json"
    records = read_log(path / "log.jsonl")
    return RunFacts(
        path=path,
        recipe=read_recipe(path),
        environment=read_json(environment) if environment.is_file() else {},
        status=read_status(path),
        summary=read_summary(path),
        records=records,
        # Training may put samples into a file of their own or among the steps.
        samples=of_kind(read_log(path / "samples.jsonl"), "sample") + of_kind(records, "sample"),
    )
