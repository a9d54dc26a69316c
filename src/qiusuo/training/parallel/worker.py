"""One of the processes that ``launch.py`` starts: what it does before, after and beside its work.

It is a session of its own, so Ctrl-C at the terminal reaches the launcher alone, which asks with
SIGTERM. Until the work itself listens to that, there is nothing to save, and SIGTERM just ends the
process. What it shall do comes through its standard input, whose other end the launcher keeps open
as long as it lives: the end of the input is the launcher's end, and then a process must leave even
where its main thread is blocked in a collective and could answer no signal.

Nothing large is imported before that is arranged.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

STOPPED = 130  # the exit code of a run that was stopped and saved
SAID = 3  # of work that said what a person must mend; 1 is Python's own, for what nobody foresaw
ANSWERS = (0, SAID, STOPPED)  # whatever else a process ends with is a death
BEREFT = 75  # of a process that could not go on because another died: not the first cause
LENGTH_BYTES = 8  # of what is given, before it


def be_worker() -> None:
    """Do the work that standard input holds, and end with its answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # may be sent to all, but is for the launcher
    with os.fdopen(os.dup(0), "rb") as file:
        given = file.read(int.from_bytes(file.read(LENGTH_BYTES), "big"))
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    work: Callable[..., int]
    sys.path, rest = pickle.loads(given)  # else it might not find the work
    work, arguments = pickle.loads(rest)
    code = _answer(work, arguments)
    if code == BEREFT:  # threads still wait in what failed, and C++ ends whoever tears them down
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _end_with_launcher() -> None:
    """The kernel ends at once what hangs, and what is half written has no name yet."""
    while os.read(0, 1):
        pass
    os._exit(BEREFT)


def _answer(work: Callable[..., int], arguments: tuple[Any, ...]) -> int:
    try:
        return work(*arguments)
    except Exception as error:
        from qiusuo.training.parallel.world import tells_of_a_death

        if tells_of_a_death(error):  # of another, which is what matters: no traceback
            return BEREFT
        raise
