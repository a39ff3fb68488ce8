# SPDX-License-Identifier: MIT
"""Token shift: what a token differs in from the one before it; Peng et al. (2023),
arXiv:2305.13048.
"""

import torch
from torch import Tensor

from fla.core.checks import check_sequences, check_tensors
from fla.ops.cp.context import FLACPContext, on_ranks
from fla.ops.engine.scan.running import lasts, starts


def token_shift(
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    cache: Tensor | None = None,
    output_cache: bool = False,
    cp_context: FLACPContext | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`x_{t-1} - x_t` per sequence of x `[B, T, D]`, where the token before the first is `cache`
    `[N, D]`, or 0; with `output_cache` the pair (difference, last token of every sequence).

    Example:
        >>> token_shift(torch.tensor([[[1.0], [3.0]]])).flatten().tolist()
        [-1.0, -2.0]
    """
    if cp_context is not None:
        return on_ranks(token_shift, locals())
    sizes = check_tensors("token_shift", x=(x, "B T D"), cache=(cache, "N D"))
    N = check_sequences("token_shift", sizes["B"], cu_seqlens, cache, "cache")
    first = x.new_zeros(N, x.shape[-1]) if cache is None else cache.to(x.dtype)
    delta = starts(x, first, cu_seqlens) - x
    return (delta, lasts(x, first, cu_seqlens)) if output_cache else delta


def token_shift_ref(x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """`token_shift` by a loop over the tokens."""
    bounds = {0} if cu_seqlens is None else set(cu_seqlens.tolist())
    rows = [(0 if t in bounds else x[:, t - 1]) - x[:, t] for t in range(x.shape[1])]
    return torch.stack(rows, 1)
