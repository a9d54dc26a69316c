"""The stage ``teach``: a teacher reads examples and writes down what it would have said at each
counted token (distributions.py), for students to learn in a stage ``distil``.

What it reads are the sources of ``sft``; answers of its own are those that a ``sample`` stage with
the same ``model`` kept.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qiusuo.data.errors import DataError
from qiusuo.data.examples import Example, ExampleSource
from qiusuo.kernels.cross_entropy import IGNORE
from qiusuo.kernels.distribution_match import LEAST
from qiusuo.kernels.token_logprobs import chunk_rows, logits_of
from qiusuo.training.distributions import About, TaughtExample, write_index, write_shard
from qiusuo.training.example_rows import example_rows, longest_first
from qiusuo.training.named_models import named_model, same_vocabulary
from qiusuo.training.scene import Scene
from qiusuo.training.seeds import seed_of
from qiusuo.training.sft import source_of
from qiusuo.training.stages import TeachStage
from qiusuo.training.state import StageState

CHUNK_ELEMENTS = 1 << 22  # logits at a time: 16 MiB in float32

# B examples of a pass, T places, N counted tokens, D hidden, W vocabulary, V values that are kept.


class Teaching:
    """A step is one shard. Shards that a killed run wrote after its last checkpoint are written
    again, with the same numbers in them."""

    def __init__(self, scene: Scene[TeachStage]) -> None:
        stage = scene.stage
        self.scene, self.stage = scene, stage
        self.dtype = torch.bfloat16 if stage.precision == "bfloat16" else torch.float32
        self.model, teacher = scene.model, scene.recipe.name
        if stage.model is not None:
            named = named_model(scene, stage.model, self.dtype)
            same_vocabulary(scene, named, stage.model)
            self.model, teacher = named.model, stage.model
        tokenizer, size = scene.tokenizer, len(self.model.lm_head.weight)
        top = None if stage.top is None or stage.top >= size else stage.top
        self.about = About(teacher, tokenizer.fingerprint, size, top)
        sources = [source_of(scene, source) for source in stage.sources]
        weights = [source.weight for source in stage.sources]
        self.seed = seed_of(f"{scene.recipe.seed}/{stage.name}")
        self.reading = Reading(sources, weights, stage.count, self.seed)
        self.shards: list[dict[str, Any]] = []
        steps = -(-self.reading.count // stage.batch)
        self.state = StageState(scene.model, [], self, stage.name, steps, adapter=scene.adapter)
        self.folder = scene.distributions_path(stage.name)

    def state_dict(self) -> dict[str, Any]:
        return {"reading": self.reading.state_dict(), "shards": list(self.shards)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reading.load_state_dict(state["reading"])
        self.shards = list(state["shards"])

    def look(self, whole: bool) -> Iterator[dict[str, Any]]:
        return iter(())

    def close(self) -> None:
        return

    def run(self, after_step: Callable[[], bool]) -> None:
        state = self.state
        while state.step < state.planned:
            start = time.perf_counter()
            examples = self.reading.take(self.stage.batch)
            taught = self.taught(examples)
            self.shards.append(write_shard(self.folder, state.step, self.about, taught))
            write_index(self.folder, self.about, self.shards)
            state.step += 1
            state.run_step += 1
            state.tokens += self.shards[-1]["counted"]
            state.seconds += time.perf_counter() - start
            self.tell()
            if after_step():
                return

    def tell(self) -> None:
        rows, size = (sum(shard[key] for shard in self.shards) for key in ("counted", "bytes"))
        text = (
            f"{self.stage.name}: {self.reading.taken} of {self.reading.count} examples, "
            f"{rows} tokens, {size / 1e6:.1f} MB ({size / rows:.0f} bytes a token)"
        )
        self.scene.record({"kind": "event", "step": self.state.run_step, "text": text})

    @torch.no_grad()
    def taught(self, examples: Sequence[Example]) -> list[TaughtExample]:
        """The examples with what the teacher says to them, in their order."""
        limit = self.model.config.max_position_embeddings
        for example in examples:
            if len(example.tokens) > limit:
                raise DataError(
                    f"{example.origin or 'an example'} has {len(example.tokens)} tokens, over the "
                    f"teacher's max_position_embeddings {limit}: leave it out"
                )
        found: dict[int, TaughtExample] = {}
        lengths = [len(example.tokens) for example in examples]
        for part in longest_first(lengths, self.stage.micro_batch_size):
            chosen = [examples[number] for number in part]
            for number, one in zip(part, self.taught_rows(chosen), strict=True):
                found[number] = one
        return [found[number] for number in range(len(examples))]

    def taught_rows(self, examples: Sequence[Example]) -> Iterator[TaughtExample]:
        head_WD = self.model.lm_head.weight
        inputs_BT, labels_BT = (x.to(head_WD.device) for x in example_rows(examples))
        device = head_WD.device.type
        with torch.autocast(device, self.dtype, self.dtype != torch.float32):
            x_BTD = self.model(inputs_BT).x_BTD
        mask_BT = labels_BT != IGNORE
        logprobs_NV, ids_NV = self.rows_of(x_BTD[mask_BT])
        row = 0
        for example, count in zip(examples, mask_BT.sum(1).tolist(), strict=True):
            here = slice(row, row + count)
            row += count
            yield TaughtExample(
                example.tokens,
                example.counted,
                example.origin,
                logprobs_NV=logprobs_NV[here],
                ids_NV=None if ids_NV is None else ids_NV[here],
            )

    def rows_of(self, x_ND: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """What is kept of each distribution, a chunk at a time: the head's product in float32."""
        head_WD = self.model.lm_head.weight.float()
        logprobs, ids = [], []
        for x_CD in x_ND.float().split(chunk_rows(head_WD, CHUNK_ELEMENTS)):
            p_CV = logits_of(x_CD, head_WD).log_softmax(-1)
            if self.about.top is not None:
                p_CV, ids_CV = p_CV.topk(self.about.top)
                ids.append(ids_CV.cpu().numpy())
            logprobs.append(p_CV.clamp_min(LEAST).half().cpu().numpy())
        return np.concatenate(logprobs), np.concatenate(ids) if ids else None


