"""Absorbed MLA where the cache stands: few queries, pages of latents, nothing gathered.

A decoding step looks at every latent of its context once per layer; bringing the pages together
first would write and read them all again. The native kernel (native/amx_attention.cpp) walks the
pages, and multiplies all heads with a block of rows while it is in the processor's cache. Rows with
latents in int8 (cached_rows.py) it unpacks there, so that memory gives their bytes and no more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qiusuo.kernels.cached_rows import Int8Rows
from qiusuo.kernels.native import native_for

# N queries, H heads, E numbers of a row, C of its latent, p pages of s rows, S rows seen,
# W elements that a row takes in the cache: E, or the bytes of an int8 row.


def latent_attention_reference(
    q_NHE: Tensor,
    entries_psE: Tensor,
    table_Np: Tensor,
    lengths_N: Tensor,
    latent: int,
    scale: float,
) -> Tensor:
    """The equation in float32 [N, H, C]: query n attends to the first ``lengths[n]`` rows of its
    pages, whose first ``latent`` numbers are also the values."""
    outs = []
    for q_HE, table_p, length in zip(q_NHE.float(), table_Np, lengths_N.tolist(), strict=True):
        rows_SE = entries_psE[table_p].flatten(0, 1)[:length].float()
        weights_HS = (q_HE @ rows_SE.T * scale).softmax(-1)
        outs.append(weights_HS @ rows_SE[:, :latent])
    return torch.stack(outs).to(q_NHE.dtype)


def walks_pages(q_NHE: Tensor, entries_psW: Tensor, latent: int) -> bool:
    """Whether there is a native kernel for these."""
    library, (_, size, stored), width = native_for(q_NHE), entries_psW.shape, q_NHE.shape[-1]
    if library is None or q_NHE.dtype != torch.bfloat16:
        return False
    if entries_psW.dtype == torch.uint8:
        expected = Int8Rows(latent, width - latent, torch.bfloat16).width
    else:
        expected = width if entries_psW.dtype == torch.bfloat16 else -1
    return stored == expected and library.walks_pages(width, latent, size)


def latent_attention(
    q_NHE: Tensor,
    entries_psW: Tensor,
    table_Np: Tensor,
    lengths_N: Tensor,
    latent: int,
    scale: float,
) -> Tensor:
    """As ``latent_attention_reference`` of the numbers that the rows mean, natively; only where
    ``walks_pages``. A result depends on its own length and rows alone, not on other queries or the
    number of threads."""
    library = native_for(q_NHE)
    assert library is not None
    return library.latent_attention(
        q_NHE.contiguous(), entries_psW, table_Np, lengths_N, latent, scale
    )
