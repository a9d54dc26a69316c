"""What is written as TOML reads back equal, types and all."""

from __future__ import annotations

import math
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qiusuo.runs.durable import RunError
from qiusuo.runs.toml import dump_toml

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PLAIN = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    TEXT,
    st.none(),
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner.filter(lambda item: item is not None), max_size=3),
        st.dictionaries(TEXT, inner, max_size=3),
    ),
    max_leaves=12,
)


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def typed(value: Any) -> Any:
    """Distinguishes 1, 1.0 and True, which compare equal, and 0.0 from -0.0."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return type(value), repr(value)


@given(st.dictionaries(TEXT, VALUES, max_size=5))
def test_round_trip(document: dict[str, Any]) -> None:
    assert typed(tomllib.loads(dump_toml(document))) == typed(without_none(document))


def test_a_recipe_reads_well() -> None:
    text = dump_toml(
        {
            "stages": [{"kind": "pretrain", "optimizer": {"lr": 3e-4, "betas": (0.9, 0.95)}}],
            "name": "求索",
            "model": {"router": {"experts": 8}},
            "absent": None,
        }
    )
    assert text == (
        'name = "求索"\n\n[[stages]]\nkind = "pretrain"\n\n[stages.optimizer]\nlr = 0.0003\n'
        "betas = [0.9, 0.95]\n\n[model.router]\nexperts = 8\n"
    )


def test_nan_and_infinity() -> None:
    back = tomllib.loads(dump_toml({"a": math.nan, "b": math.inf, "c": -math.inf}))
    assert math.isnan(back["a"])
    assert (back["b"], back["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"model": {"dtype": object()}}, "model.dtype"),
        ({"a": [1, None]}, "a"),
        ({"a": {1: 2}}, "1"),
        ({"a": "\ud800"}, "a"),
    ],
)
def test_what_toml_cannot_hold_is_named(document: dict[str, Any], named: str) -> None:
    with pytest.raises(RunError, match=named):
        dump_toml(document)
