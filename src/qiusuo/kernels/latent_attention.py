"""Absorbed MLA where the cache stands: few queries, pages of latents, nothing gathered.

A decoding step looks at every latent of its context once per layer; bringing the pages together
first would write and read them all again. The native kernel (native/amx_attention.cpp) walks the
pages, and multiplies all heads with a block of rows while it is in the processor's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qiusuo.kernels.native import native_for

# N queries, H heads, E width of a cached row, C of its latent, p pages of s rows, S rows seen.


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


def walks_pages(q_NHE: Tensor, entries_psE: Tensor, latent: int) -> bool:
    """Whether there is a native kernel for these."""
    library = native_for(q_NHE)
    if library is None or not q_NHE.dtype == entries_psE.dtype == torch.bfloat16:
        return False
    return library.walks_pages(entries_psE.shape[2], latent, entries_psE.shape[1])


def latent_attention(
    q_NHE: Tensor,
    entries_psE: Tensor,
    table_Np: Tensor,
    lengths_N: Tensor,
    latent: int,
    scale: float,
) -> Tensor:
    """As ``latent_attention_reference``, natively; only where ``walks_pages``. A result depends on
    its own length and rows alone, not on other queries or the number of threads."""
    library = native_for(q_NHE)
    assert library is not None
    return library.latent_attention(
        q_NHE.contiguous(), entries_psE, table_Np, lengths_N, latent, scale
    )
