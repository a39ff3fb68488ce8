# SPDX-License-Identifier: MIT
"""Token shift: what a token differs in from the one before it; Peng et al. (2023),
arXiv:2305.13048.
"""

from typing import Any

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_sequences, check_tensors
from fla.core.parallel import refuse_sharded
from fla.ops.cp.context import FLACPContext, on_ranks
from fla.ops.engine.recurrence.recurrence import check_packed
from fla.ops.engine.scan.running import lasts, starts


@checked
def token_shift(
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    cache: Tensor | None = None,
    output_cache: bool = False,
    chunk_indices: Tensor | None = None,
    cp_context: FLACPContext | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`x_{t-1} - x_t` per sequence of x `[B, T, D]`, where the token before the first is `cache`
    `[N, D]`, or 0; with `output_cache` the pair (difference, last token of every sequence).
    `chunk_indices`, which published kernels take, follows from `cu_seqlens` and is only checked.

    Example:
        >>> token_shift(torch.tensor([[[1.0], [3.0]]])).flatten().tolist()
        [-1.0, -2.0]
    """
    if cp_context is not None:
        return on_ranks(token_shift, locals())
    sizes = check_tensors("token_shift", x=(x, "B T D"), cache=(cache, "N D"))
    check_packed("token_shift", cu_seqlens, chunk_indices=chunk_indices)
    N = check_sequences("token_shift", sizes["B"], cu_seqlens, cache, "cache")
    first = x.new_zeros(N, x.shape[-1]) if cache is None else cache.to(x.dtype)
    delta = starts(x, first, cu_seqlens) - x
    return (delta, lasts(x, first, cu_seqlens)) if output_cache else delta


@checked
def token_shift_cp(
    x: Tensor,
    cp_context: FLACPContext,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> Tensor:
    """`token_shift` of a rank's tokens, in the published order of arguments."""
    return token_shift(x, cu_seqlens, chunk_indices=chunk_indices, cp_context=cp_context)  # type: ignore[return-value]  # no cache is asked for


@checked
def token_shift_ref(x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """`token_shift` by a loop over the tokens."""
    bounds = {0} if cu_seqlens is None else set(cu_seqlens.tolist())
    rows = [(0 if t in bounds else x[:, t - 1]) - x[:, t] for t in range(x.shape[1])]
    return torch.stack(rows, 1)


class TokenShift(torch.autograd.Function):
    """`token_shift` as one step of autograd, which keeps no tensor of the size of x: `apply(x,
    cu_seqlens, cache, output_cache, chunk_indices)` returns (difference, last tokens or None).

    Example:
        >>> delta, _ = TokenShift.apply(torch.tensor([[[1.0], [3.0]]]))
        >>> delta.flatten().tolist()
        [-1.0, -2.0]
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: Tensor | None = None,
        output_cache: bool = False,
        chunk_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        refuse_sharded("TokenShift", "it has a gradient of its own; call token_shift instead")
        delta, last = token_shift(x, cu_seqlens, cache, True, chunk_indices=chunk_indices)
        ctx.save_for_backward(cu_seqlens, cache)
        ctx.x = (x.shape, x.dtype, x.device)
        return delta, last if output_cache else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, ddelta: Tensor, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        cu_seqlens, cache = ctx.saved_tensors
        shape, dtype, device = ctx.x
        # a linear map: its gradient does not look at x
        leaves = [torch.zeros(shape, dtype=dtype, device=device)]
        leaves += [] if cache is None else [cache.detach().clone()]
        before = None if cache is None else leaves[1]
        with torch.enable_grad():
            for leaf in leaves:
                leaf.requires_grad_()
            outputs = token_shift(leaves[0], cu_seqlens, before, True)
        known = ((y, dy) for y, dy in zip(outputs, (ddelta, dlast), strict=True) if dy is not None)
        ys, dys = zip(*known, strict=True)
        dx, *dcache = torch.autograd.grad(ys, leaves, dys)
        return dx, None, dcache[0] if dcache else None, None, None
