"""The log survives kills, full values and resumption, and hides no damage."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from qiusuo.runs.durable import RunError
from qiusuo.runs.log import RunLog, read_log


def step(number: int, **fields: object) -> dict[str, object]:
    return {"kind": "step", "step": number, **fields}


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    records: list[dict[str, object]] = [
        step(1, loss=3.5, max_violation=[0.1, 0.2], expert_load=[[1.0, 1.0]]),
        {"kind": "sample", "step": 1, "prompt": "问", "continuation": "答\n</script>"},
        {"kind": "event", "text": "resumed"},
    ]
    with RunLog(path) as log:
        for i, record in enumerate(records):
            log.append(record)
            assert len(read_log(path)) == i + 1  # visible at once, without a close
    assert read_log(path) == records
    assert read_log(tmp_path / "absent.jsonl") == []


def test_what_is_not_finite_is_valid_json_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.append(step(1, loss=math.nan, max_violation=[math.inf, -math.inf, 1.0]))
        log.append({"kind": "sample", "step": 1, "prompt": "NaN", "continuation": "Infinity"})
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    first, second = read_log(path)
    assert math.isnan(first["loss"])
    assert first["max_violation"] == [math.inf, -math.inf, 1.0]
    assert (second["prompt"], second["continuation"]) == ("NaN", "Infinity")


def test_tensors_and_arrays_become_numbers(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.append(step(1, loss=torch.tensor(2.5), grad_norm=np.float32(0.5), load=np.eye(2)))
    assert read_log(path) == [step(1, loss=2.5, grad_norm=0.5, load=[[1.0, 0.0], [0.0, 1.0]])]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_passed_over_and_mended(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.append(step(1, text="文"))
        log.append(step(2, text="字字字"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    expected = [step(1, text="文")]
    if cut == 1:  # only the newline is gone: the record is whole
        expected.append(step(2, text="字字字"))
    assert read_log(path) == expected
    with RunLog(path) as log:
        log.append(step(3))
    assert read_log(path) == [*expected, step(3)]


def test_any_other_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind": "step", "step": 1}\n{"kind": "st\n{"kind": "step", "step": 2}\n')
    with pytest.raises(RunError, match="line 2"):
        read_log(path)
    path.write_text('{"kind": "step", "step": 1}\n{"kind": "other"}\n')
    with pytest.raises(RunError, match=r"line 2.*kind"):
        read_log(path)
    path.write_text('{"kind": "step", "step": 1}\n\n')
    with pytest.raises(RunError, match="line 2"):
        read_log(path)


def test_truncate_after_drops_later_steps_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        for i in range(1, 6):
            log.append(step(i))
            log.append({"kind": "validation", "step": i, "loss": 1.0})
        log.append({"kind": "event", "text": "stopped"})
        assert log.truncate_after(3) == 4
        assert log.truncate_after(3) == 0
        log.append(step(4, again=1))
    records = read_log(path)
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4]
    assert records[-1] == step(4, again=1)
    assert records[-2] == {"kind": "event", "text": "stopped"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize(
    "record",
    [{"step": 1}, {"kind": "stop", "step": 1}, {"kind": "step"}, step(1, value=object())],
)
def test_a_bad_record_is_refused_and_leaves_no_trace(
    tmp_path: Path, record: dict[str, object]
) -> None:
    with RunLog(tmp_path / "log.jsonl") as log:
        with pytest.raises(RunError):
            log.append(record)
        log.append(step(1))
    assert read_log(log.path) == [step(1)]
    with pytest.raises(RunError, match="closed"):
        log.append(step(2))
