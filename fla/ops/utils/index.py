# SPDX-License-Identifier: MIT
"""Lengths, boundaries, and where tokens and chunks of packed sequences stand.

cu_seqlens `[N+1]` bounds N sequences, some of which may be empty. Where a copy of it on the host is
at hand, `cu_seqlens_cpu` spares a device's synchronisation.
"""

from itertools import pairwise

import torch
from torch import Tensor


def prepare_lens(cu_seqlens: Tensor) -> Tensor:
    """Lengths `[N]` of the sequences.

    Example:
        >>> prepare_lens(torch.tensor([0, 2, 5])).tolist()
        [2, 3]
    """
    return cu_seqlens.diff()


def prepare_lens_from_mask(mask: Tensor) -> Tensor:
    """Real tokens per row of a mask `[B, T]`, int32 `[B]`; padding may be on any side.

    Example:
        >>> prepare_lens_from_mask(torch.tensor([[0, 1, 1], [1, 0, 0]])).tolist()
        [2, 1]
    """
    return mask.bool().sum(-1, dtype=torch.int32)


def prepare_cu_seqlens_from_lens(lens: Tensor, dtype: torch.dtype | None = torch.int32) -> Tensor:
    """Boundaries `[N+1]` of sequences of the given lengths `[N]`.

    Example:
        >>> prepare_cu_seqlens_from_lens(torch.tensor([2, 3])).tolist()
        [0, 2, 5]
    """
    return torch.nn.functional.pad(lens.cumsum(0, dtype=dtype), (1, 0))


def prepare_cu_seqlens_from_mask(mask: Tensor, dtype: torch.dtype | None = torch.int32) -> Tensor:
    """Boundaries `[B+1]` of the real tokens of a mask `[B, T]`.

    Example:
        >>> prepare_cu_seqlens_from_mask(torch.tensor([[0, 1, 1], [1, 0, 0]])).tolist()
        [0, 2, 3]
    """
    return prepare_cu_seqlens_from_lens(prepare_lens_from_mask(mask), dtype)


def prepare_split_cu_seqlens(
    batch_size: int | None = None,
    seq_len: int | None = None,
    split_size: int | None = None,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype | None = torch.int32,
    device: torch.device | str | None = "cpu",
) -> Tensor:
    """Boundaries with every sequence cut each split_size tokens: of cu_seqlens, or of batch_size
    rows of seq_len.

    Example:
        >>> prepare_split_cu_seqlens(split_size=3, cu_seqlens=torch.tensor([0, 4, 6])).tolist()
        [0, 3, 4, 6]
        >>> prepare_split_cu_seqlens(2, 3, 2).tolist()
        [0, 2, 3, 5, 6]
    """
    if split_size is None or split_size < 1:
        raise ValueError(
            f"prepare_split_cu_seqlens: split_size is {split_size}; expected at least 1"
        )
    if cu_seqlens is None:
        if batch_size is None or seq_len is None:
            raise ValueError("prepare_split_cu_seqlens: give cu_seqlens, or batch_size and seq_len")
        bounds = [i * seq_len for i in range(batch_size + 1)]
    else:
        bounds = cu_seqlens.tolist()
    pairs = pairwise(bounds)
    cuts = [cut for begin, end in pairs for cut in range(begin, end, split_size)]
    return torch.tensor([*cuts, bounds[-1]], dtype=dtype, device=device)


def _within(lens: Tensor, total: int | None = None) -> tuple[Tensor, Tensor]:
    """(sequence, place in it) of each of `lens.sum()` items."""
    sequence = torch.arange(len(lens), device=lens.device, dtype=lens.dtype)
    sequence = sequence.repeat_interleave(lens, output_size=total)
    begin = lens.cumsum(0) - lens
    return sequence, torch.arange(len(sequence), device=lens.device, dtype=lens.dtype) - begin.to(
        lens.dtype
    ).index_select(0, sequence)


def _total(cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None) -> int | None:
    return None if cu_seqlens_cpu is None else int(cu_seqlens_cpu[-1])


