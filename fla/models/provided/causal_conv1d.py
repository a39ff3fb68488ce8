# SPDX-License-Identifier: MIT
"""The two functions of the package `causal_conv1d`, channels before time, on our convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.modules.convolution import causal_conv1d


def row_boundaries(
    op: str, x: Tensor, axes: tuple[int, int], seq_idx: Tensor | None, *bounds: Tensor | None
) -> Tensor | None:
    """Boundaries of the rows of `x` laid end to end (`axes` are its batch and time): where
    `seq_idx` `[B, T]` changes and where a row starts, or else the first of `bounds` there is.
    """
    if seq_idx is None:
        return next((b for b in bounds if b is not None), None)
    shape = (x.shape[axes[0]], x.shape[axes[1]])
    if tuple(seq_idx.shape) != shape:
        raise ValueError(
            f"{op}: seq_idx has shape {list(seq_idx.shape)}; [batch, time] = {list(shape)} was "
            "expected, the number of each token's sequence"
        )
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx.diff(dim=1) != 0
    first = starts.flatten().nonzero().flatten()
    return torch.cat([first, first.new_tensor([seq_idx.numel()])])


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution, `y_t = act(b + sum_i w_i x_{t-W+1+i})`, of x `[B, D, T]` with
    weight `[D, W]`.

    `seq_idx` `[B, T]` numbers each token's sequence; no tap reaches into another, and the result
    is 0 where it is negative. The last two arguments, which the published function lacks, bound the
    sequences of a single row: transformers passes one of them. States are `[B, D, W - 1]`; with
    `return_final_states` the result is (y, final states), copied to `final_states_out` if given.
    `ValueError` for boundaries together with states.

    Example:
        >>> x, w = torch.ones(1, 1, 3), torch.tensor([[1.0, 10.0]])
        >>> causal_conv1d_fn(x, w, seq_idx=torch.tensor([[0, 1, 1]])).flatten().tolist()
        [10.0, 10.0, 11.0]
    """
    op, (B, D, T) = "causal_conv1d_fn", x.shape
    bounds = row_boundaries(op, x, (0, 2), seq_idx, cu_seq_lens_q, cu_seqlens)
    if bounds is not None and (initial_states is not None or return_final_states):
        raise ValueError(
            f"{op}: boundaries (seq_idx or cu_seqlens) came with initial_states or "
            "return_final_states; pass one or the other"
        )
    if final_states_out is not None and not return_final_states:
        raise ValueError(f"{op}: final_states_out needs return_final_states=True")
    rows = x.transpose(1, 2).to(weight.dtype)
    if seq_idx is not None:
        rows = rows.reshape(1, B * T, D)
    history = None if initial_states is None else F.pad(initial_states, (1, 0)).to(weight.dtype)
    y, final = causal_conv1d(
        rows,
        weight,
        bias,
        initial_state=history,
        output_final_state=return_final_states,
        activation=activation,
        cu_seqlens=bounds,
    )
    y = y.reshape(B, T, D).transpose(1, 2).to(x.dtype)
    if seq_idx is not None:
        y = y.masked_fill((seq_idx < 0).unsqueeze(1), 0)
    if final is None:
        return y
    final = final[..., 1:].to(x.dtype)
    return y, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The tokens x `[B, D]` or `[B, D, T]` behind `conv_state` `[B, D, S]`, the last S >= W - 1
    inputs, which is moved on in place.

    With `cache_seqlens` `[B]`, the number of tokens seen so far, the state is a ring: token t lies
    at t modulo S. `conv_state_indices` `[B]` names each row's entry in a larger `conv_state`.

    Example:
        >>> state, w = torch.zeros(1, 1, 1), torch.tensor([[1.0, 10.0]])
        >>> [causal_conv1d_update(torch.ones(1, 1), state, w).item() for _ in range(2)]
        [10.0, 11.0]
    """
    op, width, kept = "causal_conv1d_update", weight.shape[-1], conv_state.shape[-1]
    if kept < width - 1:
        raise ValueError(
            f"{op}: conv_state keeps {kept} inputs; a filter of {width} taps needs {width - 1}"
        )
    tokens = x.unsqueeze(-1) if x.dim() == 2 else x
    T = tokens.shape[-1]
    state = conv_state if conv_state_indices is None else conv_state[conv_state_indices.long()]
    if cache_seqlens is None:
        history = state[..., kept - (width - 1) :]
        moved = torch.cat([state, tokens.to(state.dtype)], -1)[..., -kept:]
    else:
        if kept < T:
            raise ValueError(f"{op}: {T} tokens do not fit the ring of {kept}; pass fewer at once")
        count = cache_seqlens.long().view(-1, 1, 1)
        before = (count + torch.arange(1 - width, 0, device=x.device)) % kept
        history = state.gather(2, before.expand(-1, state.shape[1], -1))
        slots = (count + torch.arange(T, device=x.device)) % kept
        moved = state.scatter(2, slots.expand(-1, state.shape[1], -1), tokens.to(state.dtype))
    y, _ = causal_conv1d(
        tokens.transpose(1, 2).to(weight.dtype),
        weight,
        bias,
        initial_state=F.pad(history, (1, 0)).to(weight.dtype),
        activation=activation,
    )
    if conv_state_indices is None:
        conv_state.copy_(moved)
    else:
        conv_state.index_copy_(0, conv_state_indices.long(), moved)
    return y.transpose(1, 2).to(x.dtype).reshape(x.shape)
