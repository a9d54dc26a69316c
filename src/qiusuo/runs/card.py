"""The model card: `README.md` with the front matter that Hugging Face reads.

Only what the run folder holds is said. What it does not say, the licence of the data above
all, the card names as unstated rather than guessing: a reader decides by it.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qiusuo.runs.durable import RunError, read_json, write_text
from qiusuo.runs.facts import RunFacts, read_facts
from qiusuo.runs.outcomes import accuracy_words, other_words
from qiusuo.runs.rollouts import read_rollouts
from qiusuo.runs.summary import find_fact
from qiusuo.runs.words import format_duration, format_fact, format_large

_IN_SECTIONS = {
    "license",
    "languages",
    "data",
    "base",
    "limits",
    "parameters",
    "active parameters",
}
_ARCHITECTURE = {
    "model_type": "Architecture",
    "num_hidden_layers": "Layers",
    "hidden_size": "Hidden size",
    "num_attention_heads": "Attention heads",
    "kv_lora_rank": "Latent width (MLA)",
    "n_routed_experts": "Routed experts per MoE layer",
    "num_experts_per_tok": "Routed experts per token",
    "n_shared_experts": "Shared experts",
    "num_nextn_predict_layers": "MTP layers",
    "vocab_size": "Vocabulary",
    "max_position_embeddings": "Context, tokens",
    "torch_dtype": "Weights stored as",
    "dtype": "Weights stored as",
}


def write_model_card(run_path: str | Path, model_path: str | Path) -> Path:
    """Write `README.md` into the run folder, and into `model_path` if that folder exists.

    Either can be published alone; the line that loads the model fits each. Returns the run
    folder's card. Raises RunError when the run folder is absent or a file in it is damaged.
    """
    run, model = Path(run_path), Path(model_path)
    if not run.is_dir():
        raise RunError(f"there is no run folder {run}")
    facts = read_facts(run)
    config = read_json(model / "config.json") if (model / "config.json").is_file() else {}
    parameters = find_fact(facts.summary, "Parameters") or count_parameters(model)
    inside = model.resolve().is_relative_to(run.resolve())
    there = str(model.resolve().relative_to(run.resolve())) if inside else model.name
    card = write_text(run / "README.md", _card(facts, config, parameters, there))
    if model.is_dir() and model.resolve() != run.resolve():
        write_text(model / "README.md", _card(facts, config, parameters, "."))
    return card


def count_parameters(model_path: Path) -> int | None:
    """The number of stored weights in the folder's safetensors files; None without any.

    Reads only the files' headers.
    """
    total, found = 0, False
    for file in sorted(model_path.glob("*.safetensors")):
        with file.open("rb") as stream:
            try:
                (size,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(size))
            except (struct.error, ValueError, MemoryError, OverflowError) as error:
                raise RunError(f"{file} is not a whole safetensors file: {error}") from error
        found = True
        for name, tensor in header.items():
            # FP8 checkpoints store block scales beside the weights; these are not parameters.
            if name != "__metadata__" and not name.endswith("_scale_inv"):
                total += math.prod(tensor["shape"])
    return total if found else None


def _card(facts: RunFacts, config: dict[str, Any], parameters: Any, load: str) -> str:
    sections = [
        _front_matter(facts, config),
        f"# {_plain(facts.title)}\n\n{_plain(facts.paragraph())}",
        _section("Model", _table(_model_rows(facts, config, parameters))),
        _section("Use", _use(load, facts)),
        _section("Results", _results(facts)),
        _section("Data and licences", _data(facts)),
        _section("Limits", _limits(facts)),
        _section("How it was made", _making(facts)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(facts: RunFacts, config: dict[str, Any]) -> str:
    lines = ["---"]
    license_name = _license(facts)
    if license_name:
        lines.append(f"license: {_yaml(license_name)}")
    languages = _languages(facts)
    if languages:
        lines += ["language:", *(f"- {_yaml(language)}" for language in languages)]
    tags = ["qiusuo"]
    if config.get("model_type"):
        tags.append(str(config["model_type"]))
    if config.get("n_routed_experts"):
        tags.append("moe")
    if config.get("kv_lora_rank"):
        tags.append("mla")
    extra = facts.recipe.get("tags")
    tags += [str(tag) for tag in extra] if isinstance(extra, list) else []
    lines += ["library_name: qiusuo", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {_yaml(tag)}" for tag in dict.fromkeys(tags)]
    return "\n".join([*lines, "---"])


def _model_rows(facts: RunFacts, config: dict[str, Any], parameters: Any) -> list[tuple[str, str]]:
    rows = []
    if parameters is not None:
        rows.append(("Parameters", format_fact(parameters)))
    active = find_fact(facts.summary, "Active parameters")
    if active is not None:
        rows.append(("Active parameters per token", format_fact(active)))
    rows += [(label, str(config[key])) for key, label in _ARCHITECTURE.items() if config.get(key)]
    return rows


def _use(load: str, facts: RunFacts) -> str:
    """How to ask it: a model of tasks in a chat, with a problem that it has met."""
    lines = ["import qiusuo", "", f"lm = qiusuo.load({json.dumps(load, ensure_ascii=False)})"]
    if any(record.get("tasks") for record in facts.records):
        ask = facts.recipe.get("ask", {})
        thinking, system = bool(ask.get("thinking", True)), ask.get("system")
        asked = [{"role": "system", "content": system}] if system else []
        asked.append({"role": "user", "content": _problem(facts.path)})
        words = json.dumps(asked, ensure_ascii=False)
        lines += [
            f"answer = lm.chat({words}, thinking={thinking})",
            "print(answer.reasoning_content, answer.content)",
        ]
    else:
        lines.append('print(lm.generate(["..."], max_tokens=64)[0].text)')
    return "\n".join(["```python", *lines, "```"])


def _problem(run: Path) -> str:
    kept = run / "rollouts.jsonl"
    found = read_rollouts(kept, right=True, most=1).rollouts if kept.is_file() else []
    return str(found[0]["prompt"]) if found else "..."


def _results(facts: RunFacts) -> str:
    rows = [
        (label, format_fact(fact))
        for label, fact in facts.summary.items()
        if label.casefold() not in _IN_SECTIONS
    ]
    known = {label.casefold() for label, _ in rows}
    for label, value, unit in facts.key_figures():
        if label.casefold() not in known:
            rows.append((label, f"{value} {unit}".strip()))
    parts = [_outcomes(facts), _table(rows)]
    return "\n\n".join(part for part in parts if part) or "The run logged no results."


def _outcomes(facts: RunFacts) -> str:
    """The table of before and after, with a sentence on how to read it."""
    outcomes = facts.outcomes()
    if outcomes is None:
        return ""
    head = ["held-out problems", *(words for words, _ in outcomes.columns)]
    lines = [_row(map(_plain, head)), _row(["---"] * len(head))]
    for name, cells in outcomes.rows:
        lines.append(_row([_plain(name), *map(_cell, cells)]))
    interval = " (95% interval)" if outcomes.intervals else ""
    words = f"Bold: the share of problems whose greedy answer is right{interval}; below it, of "
    return "\n".join([*lines, "", words + "sampled answers."])


def _cell(cell: Mapping[str, Any] | None) -> str:
    if not cell:
        return "–"
    accuracy, interval = accuracy_words(cell)
    first = f"**{accuracy}**" + (f" ({interval})" if interval else "") if accuracy else ""
    others = _plain(", ".join(other_words(cell)))
    return "<br>".join(part for part in (first, others) if part)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _data(facts: RunFacts) -> str:
    data, license_name = find_fact(facts.summary, "Data"), _license(facts)
    lines = []
    if isinstance(data, list) and data and all(isinstance(item, Mapping) for item in data):
        for item in data:
            source = f", {item['source']}" if item.get("source") else ""
            terms = item.get("license") or "licence not stated"
            lines.append(f"- {_plain(item.get('name', 'unnamed'))}: {_plain(f'{terms}{source}')}")
    elif data:
        lines.append(_plain(format_fact(data)))
    else:
        lines.append("The run folder does not say what data the model was trained on.")
    if base := find_fact(facts.summary, "Base"):
        lines.append(f"- Begun with the weights of {_plain(format_fact(base))}.")
    terms = f"are under {_plain(license_name)}" if license_name else "carry no stated licence"
    return "\n".join([*lines, "", f"The weights {terms}."])


def _limits(facts: RunFacts) -> str:
    limits = find_fact(facts.summary, "Limits")
    texts = limits if isinstance(limits, list) else [limits] if limits else []
    lines = [f"- {_plain(text)}" for text in texts]
    if facts.state != "finished":
        lines.append(f"- The run's state is “{facts.state}”: this is not a finished model.")
    lines.append(
        "- The results above are all that this run measured. Nothing here was tested for "
        "factual accuracy or for safety unless a line above says so."
    )
    return "\n".join(lines)


def _making(facts: RunFacts) -> str:
    environment, lines = facts.environment, []
    versions = [
        f"{label} {environment[key]}"
        for key, label in (("qiusuo", "Qiusuo"), ("torch", "PyTorch"), ("python", "Python"))
        if environment.get(key)
    ]
    if versions:
        lines.append(f"Trained with {', '.join(versions)}.")
    seconds = facts.last("seconds")
    if seconds is not None:
        tokens = facts.last("tokens")
        amount = f"{format_large(tokens)} tokens in " if tokens is not None else ""
        lines.append(f"Training took {amount}{format_duration(seconds)}{facts.machine()}.")
    lines.append(
        "The run folder holds the recipe with every default written out (`recipe.toml`), the log "
        "of every step (`log.jsonl`) and the report (`report.html`)."
    )
    if environment.get("command"):
        lines.append(f"\n```sh\n{environment['command'].replace('```', '` ` `')}\n```")
    return "\n".join(lines)


def _license(facts: RunFacts) -> str | None:
    stated = find_fact(facts.summary, "License") or facts.recipe.get("license")
    return stated if isinstance(stated, str) else None


def _languages(facts: RunFacts) -> list[str]:
    stated = find_fact(facts.summary, "Languages") or facts.recipe.get("languages") or []
    return [stated] if isinstance(stated, str) else [str(language) for language in stated]


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {_plain(a)} | {_plain(b)} |" for a, b in rows]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _plain(text: Any) -> str:
    """Text that Markdown shows as it is: on one line, no HTML, no code, no emphasis."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*|\[\]])", r"\\\1", line)


def _yaml(text: str) -> str:
    # A JSON string is a YAML string; plain words need no quotes, save those YAML takes for
    # truth values ("no" is Norwegian).
    bare = re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", text)
    special = text.lower() in {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
    return text if bare and not special else json.dumps(text, ensure_ascii=False)
