# SPDX-License-Identifier: MIT
r"""# Log-linear attention: a weight for every power of two of the distance

Guo et al. (2025), *Log-Linear Attention*, arXiv:2506.04761.

    o_t = sum_l lambda_t^(l) (S_t^(l))^T q_t        S_t = sum_l S_t^(l): gated linear attention

S^(0) is the token's own k v^T. The tokens before t lie in buckets of 1, 2, 4, ... tokens, one per
bit that is set in t; token s is in the bucket of the highest bit in which s and t differ:

    l(t, s) = 0 for s = t, else 1 + floor(log2(t xor s))

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, G, K]`, one group or any G that divides H |
| v | `v` | `[B, T, H, V]` |
| g | `g` | `[B, T, H]`, natural log of the decay, any value <= 0 including -inf |
| lambda | `level_scales` | `[B, T, H, L]`, L >= 1 + the bits of the last position |
| S, t | `initial_state`, result | `LogLinearAttentionState([N, H, L, K, V] fp32, [N])` |

There is no scale: q comes as it is read. The state holds the buckets of levels 1 .. L and the
number of tokens seen, so a sequence can continue at any token; t counts from there.

Numerics: as `simple_gla`.

On the one equation: a hierarchy of members of scalar decay without erase. Seen from token t, all
that an earlier chunk start e kept in bucket m lies in bucket max(m, l(t, e)), so chunks may start
anywhere and every level map is a matter of integers.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fla._arguments import checked, refuse_symbolic
from fla.core.boundaries import boundaries_to_list, count_sequences
from fla.core.checks import (
    check_groups,
    check_log_decay,
    check_parts,
    check_sequences,
    check_tensors,
)
from fla.core.precision import promote_to_fp32
from fla.core.stage import Form, Stage, first_tensor
from fla.ops.case import QKV, OpCase, literal
from fla.ops.engine.recurrence.equation import LOG_ZERO
from fla.ops.engine.recurrence.recurrence import check_chunk_size
from fla.ops.engine.recurrence.terms import CHUNK_SIZE


class LogLinearAttentionState(NamedTuple):
    """The buckets of levels 1 .. L, and the tokens seen by every sequence."""

    levels: Tensor
    offsets: Tensor


def level(t: Tensor, s: Tensor) -> Tensor:
    """`l(t, s)`: the bits of `t xor s`."""
    difference = torch.bitwise_xor(t, s)
    bits = torch.arange(62, device=difference.device)
    return (torch.bitwise_right_shift(difference.unsqueeze(-1), bits) > 0).sum(-1)


@checked
def naive_log_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, level_scales: Tensor, scale: float | None = 1.0
) -> Tensor:
    """The definition, as one masked matrix with a weight for every pair."""
    T, heads = v.shape[1:3]
    q = q * _scale(q, scale)
    q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    position = torch.arange(T)
    levels = level(position[:, None], position[None]).tril()
    weights = level_scales.transpose(1, 2).gather(3, levels.expand(*v.shape[0:1], heads, T, T))
    G = g.mT.cumsum(-1)
    above = torch.ones_like(levels).bool().triu(1)
    D = (G[..., :, None] - G[..., None, :]).masked_fill(above, -torch.inf)
    return torch.einsum("bihk,bjhk,bhij,bjhv->bihv", q, k, weights * D.exp(), v)


@literal()
def naive_recurrent_log_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor,
    initial_state: LogLinearAttentionState | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, LogLinearAttentionState | None]:
    """Token by token: read every bucket, then merge those below the lowest bit not set in t."""
    (B, T, H, V), L = v.shape, level_scales.shape[-1]
    q, k = (x.repeat_interleave(H // x.shape[2], 2) for x in (q, k))
    S, offsets = initial_state or (v.new_zeros(B, H, L, q.shape[-1], V), torch.zeros(B).long())
    out = []
    for t in range(T):
        S = g[:, t, :, None, None, None].exp() * S
        kv = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        buckets = torch.cat([kv.unsqueeze(2), S[:, :, :-1]], 2)
        read = torch.einsum("bhlkv,bhk->bhlv", buckets, q[:, t])
        out.append(torch.einsum("bhlv,bhl->bhv", read, level_scales[:, t]))
        rows = []
        for b, now in enumerate((offsets + t).tolist()):
            to = ((now ^ (now + 1)).bit_length()) - 1  # the ones at the end of t
            merged = kv[b] + S[b, :, : to + 1].sum(1)
            parts = [torch.zeros_like(S[b, :, :to]), merged[:, None], S[b, :, to + 1 :]]
            rows.append(torch.cat(parts, 1))
        S = torch.stack(rows)
    final = LogLinearAttentionState(S, offsets + T)
    return torch.stack(out, 1), final if output_final_state else None


def _one_chunk(
    S: Tensor, start: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """(o `[N, H, C, V]`, the buckets `[N, H, L, K, V]` after the chunk) of tokens that start at
    positions `[N]`.
    """
    n, L = q.shape[2], S.shape[2]
    log = g.double().clamp(min=LOG_ZERO)
    G = log.cumsum(-1)
    D = (G[..., :, None] - G[..., None, :]).masked_fill(
        torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), -torch.inf
    )
    position = start[:, None] + torch.arange(n, device=q.device)
    own = level(position[:, :, None], position[:, None]).tril()  # [N, C, C]
    weights = scales.gather(3, own[:, None].expand(-1, q.shape[1], -1, -1))
    o = ((q @ k.mT) * D.exp().to(q.dtype) * weights) @ v
    buckets = torch.arange(1, L + 1, device=q.device)
    seen = torch.maximum(level(position, start[:, None])[..., None], buckets)  # [N, C, L]
    reach = seen.clamp(max=L - 1)  # beyond the levels a bucket is empty
    weights = scales.gather(3, reach[:, None].expand(-1, q.shape[1], -1, -1)) * (seen < L)[:, None]
    enter = weights * G.exp().to(q.dtype).unsqueeze(-1)
    o = o + torch.einsum("nhcl,nhck,nhlkv->nhcv", enter, q, S)
    end = start + n
    kept = torch.maximum(level(end, start)[:, None], buckets)  # [N, L]
    moved = torch.nn.functional.one_hot(kept.clamp(max=L) - 1, L).to(S.dtype)
    joined = torch.nn.functional.one_hot(level(end[:, None], position).clamp(max=L) - 1, L)
    leave = (G[..., -1:] - G).exp().to(q.dtype)
    new = torch.einsum("nhlkv,nlm->nhmkv", S, moved) * G[..., -1, None, None, None].exp().to(
        S.dtype
    )
    new = new + torch.einsum("nhc,nck,nhcd,nhcv->nhkdv", leave, joined.to(q.dtype), k, v)
    return o, new


def _sequences(S: Tensor, start: Tensor, chunk_size: int, *rows: Tensor) -> tuple[Tensor, Tensor]:
    """All chunks of `[N, H, T, ...]`, one after the other."""
    out = []
    for parts in zip(*(x.split(chunk_size, 2) for x in rows), strict=True):
        if parts[0].shape[2] == 0:
            break
        o, S = _one_chunk(S, start, *parts)
        start = start + parts[0].shape[2]
        out.append(o)
    return (torch.cat(out, 2) if out else rows[2]), S


def _check(
    op: str,
    tensors: dict[str, Tensor],
    state: LogLinearAttentionState | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise `ValueError` unless the arguments fit."""
    axes = dict(q="B T H K", k="B T H K", v="B T HV V", g="B T HV", level_scales="B T HV L")
    specs: Any = {n: (tensors[n], a) for n, a in axes.items()}
    sizes = check_tensors(op, **specs)
    check_groups(op, sizes)
    N = check_sequences(op, sizes["B"], cu_seqlens, None)
    refuse_symbolic(op, sizes["T"])
    top, L = 0, sizes["L"]
    if state is not None:
        check_parts(op, state, "levels, offsets")
        shape = [N, *(sizes[a] for a in ("HV", "L", "K", "V"))]
        if list(state[0].shape) != shape:
            raise ValueError(
                f"{op}: initial_state[0] has shape {list(state[0].shape)}; {shape} was expected"
            )
        if state[1].shape != (N,) or state[1].is_floating_point():
            raise ValueError(
                f"{op}: initial_state[1] has shape {list(state[1].shape)} and dtype "
                f"{state[1].dtype}; the tokens seen, [{N}] integers, were expected"
            )
        top = 0 if torch.compiler.is_compiling() else int(state[1].max())
    last = max(top + sizes["T"] - 1, 0)
    if 1 + last.bit_length() > L:
        raise ValueError(
            f"{op}: level_scales has {L} levels, but position {last} needs {1 + last.bit_length()};"
            " pass more levels"
        )


