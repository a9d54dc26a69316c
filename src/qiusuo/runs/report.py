"""`report.html`: a run told on one page that needs nothing but itself.

The pictures are inside it, it calls no network, and all text from the run is escaped by the
template: a sample may contain `</script>`, because models write such things. An unfinished,
failed or nearly empty run gets a page as well, which says what is missing.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from qiusuo.runs.durable import RunError, write_text
from qiusuo.runs.facts import RunFacts, read_facts
from qiusuo.runs.outcomes import accuracy_words, other_words
from qiusuo.runs.plots import Picture, draw_pictures
from qiusuo.runs.rollout_plots import REINFORCEMENT
from qiusuo.runs.rollouts import is_right, read_rollouts, rollout_steps, split_response
from qiusuo.runs.series import is_number, of_kind, spread
from qiusuo.runs.words import format_bytes, format_duration, format_fact

_MOST_ROWS, _MOST_SAMPLES, _MOST_CHARACTERS = 24, 12, 1500
_MOST_ROLLOUTS = 3  # right ones, and as many wrong ones, of a step
_STATE_WORDS = {"killed": "stopped without a word", "unknown": "not started"}
_ENVIRONMENT = {
    "qiusuo": "Qiusuo",
    "torch": "PyTorch",
    "python": "Python",
    "platform": "Platform",
    "cpu": "Processor",
    "cores": "Cores",
    "memory_bytes": "Memory",
    "git_commit": "Git commit",
    "started": "Started",
}


def write_report(run_path: str | Path) -> Path:
    """Write `report.html` into the run folder from what is there; returns its path.

    Needs no lock: a run may be training meanwhile. Raises RunError when the folder is absent,
    when a file in it is damaged, or when there are curves to draw and no matplotlib.
    """
    import jinja2
    from markupsafe import Markup

    path = Path(run_path)
    if not path.is_dir():
        raise RunError(f"there is no run folder {path}")
    own = files("qiusuo.runs")
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = engine.from_string((own / "report.html").read_text(encoding="utf-8"))
    context = _context(read_facts(path))
    # Ours, and CSS must not be escaped; everything else stays plain text.
    context["css"] = Markup((own / "report.css").read_text(encoding="utf-8"))
    # A lone surrogate, which JSON may carry, is no character: it shows as a question mark.
    page = template.render(context).encode("utf-8", "replace").decode("utf-8")
    return write_text(path / "report.html", page)


def _context(facts: RunFacts) -> dict[str, Any]:
    """The values of the template."""
    path = facts.path
    pictures = draw_pictures(facts.records)
    samples, samples_left_out = _samples(facts)
    validations, validations_left_out = _validations(facts)
    environment = facts.environment
    recipe = path / "recipe.toml"
    return {
        "title": facts.title,
        "state": facts.state,
        "state_words": _STATE_WORDS.get(facts.state, facts.state),
        "lead": facts.paragraph(),
        "key_figures": facts.key_figures(),
        "error": facts.error,
        "missing": _missing(facts),
        "facts": [(label, format_fact(fact)) for label, fact in facts.summary.items()],
        "picture_groups": _group(pictures),
        "outcomes": _outcomes(facts),
        "rollouts": _rollouts(facts),
        "validations": validations,
        "validations_left_out": validations_left_out,
        "samples": samples,
        "samples_left_out": samples_left_out,
        "events": [
            (f"step {e['step']:,}" if "step" in e else "", e.get("text", ""))
            for e in of_kind(facts.records, "event")[-50:]
        ],
        "command": environment.get("command"),
        "recipe": recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        "environment": _environment(environment),
    }


def _missing(facts: RunFacts) -> list[str]:
    checks = [
        (facts.recipe, "recipe.toml: the recipe is not known"),
        (facts.environment, "environment.json: the machine and the versions are not known"),
        (facts.steps, "log.jsonl: no training step has been logged, so there are no curves"),
        (facts.validations, "log.jsonl: no validation has been logged"),
        (facts.samples or facts.rollouts, "samples.jsonl: no samples have been written"),
        (facts.summary, "summary.json: the table of facts is written when training ends"),
    ]
    return [words for present, words in checks if not present]


def _group(pictures: list[Picture]) -> list[tuple[str, list[Picture]]]:
    groups: dict[str, list[Picture]] = {"Reinforcement": [], "Curves": [], "Experts": []}
    for picture in pictures:
        about_experts = picture.name in {"balance", "load", "load-over-time"}
        about_answers = picture.name.startswith(REINFORCEMENT)
        name = "Experts" if about_experts else "Reinforcement" if about_answers else "Curves"
        groups[name].append(picture)
    return [(name, group) for name, group in groups.items() if group]


def _outcomes(facts: RunFacts) -> dict[str, Any] | None:
    """The table of before and after: per column its words, per row its task and cells."""
    outcomes = facts.outcomes()
    if outcomes is None:
        return None
    rows = [
        (
            name,
            [
                (*accuracy_words(cell), " · ".join(other_words(cell))) if cell else None
                for cell in cells
            ],
        )
        for name, cells in outcomes.rows
    ]
    columns = [(words, f"step {step:,}") for words, step in outcomes.columns]
    return {"columns": columns, "rows": rows, "intervals": outcomes.intervals}


def _rollouts(facts: RunFacts) -> list[tuple[str, list[dict[str, Any]]]]:
    """Answers of the first and the last step that kept some: a few right ones, a few wrong."""
    path = facts.path / "rollouts.jsonl"
    bounds = rollout_steps(path)
    told = []
    for step in dict.fromkeys(bounds or ()):
        kept: list[dict[str, Any]] = []
        for right in (True, False):
            kept += read_rollouts(path, step, step, right=right, most=_MOST_ROLLOUTS).rollouts
        told.append((f"{step:,}", [_answer(rollout) for rollout in kept]))
    return told


def _answer(rollout: dict[str, Any]) -> dict[str, Any]:
    thought, answer = split_response(str(rollout.get("response", "")))
    difficulty = rollout.get("difficulty")
    task = str(rollout.get("task", ""))
    reward = rollout.get("reward")
    texts = {"prompt": str(rollout.get("prompt", "")), "thought": thought or "", "answer": answer}
    return {key: _cut(text) for key, text in texts.items()} | {
        "task": task if difficulty is None else f"{task}/{difficulty}",
        "right": is_right(rollout),
        "reward": f"{reward:g}" if is_number(reward) else "–",
        "reason": str(rollout.get("reason") or ""),
        "chinese": _is_chinese("".join(texts.values())),
    }


def _validations(facts: RunFacts) -> tuple[list[dict[str, Any]], int]:
    """Rows of the validation table and how many were left out; the best is always in."""
    records = facts.losses
    best = facts.best_validation()
    shown = spread(records, _MOST_ROWS)
    if best is not None and not any(record is best for record in shown):
        shown = [record for record in records if record is best or any(record is s for s in shown)]
    rows = [
        {
            "step": f"{record['step']:,}",
            "loss": _fixed(record.get("loss"), 4),
            "bits": _fixed(record.get("bits_per_character"), 4),
            "tokens": f"{record['tokens']:,}" if "tokens" in record else "–",
            "time": format_duration(record["seconds"]) if "seconds" in record else "–",
            "best": record is best,
        }
        for record in shown
    ]
    return rows, len(records) - len(shown)


def _samples(facts: RunFacts) -> tuple[list[tuple[str, list[dict[str, Any]]]], int]:
    """Samples grouped by step and how many steps were left out."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for record in facts.samples:
        prompt, continuation = str(record.get("prompt", "")), str(record.get("continuation", ""))
        text = {
            "prompt": _cut(prompt),
            "continuation": _cut(continuation),
            "chinese": _is_chinese(prompt + continuation),
        }
        group = by_step.setdefault(record["step"], [])
        if text not in group:
            group.append(text)
    steps = spread(sorted(by_step), _MOST_SAMPLES)
    return [(f"{step:,}", by_step[step]) for step in steps], len(by_step) - len(steps)


def _environment(environment: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, label in _ENVIRONMENT.items():
        value = environment.get(key)
        if value is None:
            continue
        words = format_bytes(value) if key == "memory_bytes" else str(value)
        if key == "git_commit" and environment.get("git_modified"):
            words += " with uncommitted changes"
        rows.append((label, words))
    for i, again in enumerate(environment.get("resumed", []), 1):
        machine = f"{again.get('cpu') or again.get('machine')}, {again.get('cores')} cores"
        rows.append((f"Resumed ({i})", f"{again.get('started')} on {machine}"))
    return rows


def _is_chinese(text: str) -> bool:
    """The same code points are drawn differently in Chinese and in Japanese fonts."""
    return re.search("[\u4e00-\u9fff]", text) is not None


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " […]"


def _fixed(value: Any, places: int) -> str:
    return "–" if value is None else f"{value:.{places}f}"
