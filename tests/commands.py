"""Commands as someone types them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from qiusuo import cli


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Ask = Callable[..., Answer]


def asker(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """A function that runs a command as ``qiusuo WORDS`` would, in this process."""

    def run(*words: str | Path) -> Answer:
        monkeypatch.setattr(sys, "argv", ["qiusuo", *map(str, words)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return Answer(code, *capsys.readouterr())

    return run


def refused(answer: Answer) -> str:
    """A mistake that the user can mend: one line, and no more."""
    assert answer.code == 1
    assert answer.err.startswith("qiusuo: ")
    assert answer.err.count("\n") == 1
    assert "Traceback" not in answer.err + answer.out
    return answer.err