def prepare_position_ids(cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None = None) -> Tensor:
    """The place of every token in its sequence, `[total]`.

    Example:
        >>> prepare_position_ids(torch.tensor([0, 2, 5])).tolist()
        [0, 1, 0, 1, 2]
    """
    return _within(prepare_lens(cu_seqlens), _total(cu_seqlens, cu_seqlens_cpu))[1]


def prepare_sequence_ids(cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None = None) -> Tensor:
    """The sequence of every token, `[total]`.

    Example:
        >>> prepare_sequence_ids(torch.tensor([0, 2, 5])).tolist()
        [0, 0, 1, 1, 1]
    """
    return _within(prepare_lens(cu_seqlens), _total(cu_seqlens, cu_seqlens_cpu))[0]


def prepare_token_indices(cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None = None) -> Tensor:
    """Sequence and place of every token, `[total, 2]`.

    Example:
        >>> prepare_token_indices(torch.tensor([0, 1, 3])).tolist()
        [[0, 0], [1, 0], [1, 1]]
    """
    return torch.stack(_within(prepare_lens(cu_seqlens), _total(cu_seqlens, cu_seqlens_cpu)), 1)


def _chunks(cu_seqlens: Tensor, chunk_size: int) -> Tensor:
    """Chunks per sequence."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected at least 1")
    return (prepare_lens(cu_seqlens) + chunk_size - 1) // chunk_size


def prepare_chunk_indices(
    cu_seqlens: Tensor, chunk_size: int, cu_seqlens_cpu: Tensor | None = None
) -> Tensor:
    """Sequence and place of every chunk, `[NT, 2]`; an empty sequence has none.

    Example:
        >>> prepare_chunk_indices(torch.tensor([0, 2, 2, 5]), 2).tolist()
        [[0, 0], [2, 0], [2, 1]]
    """
    total = None if cu_seqlens_cpu is None else int(_chunks(cu_seqlens_cpu, chunk_size).sum())
    return torch.stack(_within(_chunks(cu_seqlens, chunk_size), total), 1)


def prepare_chunk_offsets(cu_seqlens: Tensor, chunk_size: int) -> Tensor:
    """Chunks before every sequence, and at the end their number, `[N+1]`.

    Example:
        >>> prepare_chunk_offsets(torch.tensor([0, 2, 2, 5]), 2).tolist()
        [0, 1, 1, 3]
    """
    return prepare_cu_seqlens_from_lens(_chunks(cu_seqlens, chunk_size), cu_seqlens.dtype)


def prepare_chunk_indices_static(
    cu_seqlens: Tensor, chunk_size: int, nt_max: int
) -> tuple[Tensor, Tensor]:
    """`prepare_chunk_indices` in nt_max rows, -1 beyond the chunks there are, and
    `prepare_chunk_offsets`; shapes do not depend on the boundaries, as a CUDA graph needs it.

    Example:
        >>> prepare_chunk_indices_static(torch.tensor([0, 2, 5]), 2, 4)[0].tolist()
        [[0, 0], [1, 0], [1, 1], [-1, -1]]
    """
    offsets = prepare_chunk_offsets(cu_seqlens, chunk_size)
    rows = torch.arange(nt_max, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(offsets[1:].contiguous(), rows, right=True).to(rows.dtype)
    place = rows - offsets[sequence.clamp(max=len(offsets) - 2)]
    pairs = torch.stack([sequence, place], 1)
    return pairs.masked_fill((rows >= offsets[-1])[:, None], -1), offsets


def get_max_num_splits(
    cu_seqlens: Tensor, chunk_size: int, cu_seqlens_cpu: Tensor | None = None
) -> int:
    """Chunks of the longest sequence.

    Example:
        >>> get_max_num_splits(torch.tensor([0, 2, 7]), 2)
        3
    """
    chunks = _chunks(cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu, chunk_size)
    return int(chunks.max()) if len(chunks) else 0
