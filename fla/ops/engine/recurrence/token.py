# SPDX-License-Identifier: MIT
"""The token form, fast: decay none, scalar or vector on either side; erase none, delta, low rank.

    r = b^T S                                       (b given: it reads before the decay)
    S <- diag(exp(g + gk)) S diag(exp(gv))
    u = beta (v - S^T k), or beta (v - r)           (delta; without erase u = v)
    S <- S + k u^T, or S + a r^T + k v^T            (low rank)
    o = scale S^T q                                 (`read_before`: of the state it found)

This is the decode step (T = 1). With gradients it is plain autograd, and longer inputs are cut into
segments that are recomputed in the backward, so memory grows with T / 64 states.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fla.core import operator
from fla.core.boundaries import boundaries_to_list
from fla.core.precision import compute_dtype
from fla.ops.engine.recurrence.equation import per_sequence
from fla.ops.engine.recurrence.terms import L2_EPS, Switches, Terms

SEGMENT = 64


def recurrent(
    terms: Terms,
    switches: Switches,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """The token form of any terms; returns o `[B, T, HV, V]` in q's dtype and the final state
    `[N, HV, K, V]` in fp32 (fp64 for fp64 inputs). With `overwrite` the final state is
    `initial_state` itself, overwritten.
    """
    q, k, v, g, gk, gv, beta, a, b = terms
    dtype, groups = compute_dtype(q.dtype), v.shape[2] // q.shape[2]
    inputs: dict[str, Any] = dict(
        zip("qk", _queries_keys(q, k, groups, dtype, switches.l2norm), strict=True)
    )
    inputs["v"] = _cast(v, dtype)
    for name, x in (("beta", beta), ("a", a), ("b", b)):
        inputs[name] = x if x is None else _cast(x, dtype)
    inputs["row"], inputs["column"] = _decay(g, gk, gv, dtype)
    state = initial_state if initial_state is None else _cast(initial_state, dtype)
    form = partial(_segments, scale=switches.scale, before=switches.read_before)
    if cu_seqlens is None:
        o, final = form(state=state, **inputs)
    else:
        bounds = boundaries_to_list(cu_seqlens, v.shape[1], "fused_recurrent")
        o, final = per_sequence(form, bounds, state, **inputs)
    if overwrite and initial_state is not None:
        final = initial_state.copy_(final)
    return _cast(o, q.dtype), final


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)` without the call where there is nothing to do: a decode step is made of
    microseconds.
    """
    return x if x.dtype == dtype else x.to(dtype)


def _queries_keys(
    q: Tensor, k: Tensor, groups: int, dtype: torch.dtype, l2norm: bool
) -> tuple[Tensor, Tensor]:
    q, k = _cast(q, dtype), _cast(k, dtype)
    if l2norm:
        both = torch.stack([q, k])
        norm = torch.linalg.vector_norm(both, dim=-1, keepdim=True)
        q, k = (both * (norm * norm + L2_EPS).rsqrt()).unbind()
    if groups > 1:
        q, k = q.repeat_interleave(groups, dim=2), k.repeat_interleave(groups, dim=2)
    return q, k


def _decay(
    g: Tensor | None, gk: Tensor | None, gv: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Factors on the rows `[B, T, HV]` or `[B, T, HV, K]` and on the columns `[B, T, HV, V]` of the
    state.
    """
    row = g if g is None else _cast(g, dtype)  # per channel already where terms are merged
    if gk is not None:
        row = _cast(gk, dtype) if row is None else row.unsqueeze(-1) + _cast(gk, dtype)
    return None if row is None else row.exp(), None if gv is None else _cast(gv, dtype).exp()


def _segments(
    *, state: Tensor | None, scale: float, before: bool, **inputs: Any
) -> tuple[Tensor, Tensor]:
    q, v = inputs["q"], inputs["v"]
    B, T, HV, K = q.shape
    if state is None:
        state = q.new_zeros(B, HV, K, v.shape[-1])
    if T <= SEGMENT or not torch.is_grad_enabled():
        return _loop(state, scale, before, **inputs)
    outs = []
    for first in range(0, T, SEGMENT):
        part: dict[str, Any] = {
            n: x if x is None else x[:, first : first + SEGMENT] for n, x in inputs.items()
        }
        o, state = operator.recomputed(_loop, state, scale, before, **part)
        outs.append(o)
    return torch.cat(outs, 1), state


def _loop(S: Tensor, scale: float, before: bool, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The loop over tokens, with batch and heads as one axis R of matrices."""
    B, T, HV, _ = inputs["q"].shape
    v, shape, R = inputs["v"], S.shape, B * HV
    if T == 0:
        return v, S
    S = S.view(R, *shape[2:]) if S.is_contiguous() else S.flatten(0, 1)
    if T == 1:
        now: dict[str, Any] = {
            n: x if x is None else x.reshape(R, 1, -1) for n, x in inputs.items()
        }
        o, S = _step(S, before, **now)
        return (o * scale).view(v.shape), S.view(shape)
    outs = []
    rows = {
        n: x.transpose(1, 2).reshape(R, T, -1).split(1, 1)
        for n, x in inputs.items()
        if x is not None
    }
    for t in range(T):
        now = {n: rows[n][t] if n in rows else None for n in inputs}
        o, S = _step(S, before, **now)
        outs.append(o)
    o = (torch.cat(outs, 1) * scale).view(B, HV, T, -1).transpose(1, 2)
    return o, S.view(shape)


def _step(
    S: Tensor,
    before: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    row: Tensor | None,
    column: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token of states `[R, K, V]`: q, k, a, b `[R, 1, K]`, v `[R, 1, V]`, row `[R, 1, 1 or K]`,
    column `[R, 1, V]`.
    """
    o = torch.bmm(q, S) if before else None
    decay = row if row is None or row.shape[2] == 1 else row.mT
    if column is not None:
        decay = column if decay is None else decay * column
    read = None if b is None else torch.bmm(b, S)
    if beta is not None:
        if read is None and decay is not None and decay.shape[1:] == (1, 1):
            # k reads the decayed state; one number per head decays the short vector instead
            read = torch.bmm(k, S) * decay
        elif read is None:
            read = torch.bmm(k, S if decay is None else S * decay)
        v = (v - read) * beta
    if a is not None:
        assert read is not None  # a comes with b
        erased = torch.bmm(a.mT, read)
        erased = erased.add_(S) if decay is None else erased.addcmul_(S, decay)
        S = erased.baddbmm_(k.mT, v)
    else:
        S = torch.baddbmm(S, k.mT, v) if decay is None else (k.mT * v).addcmul_(S, decay)
    return (torch.bmm(q, S) if o is None else o), S
