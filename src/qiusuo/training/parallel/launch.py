"""``qiusuo train --nproc N``: N processes on this machine, started anew where one dies.

PyTorch's elastic agent starts the processes, watches them and, when one was killed, ends the others
and starts all again; they find the run folder and go on from its last checkpoint. An error that a
person must mend is not such a death: the processes say it, return their exit code in peace, and
nothing is started again. The same processes can be started by ``torchrun``, on one machine or many.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qiusuo.training.parallel.world import tells_of_a_death

RESTARTS = 3  # of one call: what dies more often has a reason that starting it anew does not mend
STOP_SECONDS = 600  # that processes have to finish a step and to save after a Ctrl-C
STOPPED = 130  # the exit code of a run that was stopped and saved

PR_SET_PDEATHSIG = 1  # of prctl(2)


class LaunchError(RuntimeError):
    """The processes died again and again."""


def launch(count: int, work: Callable[..., int], *arguments: Any) -> int:
    """Call ``work(*arguments)``, a function of a module, in ``count`` new processes; the largest
    exit code they return. LaunchError where they died more than RESTARTS times."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // count)))
    # Else processes that are started anew meet at the addresses of those that died.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    _silence_agent()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"qiusuo-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=RESTARTS,
        shutdown_timeout=STOP_SECONDS,
    )
    try:
        codes = elastic_launch(config, _in_its_session)(work, os.getpid(), *arguments)
    except SignalException:
        return STOPPED
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise LaunchError(
            f"{RESTARTS} restarts were not enough: process {rank} of {count} died again "
            f"(exit code {failure.exitcode}); the last whole checkpoint is in place"
        ) from None
    return max(codes.values())


def _silence_agent() -> None:
    """It tells of signals and deaths at length; what matters of it we say ourselves."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _in_its_session(work: Callable[..., int], parent: int, *arguments: Any) -> int:
    """A new process. Ctrl-C at the terminal reaches it once, through the agent; it stops in good
    order when the agent is gone. A stop is no answer but an end: were it a single process that was
    told to stop, the agent would start all again."""
    os.setsid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit(STOPPED)
    try:
        code = work(*arguments)
    except Exception as error:
        if not tells_of_a_death(error):  # of another: that one is what the agent has to mend
            traceback.print_exc()  # which the agent would keep to itself
        raise
    if code == STOPPED:  # an agent that was stopped itself reads no answers
        sys.exit(STOPPED)
    return code
