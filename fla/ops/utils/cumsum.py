# SPDX-License-Identifier: MIT
"""Running sums along time that restart at boundaries, or at every chunk."""

from itertools import pairwise

import torch
from torch import Tensor

from fla.core.checks import check_boundaries
from fla.core.precision import promote_to_fp32
from fla.ops.utils.index import prepare_split_cu_seqlens


def _restarting(x: Tensor, bounds: list[int], reverse: bool) -> Tensor:
    """Inclusive sums along dimension 1 within each piece."""
    parts = x.split([b - a for a, b in pairwise(bounds)], 1)
    if reverse:
        return torch.cat([part.flip(1).cumsum(1).flip(1) for part in parts], 1)
    return torch.cat([part.cumsum(1) for part in parts], 1)


def _finish(
    name: str,
    x: Tensor,
    bounds: list[int],
    reverse: bool,
    scale: float | None,
    output_dtype: torch.dtype | None,
) -> Tensor:
    if x.dim() not in (3, 4):
        raise ValueError(f"{name}: got shape {list(x.shape)}; expected [B, T, H] or [B, T, H, S]")
    if bounds[-1] != x.shape[1]:
        raise ValueError(f"{name}: cu_seqlens ends at {bounds[-1]}; expected T={x.shape[1]}")
    wide = promote_to_fp32(x)
    y = _restarting(wide, bounds, reverse) if x.shape[1] else wide
    y = y if scale is None else y * scale
    return y.to(x.dtype if output_dtype is None else output_dtype)


def chunk_global_cumsum(
    s: Tensor,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    output_dtype: torch.dtype | None = torch.float,
) -> Tensor:
    """scale * sum_{u <= t} s_u of `[B, T, H]` or `[B, T, H, S]`, per sequence of cu_seqlens;
    `reverse` sums over u >= t. output_dtype None keeps that of s.

    Example:
        >>> x = torch.ones(1, 4, 1)
        >>> chunk_global_cumsum(x, cu_seqlens=torch.tensor([0, 1, 4])).flatten().tolist()
        [1.0, 1.0, 2.0, 3.0]
    """
    if cu_seqlens is not None:
        check_boundaries("chunk_global_cumsum", s.shape[0], cu_seqlens)
    bounds = [0, s.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    return _finish("chunk_global_cumsum", s, bounds, reverse, scale, output_dtype)


def chunk_local_cumsum(
    g: Tensor,
    chunk_size: int,
    reverse: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    output_dtype: torch.dtype | None = torch.float,
    chunk_indices: Tensor | None = None,
    use_graph: bool = False,
) -> Tensor:
    """`chunk_global_cumsum` that also restarts every chunk_size tokens, a power of two.
    chunk_indices follow from cu_seqlens and change nothing, nor does use_graph.

    Example:
        >>> chunk_local_cumsum(torch.ones(1, 5, 1), 2).flatten().tolist()
        [1.0, 2.0, 1.0, 2.0, 1.0]
    """
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_local_cumsum: chunk_size is {chunk_size}; expected a power of two")
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, g.shape[1]])
    else:
        check_boundaries("chunk_local_cumsum", g.shape[0], cu_seqlens)
    bounds = prepare_split_cu_seqlens(split_size=chunk_size, cu_seqlens=cu_seqlens).tolist()
    return _finish("chunk_local_cumsum", g, bounds, reverse, scale, output_dtype)


# The published package has one kernel per rank; here a rank is read from the tensor.
chunk_global_cumsum_scalar = chunk_global_cumsum_vector = chunk_global_cumsum
chunk_local_cumsum_scalar = chunk_local_cumsum_vector = chunk_local_cumsum
