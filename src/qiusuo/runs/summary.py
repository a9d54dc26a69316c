"""The facts of a run worth a table, written by training and read by the report and the card.

`summary.json` maps a label to a value, or to {"value": ..., "unit": "..."}; the order is
kept. Some labels are known to the model card (in any case):

    Parameters, Active parameters   counts
    License                         an identifier such as "mit"
    Languages                       a list of codes such as ["zh", "en"]
    Data                            a list of {"name": ..., "license": ..., "source": ...}
    Limits                          a text, or a list of texts
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qiusuo.runs.durable import read_json, write_json


def write_summary(run_path: str | Path, facts: Mapping[str, Any]) -> Path:
    """Replace the facts of the run folder by `facts`; returns the file's path.

    Tensor and array scalars become numbers; what is not finite becomes a string.
    """
    return write_json(Path(run_path, "summary.json"), facts)


def read_summary(run_path: str | Path) -> dict[str, Any]:
    """The facts of the run folder, {} when none were written."""
    file = Path(run_path, "summary.json")
    return dict(read_json(file)) if file.is_file() else {}


def find_fact(facts: Mapping[str, Any], label: str) -> Any:
    """The value under `label` in any case, without its unit; None when absent."""
    for key, fact in facts.items():
        if key.casefold() == label.casefold():
            has_unit = isinstance(fact, Mapping) and "value" in fact
            return fact["value"] if has_unit else fact
    return None
