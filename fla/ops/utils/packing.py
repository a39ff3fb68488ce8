# SPDX-License-Identifier: MIT
"""Padded rows to packed sequences and back, and means of blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fla.core.checks import check_boundaries
from fla.core.precision import promote_to_fp32
from fla.ops.utils.index import prepare_token_indices


def _places(name: str, cu_seqlens: Tensor, length: int, side: str) -> tuple[Tensor, Tensor]:
    """(row, column) of every packed token in rows of `length`."""
    if side not in ("left", "right"):
        raise ValueError(f"{name}: padding_side is {side!r}; expected 'left' or 'right'")
    lens = cu_seqlens.diff()
    if len(lens) and int(lens.max()) > length:
        raise ValueError(
            f"{name}: cu_seqlens holds a sequence of {int(lens.max())} tokens; rows have {length}"
        )
    row, column = prepare_token_indices(cu_seqlens).long().unbind(1)
    return row, column + (length - lens.long()[row] if side == "left" else 0)


def pack_sequence(x: Tensor, cu_seqlens: Tensor, padding_side: str = "left") -> Tensor:
    """Rows `[N, S, ...]` padded on one side to packed tokens `[total, ...]`.

    Example:
        >>> pack_sequence(torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1, 3])).tolist()
        [1, 2, 3]
    """
    return x[_places("pack_sequence", cu_seqlens, x.shape[1], padding_side)]


def unpack_sequence(
    x: Tensor,
    cu_seqlens: Tensor,
    padding_side: str = "left",
    desired_shape: Sequence[int] | None = None,
) -> Tensor:
    """Packed tokens `[total, ...]` to rows `[N, S, ...]`, zeros at the padding; S is the longest
    sequence, or that of desired_shape.

    Example:
        >>> unpack_sequence(torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3])).tolist()
        [[0, 1], [2, 3]]
    """
    rows = len(cu_seqlens) - 1
    longest = int(cu_seqlens.diff().max()) if rows else 0
    shape = list(desired_shape or (rows, longest, *x.shape[1:]))
    if shape[0] != rows or shape[2:] != list(x.shape[1:]):
        raise ValueError(
            f"unpack_sequence: desired_shape is {shape}; expected [N={rows}, S, "
            f"*{list(x.shape[1:])}]"
        )
    places = _places("unpack_sequence", cu_seqlens, shape[1], padding_side)
    return x.new_zeros(shape).index_put(places, x)


def mean_pooling(x: Tensor, chunk_size: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """Means over blocks of chunk_size tokens of `[B, T, H, D]`: `[B, NT, H, D]`. A short last block
    is divided by its own length; with cu_seqlens (B = 1) the blocks of all sequences follow each
    other.

    Example:
        >>> mean_pooling(torch.tensor([1.0, 3.0, 5.0]).view(1, 3, 1, 1), 2).flatten().tolist()
        [2.0, 5.0]
    """
    if chunk_size < 1:
        raise ValueError(f"mean_pooling: chunk_size is {chunk_size}; expected at least 1")
    parts = [x]
    if cu_seqlens is not None:
        check_boundaries("mean_pooling", x.shape[0], cu_seqlens)
        parts = list(x.split(cu_seqlens.diff().tolist(), 1))
    blocks = [block for part in parts if part.shape[1] for block in part.split(chunk_size, 1)]
    if not blocks:
        return x[:, :0]
    return torch.stack([promote_to_fp32(block).mean(1) for block in blocks], 1).to(x.dtype)
