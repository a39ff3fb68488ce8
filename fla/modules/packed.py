# SPDX-License-Identifier: MIT
"""What callers of published kernels pass beside `cu_seqlens`."""

from torch import Tensor

from fla.ops.engine.recurrence.recurrence import host_boundaries


def check_packed(
    op: str,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> None:
    """Raise `ValueError` unless `cu_seqlens_cpu` is `cu_seqlens` on the host and `chunk_indices` is
    a table of its chunks, `[chunks, 2]`. Both follow from `cu_seqlens`: neither changes a number.

    Example:
        >>> import torch
        >>> bounds = torch.tensor([0, 3, 5])
        >>> check_packed("demo", bounds, bounds, torch.tensor([[0, 0], [1, 0]]))
    """
    host_boundaries(op, cu_seqlens, cu_seqlens_cpu)
    if chunk_indices is None:
        return
    if cu_seqlens is None:
        raise ValueError(
            f"{op}: chunk_indices is given without cu_seqlens, which it is made from; pass both or "
            "neither"
        )
    if chunk_indices.dim() != 2 or chunk_indices.shape[1] != 2:
        raise ValueError(
            f"{op}: chunk_indices has shape {list(chunk_indices.shape)}; expected [chunks, 2], as "
            "prepare_chunk_indices makes it, or None"
        )
