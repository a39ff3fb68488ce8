# SPDX-License-Identifier: MIT
"""The recurrence every operator of the family is a point of.

    S_t = diag(exp(g_t)) S_{t-1} + a_t (b_t^T S_{t-1}) + k_t v_t^T         S in R^{K x V}
    o_t = scale * S_t^T q_t
    o_t = scale * (S_{t-1} + diag(u) k_t v_t^T)^T q_t                      with a bonus u

`b` reads the state before the decay. Two forms in plain torch: `token_form`, the definition, and
`chunk_form`, the same map as matrix products over chunks. Both run anywhere and under autograd in
any floating dtype; the faster paths are held to them.

Shapes: q, k, a, b `[B, T, H, K]`; v `[B, T, H, V]`; g `[B, T, H, K]` or `[B, T, H, 1]`; u `[H, K]`;
state `[B, H, K, V]`.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Result = tuple[Tensor, Tensor]


def _start(k: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    B, _, H, K = k.shape
    return k.new_zeros(B, H, K, v.shape[-1]) if state is None else state.to(k.dtype)


def token_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    scale: float = 1.0,
    state: Tensor | None = None,
) -> Result:
    """One token after the other. Returns `(o [B, T, H, V], final state [B, H, K, V])`."""
    S = _start(k, v, state)
    out = []
    for t in range(q.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        if bonus is not None:
            out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S + bonus[:, :, None] * kv))
        new = S if g is None else g[:, t, :, :, None].exp() * S
        if a is not None:
            assert b is not None
            read = torch.einsum("bhk,bhkv->bhv", b[:, t], S)
            new = new + a[:, t, :, :, None] * read[:, :, None, :]
        S = new + kv
        if bonus is None:
            out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    o = torch.stack(out, 1) if out else v.new_zeros(v.shape)
    return o * scale, S


# A log decay this low already is a factor of exactly 0 in fp64, and a sum of 64 of them still
# leaves room for the small decays around it in an fp64 accumulator. It also stands in for -inf, a
# reset.
LOG_ZERO = -1000.0


def _pair(x: Tensor, y: Tensor, gx: Tensor, gy: Tensor, keep: Tensor) -> Tensor:
    """sum_k x_ik y_jk exp(gx_ik - gy_jk) for kept (i, j): the difference is taken before the
    exponential.
    """
    difference = (gx[:, :, :, None] - gy[:, :, None]).masked_fill(~keep[..., None], -torch.inf)
    return torch.einsum(
        "bhik,bhjk,bhijk->bhij",
        x,
        y,
        difference.exp().to(x.dtype).expand(*difference.shape[:-1], x.shape[-1]),
    )


def chunk_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    scale: float = 1.0,
    state: Tensor | None = None,
    chunk_size: int = 16,
) -> Result:
    """The same map chunk by chunk: matrix products, and one triangular solve per chunk where `a` is
    given.

    Within a chunk, with G the inclusive and E = G - g the exclusive cumulative log decay and S its
    first state: `W = tril(b exp(E - G) a^T, -1)`, `(I - W) u = exp(E) b S + tril(b exp(E - G) k^T,
    -1) v`, `o = exp(G) q S + tril(q exp(G - G) k^T) v + tril(q exp(G - G) a^T) u`, and the state
    gathers the same terms.
    """
    S = _start(k, v, state)
    g = k.new_zeros(*k.shape[:-1], 1) if g is None else g
    out = []
    for first in range(0, q.shape[1], chunk_size):
        part = slice(first, first + chunk_size)
        rows: list[Any] = [
            x if x is None else x[:, part].transpose(1, 2) for x in (q, k, v, g, a, b)
        ]
        o, S = _one_chunk(S, bonus, *rows)
        out.append(o.transpose(1, 2))
    return (torch.cat(out, 1) if out else v.new_zeros(v.shape)) * scale, S


def _one_chunk(
    S: Tensor,
    bonus: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> Result:
    n = q.shape[2]
    log = g.double().clamp(min=LOG_ZERO)
    G = log.cumsum(2)
    E = G - log
    lower = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    strict = lower.tril(-1)
    read, keep = (G, lower) if bonus is None else (E, strict)
    enter, leave = read.exp().to(q.dtype), (G[:, :, -1:] - G).exp().to(q.dtype)
    o = (q * enter) @ S + _pair(q, k, read, G, keep) @ v
    if bonus is not None:
        o = o + (q * bonus[:, None] * k).sum(-1, keepdim=True) * v
    last = G[:, :, -1].exp().to(q.dtype)[..., None]
    new = last * S + (k * leave).transpose(-1, -2) @ v
    if a is not None:
        assert b is not None
        rhs = (b * E.exp().to(q.dtype)) @ S + _pair(b, k, E, G, strict) @ v
        system = torch.eye(n, dtype=q.dtype, device=q.device) - _pair(b, a, E, G, strict)
        u = torch.linalg.solve_triangular(system, rhs, upper=False, unitriangular=True)
        o = o + _pair(q, a, read, G, keep) @ u
        new = new + (a * leave).transpose(-1, -2) @ u
    return o, new


def per_sequence(
    form, cu_seqlens: list[int] | None, state: Tensor | None, **inputs: Tensor | None
) -> Result:
    """A form applied to each sequence of a packed row: the meaning of `cu_seqlens`."""
    if cu_seqlens is None:
        return form(**inputs, state=state)
    outs, states = [], []
    for i, (begin, end) in enumerate(pairwise(cu_seqlens)):
        row = {name: x if x is None else x[:, begin:end] for name, x in inputs.items()}
        o, final = form(**row, state=None if state is None else state[i : i + 1])
        outs.append(o)
        states.append(final)
    return torch.cat(outs, 1), torch.cat(states)