def _levels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor,
    initial_state: LogLinearAttentionState | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, LogLinearAttentionState]:
    N = count_sequences(q, cu_seqlens)
    H, L = v.shape[2], level_scales.shape[-1]
    if initial_state is None:
        levels = promote_to_fp32(v).new_zeros(N, H, L, q.shape[-1], v.shape[-1])
        offsets = torch.zeros(N, dtype=torch.long, device=v.device)
    else:
        levels, offsets = initial_state[0].to(promote_to_fp32(v).dtype), initial_state[1]
    q, k = (x.repeat_interleave(H // x.shape[2], 2) for x in (q, k))
    rows = [promote_to_fp32(x).transpose(1, 2).contiguous() for x in (q, k, v, g, level_scales)]
    if cu_seqlens is None:
        o, levels = _sequences(levels, offsets, chunk_size, *rows)
        lengths = offsets.new_full((N,), v.shape[1])
    else:
        bounds = boundaries_to_list(cu_seqlens, v.shape[1], "log_linear_attn")
        outs, finals = [], []
        for i, (a, b) in enumerate(pairwise(bounds)):
            part = (x[:, :, a:b] for x in rows)
            o, S = _sequences(levels[i : i + 1], offsets[i : i + 1], chunk_size, *part)
            outs.append(o)
            finals.append(S)
        o, levels = torch.cat(outs, 2), torch.cat(finals)
        lengths = cu_seqlens.diff().to(offsets)
    return o.transpose(1, 2).to(v.dtype), LogLinearAttentionState(levels, offsets + lengths)


HIERARCHY = Stage(
    "log_linear_attn",
    {"torch": Form(_levels, "chunks over a hierarchy of states, under plain autograd")},
    first_tensor,
)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _log_linear(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor,
    initial_state: LogLinearAttentionState | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    backend: str | None,
    scale: float | None,
) -> tuple[Tensor, LogLinearAttentionState]:
    tensors = dict(q=q, k=k, v=v, g=g, level_scales=level_scales)
    _check(op, tensors, initial_state, cu_seqlens)
    check_log_decay(op, g=g)
    check_chunk_size(op, chunk_size)
    scale = _scale(q, scale)
    if scale != 1:
        level_scales = promote_to_fp32(level_scales) * scale  # which weigh every pair
    return HIERARCHY(op, backend, q, k, v, g, level_scales, initial_state, cu_seqlens, chunk_size)


@checked
def chunk_log_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor,
    initial_state: LogLinearAttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = 1.0,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, LogLinearAttentionState | None]:
    """Log-linear attention chunk by chunk, for any T and from any state. Differentiable. The output
    is multiplied by `scale`: 1 by default, None is `K**-0.5`.

    Example:
        >>> q, k = torch.randn(2, 1, 100, 1, 8).unbind()
        >>> v, scales = torch.randn(2, 1, 100, 2, 8).unbind()
        >>> g = -torch.rand(1, 100, 2)
        >>> o, state = chunk_log_linear_attn(q, k, v, g, scales, output_final_state=True)
        >>> o.shape, state.offsets.tolist()
        (torch.Size([1, 100, 2, 8]), [100])
    """
    o, state = _log_linear(
        "chunk_log_linear_attn",
        q,
        k,
        v,
        g,
        level_scales,
        initial_state,
        cu_seqlens,
        chunk_size,
        backend,
        scale,
    )
    return o, state if output_final_state else None


@checked
def fused_recurrent_log_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    level_scales: Tensor,
    initial_state: LogLinearAttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, LogLinearAttentionState | None]:
    """Log-linear attention token by token: chunks of one."""
    o, state = _log_linear(
        "fused_recurrent_log_linear_attn",
        q,
        k,
        v,
        g,
        level_scales,
        initial_state,
        cu_seqlens,
        1,
        backend,
        scale,
    )
    return o, state if output_final_state else None


CASES = [
    OpCase(
        "log_linear_attn",
        "Log-linear attention",
        "arXiv:2506.04761",
        "states that grow",
        chunk_log_linear_attn,
        fused_recurrent_log_linear_attn,
        naive_recurrent_log_linear_attn,
        QKV | dict(g="B T HV decay", level_scales="B T HV L rate"),
        state=dict(initial_state=("N HV L K V", "N count")),
    ),
]
