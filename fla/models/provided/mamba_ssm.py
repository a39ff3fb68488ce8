# SPDX-License-Identifier: MIT
"""Five functions of the package `mamba_ssm`, on our selective scan and our Mamba-2."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.models.provided.causal_conv1d import causal_conv1d_fn, row_boundaries
from fla.modules.layernorm import group_norm
from fla.ops.mamba import chunk_mamba, fused_recurrent_mamba
from fla.ops.mamba2 import NO_LIMIT, chunk_mamba2


def _gated(y: Tensor, z: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if z is None else promote_to_fp32(y) * F.silu(promote_to_fp32(z))).to(dtype)


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, state: Tensor | None, op: Any = chunk_mamba,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Our scan of x `[B, T, D]` with groups of channels that share B and C `[B, T, G, N]`."""
    groups = B.shape[2]
    if x.shape[2] % groups:
        raise ValueError(
            f"{op.__name__}: B has {groups} groups, which do not divide the {x.shape[2]} channels"
        )
    width = x.shape[2] // groups
    ys, finals = [], []
    for i in range(groups):
        part = slice(i * width, (i + 1) * width)
        y, final = op(
            x[..., part],
            dt[..., part],
            A[part],
            B[:, :, i],
            C[:, :, i],
            None if D is None else D[part],
            None if dt_bias is None else dt_bias[part],
            dt_softplus,
            None if state is None else state[:, part],
            True,
        )
        ys.append(y)
        finals.append(final)
    return torch.cat(ys, -1), torch.cat(finals, 1)