class Reading:
    """``count`` examples of several sources, drawn by weight; finite ones are read through once, in
    their order. Which one comes is a function of how many came, and the places in the sources."""

    def __init__(
        self, sources: Sequence[ExampleSource], weights: Sequence[float], count: int, seed: int
    ) -> None:
        self.sources, self.weights, self.seed, self.taken = sources, weights, seed, 0
        lengths = [source.length for source in sources]
        whole = sum(length for length in lengths if length is not None)
        self.count = count if None in lengths else min(count, whole)
        self.places = [0] * len(sources)

    def take(self, count: int) -> list[Example]:
        """The next ones, fewer at the end."""
        return [self._next() for _ in range(min(count, self.count - self.taken))]

    def _next(self) -> Example:
        left = [
            number
            for number, source in enumerate(self.sources)
            if source.length is None or self.places[number] < source.length
        ]
        chance = random.Random(f"reading/{self.seed}/{self.taken}")
        [number] = chance.choices(left, [self.weights[number] for number in left])
        self.taken += 1
        self.places[number] += 1
        return self.sources[number].example(self.places[number] - 1)

    def state_dict(self) -> dict[str, Any]:
        return {
            "taken": self.taken,
            "places": list(self.places),
            "sources": [source.fingerprint for source in self.sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """DataError where the sources are others."""
        if state["sources"] != [source.fingerprint for source in self.sources]:
            raise DataError(
                "the sources are others than when this run was interrupted: put the files back as "
                "they were, or start anew"
            )
        self.taken, self.places = state["taken"], list(state["places"])
