# SPDX-License-Identifier: MIT
"""What layers written for the published package import: padding taken out and put back, and their
place in a cache. The layers here use `SequenceLayout` and `Mixer` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fla.ops.utils.index import prepare_cu_seqlens_from_lens, prepare_lens_from_mask


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """x `[N, ...]` at indices `[M]`: `[M, ...]`, with a gradient.

    Example:
        >>> index_first_axis(torch.arange(4), torch.tensor([3, 1])).tolist()
        [3, 1]
    """
    return x.index_select(0, indices)


def index_put_first_axis(x: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """`[first_axis_dim, ...]` with x `[M, ...]` at indices `[M]` and zeros elsewhere.

    Example:
        >>> index_put_first_axis(torch.tensor([5, 6]), torch.tensor([3, 1]), 4).tolist()
        [0, 6, 0, 5]
    """
    return x.new_zeros(first_axis_dim, *x.shape[1:]).index_copy(0, indices, x)


def get_unpad_data(attention_mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """(indices of the real tokens in the flattened mask `[B, T]`, their boundaries int32 `[B+1]`,
    the longest row).

    Example:
        >>> indices, cu_seqlens, longest = get_unpad_data(torch.tensor([[0, 1], [1, 1]]))
        >>> indices.tolist(), cu_seqlens.tolist(), longest
        ([1, 2, 3], [0, 1, 3], 2)
    """
    if attention_mask.dim() != 2:
        raise ValueError(
            f"get_unpad_data: attention_mask has shape {list(attention_mask.shape)}; expected "
            "[B, T], with 1 for real tokens and 0 for padding"
        )
    lengths = prepare_lens_from_mask(attention_mask)
    longest = int(lengths.max()) if len(lengths) else 0
    indices = attention_mask.flatten().nonzero().flatten()
    return indices, prepare_cu_seqlens_from_lens(lengths), longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch_size: int, seq_len: int) -> Tensor:
    """Real tokens `[total, ...]` back to `[B, T, ...]`, zeros at the padding.

    Example:
        >>> pad_input(torch.tensor([7, 8, 9]), torch.tensor([1, 2, 3]), 2, 2).tolist()
        [[0, 7], [8, 9]]
    """
    flat = index_put_first_axis(hidden_states, indices, batch_size * seq_len)
    return flat.unflatten(0, (batch_size, seq_len))


def unpad_input(
    q: Tensor,
    states: Sequence[Tensor],
    attention_mask: Tensor,
    q_len: int,
    keepdim: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, tuple[Tensor, Tensor], tuple[int, int]]:
    """Real tokens of q `[B, q_len, ...]` and of states, each `[B, S, ...]`, by attention_mask
    `[B, S]`; q_len is S, or 1 for one new token per row.

    Returns (q `[total_q, ...]`, states `[total, ...]`, indices of q, boundaries of q and of the
    states, longest rows of both); `keepdim` keeps a first dimension of 1.

    Example:
        >>> x = torch.arange(4.0).view(2, 2, 1)
        >>> q, (k,), *_ = unpad_input(x, (x,), torch.tensor([[0, 1], [1, 1]]), 2)
        >>> q.flatten().tolist(), k.shape
        ([1.0, 2.0, 3.0], torch.Size([3, 1]))
    """
    indices, cu_seqlens, longest = get_unpad_data(attention_mask)
    length = attention_mask.shape[1]
    if q_len not in (1, length):
        raise ValueError(
            f"unpad_input: q_len is {q_len}; expected {length} as the mask's length, or 1"
        )
    states = tuple(index_first_axis(x.flatten(0, 1), indices) for x in states)
    indices_q, cu_q, longest_q = indices, cu_seqlens, longest
    if q_len == length:
        q = index_first_axis(q.flatten(0, 1), indices)
    else:
        cu_q = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
        indices_q, longest_q, q = cu_q[:-1], 1, q.squeeze(1)
    if keepdim:
        q, states = q.unsqueeze(0), tuple(x.unsqueeze(0) for x in states)
    return q, states, indices_q, (cu_q, cu_seqlens), (longest_q, longest)


def unpad_hidden_states(
    hidden_states: Tensor,
    cu_seqlens: Tensor | None,
    attention_mask: Tensor | None,
    q_len: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """hidden_states `[B, T, D]` without the padding of the mask's last q_len columns: (`[1, total,
    D]`, indices, boundaries). Unchanged, with indices None, where cu_seqlens is given or there is
    no mask.
    """
    if attention_mask is None or cu_seqlens is not None:
        return hidden_states, None, cu_seqlens
    indices, cu_seqlens, _ = get_unpad_data(attention_mask[:, -q_len:])
    return index_first_axis(hidden_states.flatten(0, 1), indices)[None], indices, cu_seqlens


def repad_hidden_states(
    hidden_states: Tensor, indices: Tensor | None, batch_size: int, q_len: int
) -> Tensor:
    """The inverse of `unpad_hidden_states`."""
    if indices is None:
        return hidden_states
    return pad_input(hidden_states.squeeze(0), indices, batch_size, q_len)


def require_cache_layer_idx(module: Any, past_key_values: Any) -> int | None:
    """`module.layer_idx`, or `ValueError` where there is a cache and the module has none."""
    layer_idx: int | None = getattr(module, "layer_idx", None)
    if past_key_values is not None and layer_idx is None:
        raise ValueError(
            f"{type(module).__name__}: a cache needs layer_idx; pass layer_idx to the constructor"
        )
    return layer_idx


def get_layer_cache(module: Any, past_key_values: Any) -> dict[str, Any] | None:
    """The states that the module's layer keeps, by name; None before it was written."""
    layer_idx = require_cache_layer_idx(module, past_key_values)
    if layer_idx is None or past_key_values is None or len(past_key_values) <= layer_idx:
        return None
    states: dict[str, Any] = past_key_values[layer_idx]
    return None if all(x is None for x in states.values()) else states


def update_layer_cache(module: Any, past_key_values: Any, **states: Any) -> None:
    """`past_key_values.update(**states)` at the module's layer; nothing without a cache."""
    layer_idx = require_cache_layer_idx(module, past_key_values)
    if past_key_values is not None:
        past_key_values.update(layer_idx=layer_idx, **states)