def _per_token(op: str, name: str, x: Tensor) -> Tensor:
    """B or C of a selective scan as `[B, T, G, N]`."""
    if x.is_complex() or x.dim() not in (3, 4):
        raise ValueError(
            f"{op}: {name} has shape {list(x.shape)} and dtype {x.dtype}; real [batch, states, "
            "time] or [batch, groups, states, time] was expected: one that is the same for all "
            "tokens, or complex, is not computed here"
        )
    return (x.unsqueeze(1) if x.dim() == 3 else x).permute(0, 3, 1, 2)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's scan, `S_t = exp(D_t A) S_{t-1} + D_t u_t B_t^T`, `y_t = (S_t C_t + D u_t)
    silu(z_t)`.

    u, delta, z `[B, D, T]`; A `[D, N]`; B, C `[B, N, T]` or `[B, G, N, T]`; D, delta_bias `[D]`.
    With `return_last_state` the result is (y, state `[B, D, N]` in fp32). `ValueError` for complex
    A, B or C, and for a B or C without a time axis.

    Example:
        >>> u, A, B = torch.ones(1, 2, 3), -torch.ones(2, 1), torch.ones(1, 1, 3)
        >>> selective_scan_fn(u, u, A, B, B).shape
        torch.Size([1, 2, 3])
    """
    op = "selective_scan_fn"
    if A.is_complex():
        raise ValueError(f"{op}: A is complex, which is not computed here; pass real rates below 0")
    y, state = _scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        _per_token(op, "B", B),
        _per_token(op, "C", C),
        D,
        delta_bias,
        delta_softplus,
        None,
    )
    y = _gated(y.transpose(1, 2), z, u.dtype)
    return (y, state) if return_last_state else y


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of the scan of Mamba or of Mamba-2; `state` is moved on in place.

    state `[B, D, N]` with x, dt, z `[B, D]`, A `[D, N]`, B, C `[B, N]`, D, dt_bias `[D]`; or each
    of D's axes as heads and channels, `[H, P]`, and B, C `[B, G, N]`. `state_batch_indices` `[B]`
    names each row's entry in a larger `state`.

    Example:
        >>> state, x, B = torch.zeros(1, 2, 1), torch.ones(1, 2), torch.ones(1, 1)
        >>> y = selective_state_update(state, x, x, -torch.ones(2, 1), B, B)
        >>> y.tolist(), state.sum().item()
        ([[1.0, 1.0]], 2.0)
    """
    N, rows = A.shape[-1], x.shape[0]
    picked = state if state_batch_indices is None else state[state_batch_indices.long()]
    before = picked.reshape(rows, -1, N)
    if torch.is_grad_enabled():
        before = before.clone()  # autograd keeps it, and the copy below overwrites `state`
    B, C = (b.view(rows, 1, -1, N) for b in (B, C))
    y, final = _scan(
        x.reshape(rows, 1, -1),
        dt.reshape(rows, 1, -1),
        A.reshape(-1, N),
        B,
        C,
        None if D is None else D.reshape(-1),
        None if dt_bias is None else dt_bias.reshape(-1),
        dt_softplus,
        before,
        fused_recurrent_mamba,
    )
    moved = final.reshape(picked.shape).to(state.dtype)
    if state_batch_indices is None:
        state.copy_(moved)
    else:
        state.index_copy_(0, state_batch_indices.long(), moved)
    return _gated(y.reshape(x.shape), z, x.dtype)


def _rms(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """RMSNorm over each of `groups` parts of the last axis, in fp32."""
    y = group_norm(promote_to_fp32(x), weight, None, eps=eps, is_rms_norm=True, num_groups=groups)
    assert isinstance(y, Tensor)
    return y


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor | None:
    """Mamba's layer from its input projection xz `[B, 2 D, T]` to its output `[B, T, out]`:
    convolution with SiLU, the projections to the step, B and C (each optionally normalised), the
    scan with its gate, and the output projection. `checkpoint_lvl` (0 or 1) changes no number.

    With `dt_rms_weight` the result is None, which tells FalconMamba of transformers to compute
    step by step: its weights were made for steps normalised before their projection, the
    published function normalises them after it.
    """
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"mamba_inner_fn: checkpoint_lvl is {checkpoint_lvl}; pass 0 or 1")
    if dt_rms_weight is not None:
        return None
    x, z = xz.chunk(2, dim=1)
    mixed = causal_conv1d_fn(x, conv1d_weight.flatten(1), conv1d_bias, activation="silu")
    assert isinstance(mixed, Tensor)
    rank, N = delta_proj_weight.shape[1], A.shape[-1]
    made = F.linear(mixed.transpose(1, 2), x_proj_weight)
    delta = F.linear(made[..., :rank], delta_proj_weight).transpose(1, 2)
    given = ((B, B_proj_bias, b_rms_weight, made[..., rank : rank + N]),
             (C, C_proj_bias, c_rms_weight, made[..., -N:]))  # fmt: skip
    inputs = []
    for tensor, bias, norm, projected in given:
        if tensor is None:
            tensor = projected if bias is None else projected + bias
            tensor = tensor if norm is None else _rms(tensor, norm, b_c_dt_rms_eps)
            tensor = tensor.transpose(1, 2)
        inputs.append(tensor)
    read_in, read_out = inputs
    y = selective_scan_fn(mixed, delta, A, read_in, read_out, D, z, delta_bias, delta_softplus)
    assert isinstance(y, Tensor)
    dtype = out_proj_weight.dtype
    return F.linear(y.transpose(1, 2).to(dtype), out_proj_weight, _cast(out_proj_bias, dtype))


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _row_states(initial: Tensor, bounds: Tensor, batch: int, T: int) -> Tensor:
    """A state for every sequence of a row: that of its row for the first in each, else zero."""
    count = bounds.shape[0] - 1
    if initial.shape[0] == count:
        return initial
    if initial.shape[0] != batch:
        raise ValueError(
            f"mamba_chunk_scan_combined: initial_states holds {initial.shape[0]} states; one for "
            f"each of the {batch} rows or of the {count} sequences was expected"
        )
    firsts = torch.searchsorted(bounds, torch.arange(batch, device=bounds.device) * T)
    return initial.new_zeros(count, *initial.shape[1:]).index_copy(0, firsts, initial)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    cu_seq_lens_q: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Mamba-2, `S_t = exp(D_t A) S_{t-1} + D_t x_t B_t^T`, `y_t = (S_t C_t + D x_t) silu(z_t)`.

    x, z `[B, T, H, P]`; dt `[B, T, H]`; A, dt_bias `[H]`; B, C `[B, T, G, N]`; D `[H]` or `[H, P]`;
    states `[B, H, P, N]`, of the last sequence of each row. `seq_idx` `[B, T]` numbers each token's
    sequence; without it `cu_seqlens` or `cu_seq_lens_q` (which the published function lacks) bound
    those of a single row. With `return_varlen_states` the states of all sequences of `cu_seqlens`
    come last. Our chunks have their own size; `chunk_size` changes no number.

    Example:
        >>> x, dt, B = torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2), torch.ones(1, 3, 1, 8)
        >>> y, state = mamba_chunk_scan_combined(
        ...     x, dt, -torch.ones(2), B, B, 64, return_final_states=True)
        >>> y.shape, state.shape
        (torch.Size([1, 3, 2, 4]), torch.Size([1, 2, 4, 8]))
    """
    op, (batch, T) = "mamba_chunk_scan_combined", x.shape[:2]
    if chunk_size < 1:
        raise ValueError(f"{op}: chunk_size is {chunk_size}; a positive number was expected")
    if return_varlen_states and (cu_seqlens is None or batch != 1):
        raise ValueError(f"{op}: return_varlen_states needs cu_seqlens and a batch of 1")
    numbers = None if return_varlen_states else seq_idx
    bounds = row_boundaries(op, x, (0, 1), numbers, cu_seqlens, cu_seq_lens_q)
    inputs, states = (x, dt, B, C), initial_states
    if bounds is not None:
        if numbers is not None:
            inputs = tuple(t.reshape(1, batch * T, *t.shape[2:]) for t in inputs)  # type: ignore[assignment]
        states = None if states is None else _row_states(states, bounds, batch, T)
    rows, steps, writes, reads = inputs
    y, final = chunk_mamba2(
        rows, steps, A, writes, reads, D, dt_bias, dt_softplus, dt_limit,
        None if states is None else states.transpose(-1, -2),
        return_final_states or return_varlen_states, bounds,
    )  # fmt: skip
    y = _gated(y.reshape(x.shape), z, x.dtype)
    if final is None:
        return y
    every = last = final.transpose(-1, -2)
    if bounds is not None:
        ends = torch.arange(1, batch + 1, device=x.device) * T
        last = every[torch.searchsorted(bounds, ends) - 1]
    return (y, *([last] if return_final_states else []), *([every] if return_varlen_states else []))


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float | None = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    cu_seq_lens_q: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's layer from its input projection zxbcdt `[B, T, 2 H P + 2 G N + H]` on: convolution,
    scan (`dt` through a softplus), the gate `silu(z)` with an RMSNorm over each group before or
    after it if `rmsnorm_weight` is given, and the output projection if there is one. The result is
    `[B, T, H P]` or `[B, T, out]`, with `return_final_states` (result, states `[B, H, P, N]`).
    The last two arguments, which the published function lacks, bound sequences of a single row.
    """
    op, width, heads = "mamba_split_conv1d_scan_combined", zxbcdt.shape[-1], A.shape[0]
    if D.dim() == 1 and headdim is None:
        raise ValueError(f"{op}: headdim is None; with one D for each head pass headdim")
    P = D.shape[1] if headdim is None else headdim
    dim, channels = heads * P, conv1d_weight.shape[0]
    if width != dim + channels + heads:
        raise ValueError(
            f"{op}: zxbcdt has {width} channels; {dim} of the gate, {channels} of the convolution "
            f"and {heads} steps were expected (an MLP's channels beside them are not computed here)"
        )
    z, mixed, dt = zxbcdt.split([dim, channels, heads], -1)
    bounds: dict[str, Any] = dict(
        seq_idx=seq_idx, cu_seq_lens_q=cu_seq_lens_q, cu_seqlens=cu_seqlens
    )
    mixed = causal_conv1d_fn(
        mixed.transpose(1, 2), conv1d_weight, conv1d_bias, activation=activation, **bounds
    ).transpose(1, 2)  # type: ignore[union-attr]
    x, B, C = mixed.split([dim, (channels - dim) // 2, (channels - dim) // 2], -1)
    B, C = (b.unflatten(-1, (ngroups, -1)) for b in (B, C))
    y = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, P)), dt, A, B, C, chunk_size,
        D, None, dt_bias, initial_states, dt_softplus=True, dt_limit=dt_limit,
        return_final_states=return_final_states, **bounds,
    )  # fmt: skip
    y, final = y if isinstance(y, tuple) else (y, None)
    y = _normed(y.flatten(2), z, rmsnorm_weight, rmsnorm_eps, ngroups, norm_before_gate)
    if outproj_weight is not None:
        dtype = outproj_weight.dtype
        y = F.linear(y.to(dtype), outproj_weight, _cast(outproj_bias, dtype))
    return y if final is None else (y, final)


def _normed(
    y: Tensor, z: Tensor, weight: Tensor | None, eps: float | None, groups: int, first: bool
) -> Tensor:
    """The gate, and a norm before it (`first`) or after it."""
    if weight is None:
        return _gated(y, z, y.dtype)
    if eps is None:
        raise ValueError("mamba_split_conv1d_scan_combined: rmsnorm_weight needs rmsnorm_eps")
    if first:
        return _gated(_rms(y, weight, eps, groups), z, y.dtype)
    return _rms(_gated(y, z, torch.promote_types(y.dtype, torch.float32)), weight, eps, groups).to(
        y.dtype
    )
