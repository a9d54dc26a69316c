"""Examples as rows of their own, padded at the end: to ask a model about whole answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qiusuo.data.examples import Example
from qiusuo.kernels.cross_entropy import IGNORE

# B examples, T places (a row's inputs).


def example_rows(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Inputs and labels [B, T]; the label is IGNORE where nothing is to be predicted."""
    longest = max(len(example.tokens) for example in examples) - 1
    inputs_BT = torch.zeros(len(examples), longest, dtype=torch.long)
    labels_BT = torch.full((len(examples), longest), IGNORE)
    for row, example in enumerate(examples):
        tokens, counted = torch.tensor(example.tokens), torch.tensor(example.counted)
        inputs_BT[row, : len(tokens) - 1] = tokens[:-1]
        labels_BT[row, : len(tokens) - 1] = tokens[1:].masked_fill(~counted[1:], IGNORE)
    return inputs_BT, labels_BT


def longest_first(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Numbers of what has these lengths, ``size`` at a time: rows of a pass are about equally
    long."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    for start in range(0, len(order), size):
        yield order[start : start + size]
