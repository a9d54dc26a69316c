"""Answers sampled one step ahead, in another process, while this one learns.

The schedule is fixed. As step t begins, its batch is waited for; then the weights, as step t−1 left
them, are copied to where the other process reads them, and it begins with the batch of step t+1.
So step t learns from answers of the weights that step t−2 left (the first two steps: of those the
stage began with), and nothing depends on who was faster. The questions of a batch are drawn where
it is sampled, from places told with the weights; what was heard of the batches before is in them.

A batch under way belongs to the state: a checkpoint waits for it, and a resumed run learns from it.
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch

from qiusuo.training.rl.asking import Asking, Batch, unpacked
from qiusuo.training.rl.sampling_process import (
    Failed,
    Setup,
    Wanted,
    layout_of,
    size_of,
    tensors_in,
)
from qiusuo.training.scene import Scene, TrainingError
from qiusuo.training.speaking import weights_of
from qiusuo.training.stages import RlStage

# Not multiprocessing's spawn: that runs the caller's script again, to find out what is in it.
PROGRAM = "from qiusuo.training.rl.sampling_process import main; main()"


class Ahead:
    """The process is started with the first batch that is wanted. Half of the threads are kept for
    it from the beginning until ``close``, so that a step's rounding does not depend on whether
    there is anything left to sample."""

    def __init__(self, scene: Scene[RlStage], asking: Asking, dtype: torch.dtype) -> None:
        self.scene, self.asking, self.dtype = scene, asking, dtype
        self.process: _Sampler | None = None
        self.under_way = False
        self.ready: dict[str, Any] | None = None  # the batch as it came
        threads = torch.get_num_threads()
        self.spared = max(1, threads // 2)
        torch.set_num_threads(max(1, threads - self.spared))
        self.threads: int | None = threads  # to be given back

    def begin(self, step: int, version: int) -> None:
        """Sample the batch of ``step`` (from 0) with the weights of this moment."""
        if self.process is None:
            setup = _setup(self.scene, self.asking, self.dtype, self.spared)
            self.process = _Sampler(self.scene, setup)
        self.process.order(Wanted(step, version, self.asking.questions.state_dict()))
        self.under_way = True

    def take(self, step: int, version: int) -> Batch:
        """The batch of ``step``, begun before or now; the questions move on behind it."""
        if self.ready is None and not self.under_way:
            self.begin(step, version)
        self.wait()
        assert self.ready is not None
        reply, self.ready = self.ready, None
        questions = self.asking.questions
        questions.load_state_dict(reply["questions"])
        return unpacked(reply["batch"], questions)

    def wait(self) -> None:
        """Until the batch under way is here. TrainingError where it cannot be had."""
        if self.under_way:
            assert self.process is not None
            self.ready = self.process.reply()
            self.under_way = False

    def forget(self) -> None:
        """Nobody wants the batch under way."""
        self.close()
        self.ready = None

    def close(self) -> None:
        """End the process, whatever it does; a batch that has come stays."""
        if self.process is not None:
            self.process.end()
        self.process, self.under_way = None, False
        if self.threads is not None:
            torch.set_num_threads(self.threads)
            self.threads = None

    def state_dict(self) -> dict[str, Any] | None:
        self.wait()
        return self.ready

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self.ready = state


class _Sampler:
    """The process from outside."""

    def __init__(self, scene: Scene[RlStage], setup: Setup) -> None:
        self.scene = scene
        memory = _shared_memory(size_of(setup.layout))
        try:
            self.weights = tensors_in(mmap.mmap(memory, size_of(setup.layout)), setup.layout)
            self.connection, theirs = Pipe()
            self.popen = _start(theirs, memory)
        finally:
            os.close(memory)
        theirs.close()
        self.talk(lambda: self.connection.send_bytes(pickle.dumps(setup)))

    @torch.no_grad()
    def order(self, wanted: Wanted) -> None:
        """The process is idle, and nobody reads the weights while they change."""
        state = weights_of(self.scene.model, self.scene.adapter)
        for name, tensor in self.weights.items():
            tensor.copy_(state[name])
        self.talk(lambda: self.connection.send_bytes(pickle.dumps(wanted)))

    def reply(self) -> dict[str, Any]:
        reply: dict[str, Any] | Failed = pickle.loads(self.talk(self.connection.recv_bytes))
        if isinstance(reply, Failed):
            error = TrainingError(f"sampling ahead failed: {reply.kind}: {reply.words}")
            error.add_note(reply.where)
            raise error
        return reply

    def talk(self, exchange: Callable[[], Any]) -> Any:
        try:
            return exchange()
        except (EOFError, OSError):
            self.explain_the_end()

    def explain_the_end(self) -> NoReturn:
        code = self.popen.wait()
        how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        raise TrainingError(
            f"the process that samples ahead was ended {how}; if memory was short, lag = 0 needs "
            "less. The run goes on from its last checkpoint with qiusuo train --resume"
        ) from None

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self.connection.close()


def _setup(scene: Scene[RlStage], asking: Asking, dtype: torch.dtype, threads: int) -> Setup:
    stage, model = scene.stage, scene.model
    return Setup(
        stage,
        asking.preset,
        asking.asker,
        asking.seed,
        asking.replay,
        model.config,
        layout_of(model, dtype),
        dtype,
        model.lm_head.weight.device,
        threads=threads,
        answers=stage.prompts * asking.preset.group_size,
        max_tokens=stage.max_tokens,
    )


def _shared_memory(size: int) -> int:
    """A file without a name, in memory where there are such: /dev/shm is 64 MB in containers."""
    if sys.platform == "linux":
        memory = os.memfd_create("qiusuo-weights")
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.truncate(memory, size)
    return memory


def _start(theirs: Connection, memory: int) -> subprocess.Popen[bytes]:
    descriptors = (theirs.fileno(), memory)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM, *map(str, descriptors)],
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # Ctrl-C is meant for this process
    )
