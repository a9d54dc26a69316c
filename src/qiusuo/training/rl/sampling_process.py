"""The process that samples ahead: a model of its own, an engine, and one batch after the other.

It is started by ahead.py, reads weights where that one writes them, and ends when its starter does,
however that happens: then the other end of the connection is closed.
"""

from __future__ import annotations

import mmap
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from qiusuo.evaluation.asking import Asker
from qiusuo.model.config import ModelConfig
from qiusuo.model.transformer import Transformer
from qiusuo.training.hardware import keep_freed_memory
from qiusuo.training.rl.asking import Asking, packed
from qiusuo.training.rl.policy_presets import Preset
from qiusuo.training.rl.questions import Questions
from qiusuo.training.speaking import in_dtype, sampler_of
from qiusuo.training.stages import RlStage

ALIGNMENT = 64  # bytes

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Setup:
    """What the process is told first. ``answers`` and ``max_tokens`` as ``Speaker`` has them."""

    stage: RlStage
    preset: Preset
    asker: Asker
    seed: int
    replay: bool
    config: ModelConfig
    layout: Layout
    dtype: torch.dtype
    device: torch.device
    threads: int
    answers: int
    max_tokens: int


@dataclass(frozen=True)
class Wanted:
    """The batch of a step, by the weights that now lie in the shared memory; ``questions``: their
    places before it."""

    step: int
    version: int
    questions: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """In the words of the error."""

    kind: str
    words: str
    where: str


def layout_of(model: Transformer, dtype: torch.dtype) -> Layout:
    """Parameters as they are sampled with; buffers (the routers' biases) keep their type. A tied
    head is told of once."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    return {
        name: (dtype if name in parameters else tensor.dtype, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name in parameters or name in buffers
    }


def size_of(layout: Layout) -> int:
    """Bytes."""
    return sum(_whole(dtype.itemsize * prod(shape)) for dtype, shape in layout.values())


def tensors_in(memory: mmap.mmap, layout: Layout) -> dict[str, Tensor]:
    """The weights where they lie."""
    found, offset = {}, 0
    for name, (dtype, shape) in layout.items():
        count = prod(shape)
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)
        found[name] = flat.view(shape)
        offset += _whole(dtype.itemsize * count)
    return found


def _whole(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def main() -> None:
    """Arguments: descriptors of the connection and of the shared memory."""
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever trains decides when it ends
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    wanted: queue.SimpleQueue[Any] = queue.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(connection, wanted), daemon=True)
    listener.start()
    try:
        _serve(connection, wanted, int(sys.argv[2]))
    except Exception as error:
        failed = Failed(type(error).__name__, str(error), traceback.format_exc())
        with suppress(OSError):
            connection.send_bytes(pickle.dumps(failed))
        listener.join()  # until the words are read


def _listen(connection: Connection, wanted: queue.SimpleQueue[Any]) -> None:
    while True:
        try:
            wanted.put(pickle.loads(connection.recv_bytes()))
        except (EOFError, OSError):
            os._exit(0)  # in the middle of whatever it is: nobody waits for it


def _serve(connection: Connection, wanted: queue.SimpleQueue[Any], memory: int) -> None:
    setup: Setup = wanted.get()
    torch.set_num_threads(setup.threads)
    torch.set_flush_denormal(True)  # as where the weights are trained (train.py)
    keep_freed_memory()
    weights = tensors_in(mmap.mmap(memory, size_of(setup.layout)), setup.layout)
    model = in_dtype(Transformer(setup.config).to(setup.device), setup.dtype)
    lm = sampler_of(model, None, answers=setup.answers, max_tokens=setup.max_tokens)
    stage = setup.stage
    questions = Questions(stage.tasks, stage.curriculum, setup.seed)
    asking = Asking(stage, setup.preset, setup.asker, questions, setup.seed, setup.replay)
    while True:
        order: Wanted = wanted.get()
        questions.load_state_dict(order.questions)
        lm.engine.swap_weights(weights)
        batch = packed(asking.batch(lm, order.step, order.version))
        reply = {"batch": batch, "questions": questions.state_dict()}
        connection.send_bytes(pickle.dumps(reply))
