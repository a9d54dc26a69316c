"""What a training or validation step is given.

Shapes: B rows, S = sequence_length + 1 + lookahead tokens a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """Rows of tokens. A model reads the first `sequence_length`; each predicts the next one, and
    the module k of multi-token prediction the one k further, hence the lookahead.

    tokens_BS     int64, the ids
    documents_BS  int32, the number of each token's document: equal where tokens may see each
                  other, different in neighbouring documents of a row; -1 in padding
    valid_BS      bool, whether the token is there to be predicted; all true in training
    """

    tokens_BS: torch.Tensor
    documents_BS: torch.Tensor
    valid_BS: torch.Tensor

    @classmethod
    def from_arrays(
        cls, tokens_BS: np.ndarray, documents_BS: np.ndarray, valid_BS: np.ndarray | None = None
    ) -> Batch:
        """A batch of freshly made arrays, in any integer type; everything valid if not said."""
        import torch

        if valid_BS is None:
            valid_BS = np.ones(tokens_BS.shape, dtype=bool)
        return cls(
            torch.from_numpy(tokens_BS.astype(np.int64)),
            torch.from_numpy(documents_BS.astype(np.int32)),
            torch.from_numpy(valid_BS),
        )
