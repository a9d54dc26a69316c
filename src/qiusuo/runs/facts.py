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
from qiusuo.runs.outcomes import Outcomes, find_outcomes, share
from qiusuo.runs.series import by_set, is_number, of_kind, typical, without_policy
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

    @property
    def rollouts(self) -> list[dict[str, Any]]:
        """The records of steps of reinforcement."""
        return of_kind(self.records, "rollout")

    @property
    def losses(self) -> list[dict[str, Any]]:
        """The validations on text: those with a loss."""
        return [record for record in self.validations if is_number(record.get("loss"))]

    def outcomes(self) -> Outcomes | None:
        """What the stages did to the accuracy on problems, if that was measured."""
        return find_outcomes(self.records)

    def last(self, key: str, kind: str = "step") -> float | None:
        """The latest value of the numeric field `key` among the records of a kind."""
        records = reversed(of_kind(self.records, kind))
        return next((r[key] for r in records if is_number(r.get(key))), None)

    def last_loss(self) -> float | None:
        """The latest training loss in nats per token: that of a policy is none."""
        steps = without_policy(self.steps, self.rollouts)
        return next((r["loss"] for r in reversed(steps) if is_number(r.get("loss"))), None)

    def best_validation(self) -> dict[str, Any] | None:
        """The validation with the lowest finite loss, the earliest of equals, among those of the
        set of text that was looked at most often."""
        among = max(by_set(self.losses).values(), key=len, default=[])
        finite = [r for r in among if math.isfinite(r["loss"])]
        return min(finite, key=lambda record: record["loss"], default=None)

    def key_figures(self) -> list[tuple[str, str, str]]:
        """The numbers to read first, as (label, value, unit)."""
        final = self.losses[-1] if self.losses else {}
        share = typical(self.steps, "peak_share")
        accuracy = self._accuracy()
        head = [("Accuracy", accuracy[0], accuracy[1])] if accuracy else []
        candidates: list[tuple[str, float | None, Callable[[float], str], str]] = [
            ("Reward", self.last("reward", "rollout"), format_number, "last step"),
            ("Validation loss", final.get("loss"), format_number, "nats/token"),
            ("Validation", final.get("bits_per_character"), format_number, "bits/char."),
            ("Last training loss", self.last_loss(), format_number, "nats/token"),
            ("Tokens", self.last("tokens"), format_large, ""),
            ("Training time", self.last("seconds"), format_duration, ""),
            ("Typical speed", typical(self.steps, "tokens_per_second"), format_large, "tokens/s"),
            ("Share of peak", share, "{:.1%}".format, ""),
        ]
        return head + [(a, form(v), unit) for a, v, form, unit in candidates if v is not None]

    def _accuracy(self) -> tuple[str, str, str] | None:
        """Held-out accuracy before and after in figures, in what unit, and in a sentence."""
        outcomes = self.outcomes()
        mean = outcomes.mean_accuracy() if outcomes else None
        if outcomes is None or mean is None:
            return None
        first, last, tasks = mean
        over = outcomes.rows[0][0] if tasks == 1 else f"mean of {tasks} tasks"
        columns = [words for words, _ in outcomes.columns]
        words = (
            f"The greedy accuracy on held-out problems ({over}) is {share(last)} "
            f"({columns[-1]}), from {share(first)} ({columns[0]})."
        )
        return f"{share(first)} → {share(last)}", f"greedy, {over}", words

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
        sentences += self._validated()
        accuracy = self._accuracy()
        if accuracy:
            sentences.append(accuracy[2])
        return " ".join(sentences)

    def _validated(self) -> list[str]:
        """What the looks at held-out text found: figures of one set of text beside each other."""
        if not self.losses:
            return []
        sets, final = by_set(self.losses), self.losses[-1]
        own = sets[final.get("tokens")]
        words = f"The validation loss is {format_number(final['loss'])} nats per token"
        if "bits_per_character" in final:
            words += f" ({format_number(final['bits_per_character'])} bits per character)"
        if len(sets) > 1:
            words += f" over {final.get('tokens', 0):,} tokens"
        if len(own) > 1:
            words += f", from {format_number(own[0]['loss'])} at step {own[0]['step']:,}"
        sentences = [words + "."]
        for tokens, looks in sets.items():
            if looks is not own and len(looks) > 1:
                first, last = looks[0], looks[-1]
                sentences.append(
                    f"Over {tokens or 0:,} tokens, which is another figure, it went from "
                    f"{format_number(first['loss'])} at step {first['step']:,} to "
                    f"{format_number(last['loss'])} at step {last['step']:,}."
                )
        return sentences

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
