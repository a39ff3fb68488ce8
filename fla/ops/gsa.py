# SPDX-License-Identifier: MIT
r"""# Gated slot attention: softmax attention over a bounded memory

Zhang et al. (2024), *Gated Slot Attention for Efficient Linear-Time Sequence Modeling*,
arXiv:2409.07146. Without g it is ABC, Peng et al. (2021), arXiv:2110.02488: see `abc`.

    S_t = S_{t-1} diag(exp(g_t)) + k_t s_t^T          S in R^{K x M}: a key per slot
    p_t = softmax(scale * S_t^T q_t)
    R_t = diag(exp(g_t)) R_{t-1} + s_t v_t^T          R in R^{M x V}: a value per slot
    o_t = R_t^T p_t

| symbol | argument | shape |
|---|---|---|
| q | `q` | `[B, T, HQ, K]`, HQ a multiple of H (grouped query heads) |
| k, v | `k`, `v` | `[B, T, H, K]`, `[B, T, H, V]` |
| s | `s` | `[B, T, H, M]`, what a token writes into each of M slots |
| g | `g` | `[B, T, H, M]`, natural log of the slots' decay, any value <= 0 including -inf |
| S, R | `initial_state`, result | `([N, H, K, M], [N, H, M, V])` fp32 |

Without g the slots are normalised: `z_t = logcumsumexp(s)_t`, `g_t = z_{t-1} - z_t`,
`s_t <- exp(s_t - z_t)`, and the state is a triple whose third part is z `[N, H, M]`: without it a
sequence could not be continued.

Numerics: as `gla`; z in fp32 or wider.

On the one equation: two passes of vector decay without erase. In the first it is the columns of the
state that decay.
"""

from typing import Any

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_groups, check_parts, check_sequences, check_tensors
from fla.core.precision import promote_to_fp32
from fla.ops.case import OpCase, literal
from fla.ops.engine.recurrence.recurrence import Options, host_boundaries, recurrence
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms
from fla.ops.engine.scan.running import log_cumulative_sum

State = tuple[Tensor, ...]


@literal()
def naive_recurrent_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, State | None]:
    """The equation, token by token."""
    B, T, H, K = k.shape
    M, V, groups = s.shape[-1], v.shape[-1], q.shape[2] // H
    S, R = initial_state[:2] if initial_state else (q.new_zeros(B, H, *x) for x in ((K, M), (M, V)))
    z = initial_state[2] if g is None and initial_state else s.new_full((B, H, M), -torch.inf)
    out = []
    for t in range(T):
        if g is None:
            new = torch.logaddexp(z, s[:, t])
            decay, write, z = (z - new).exp(), (s[:, t] - new).exp(), new
        else:
            decay, write = g[:, t].exp(), s[:, t]
        S = S * decay[:, :, None] + torch.einsum("bhk,bhm->bhkm", k[:, t], write)
        R = decay[..., None] * R + torch.einsum("bhm,bhv->bhmv", write, v[:, t])
        queries = q[:, t].unflatten(1, (H, groups))
        logits = torch.einsum("bhkm,bhjk->bhjm", S, queries)
        p = ((K**-0.5 if scale is None else scale) * logits).softmax(-1)
        out.append(torch.einsum("bhmv,bhjm->bhjv", R, p).flatten(1, 2))
    final = (S, R, z) if g is None else (S, R)
    return torch.stack(out, 1), final if output_final_state else None


def _slots(
    s: Tensor,
    g: Tensor | None,
    initial_state: State | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
    """(s, g, [S, R] of the initial state, last z) after the normalisation absent g asks for."""
    state = [] if initial_state is None else list(initial_state[:2])
    if g is not None:
        return s, g, state, None
    z0 = None if initial_state is None else initial_state[2]
    z, before, last = log_cumulative_sum(promote_to_fp32(s), z0, cu_seqlens)
    return (promote_to_fp32(s) - z).exp().to(s.dtype), before - z, state, last


def _check_state(
    op: str,
    sizes: dict[str, int],
    normalised: bool,
    state: State | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise `ValueError` unless the state is the pair or, normalised, the triple it should be."""
    check_sequences(op, sizes["B"], cu_seqlens, None)
    if state is None:
        return
    shapes = ["H K M", "H M V", *(["H M"] if normalised else [])]
    check_parts(op, state, *(("S, R, z", "without g ") if normalised else ("S, R",)))
    for i, (x, axes) in enumerate(zip(state, shapes, strict=True)):
        name = f"initial_state[{i}]"
        spec: Any = {name: (x, f"N {axes}")}
        found = check_tensors(op, **spec)
        check_sequences(op, sizes["B"], cu_seqlens, x, name)
        for axis in axes.split():
            if found[axis] != sizes[axis]:
                raise ValueError(
                    f"{op}: {name} has shape {list(x.shape)}; [N {axes}] with {axis}={sizes[axis]} "
                    "was expected"
                )


def _gsa(
    op: str,
    options: Options,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None,
    initial_state: State | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, State | None]:
    sizes = check_tensors(
        op,
        q=(q, "B T HV K"),
        k=(k, "B T H K"),
        v=(v, "B T H V"),
        s=(s, "B T H M"),
        g=(g, "B T H M"),
    )
    check_groups(op, sizes, "q")
    _check_state(op, sizes, g is None, initial_state, cu_seqlens)
    s, g, state, last = _slots(s, g, initial_state, cu_seqlens)
    groups = sizes["HV"] // sizes["H"]
    expanded = [x.repeat_interleave(groups, 2) if groups > 1 else x for x in (k, v, s, g)]
    starts: list[Tensor | None] = [None, None]
    if state:
        starts = [x.repeat_interleave(groups, 1) for x in state]
    k, v, s, g = expanded
    scale = sizes["K"] ** -0.5 if options.scale is None else options.scale
    logits, S = recurrence(
        op,
        options._replace(scale=scale),
        Terms(q, k, s, gv=g),
        starts[0],
        cu_seqlens,
        names={"v": "s", "gv": "g"},
    )
    p = promote_to_fp32(logits).softmax(-1).to(v.dtype)
    o, R = recurrence(
        op,
        options._replace(scale=1.0),
        Terms(p, s, v, gk=g),
        starts[1],
        cu_seqlens,
        names={"k": "s", "gk": "g"},
    )
    if S is None or R is None:
        return o, None
    final = (S[:, ::groups], R[:, ::groups])
    return o, final if last is None else (*final, last)


@checked
def chunk_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    checkpoint_level: int = 2,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """GSA chunk by chunk. `checkpoint_level` (0, 1 or 2) is what other implementations keep for
    the backward; here it is always what level 2 keeps, the inputs and a state per chunk.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
        >>> g = torch.nn.functional.logsigmoid(torch.randn(1, 100, 2, 8))
        >>> chunk_gsa(q, k, v, 1 - g.exp(), g)[0].shape
        torch.Size([1, 100, 2, 16])
    """
    if checkpoint_level != 2:
        raise ValueError(
            f"chunk_gsa: checkpoint_level is {checkpoint_level}; only 2 (the least "
            "memory) is supported"
        )
    options = Options(scale, output_final_state, chunk_size=chunk_size, backend=backend)
    bounds = host_boundaries("chunk_gsa", cu_seqlens, cu_seqlens_cpu)
    return _gsa("chunk_gsa", options, q, k, v, s, g, initial_state, bounds)


@checked
def fused_recurrent_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """GSA token by token; `reverse` runs from the last token to the first and needs g."""
    if reverse and g is None:
        raise ValueError("fused_recurrent_gsa: reverse needs g; the normalised slots run forward")
    options = Options(scale, output_final_state, reverse=reverse, backend=backend)
    return _gsa("fused_recurrent_gsa", options, q, k, v, s, g, initial_state, cu_seqlens)


CASES = [
    OpCase(
        "gsa",
        "Gated slot attention",
        "arXiv:2409.07146",
        "a decay per channel",
        chunk_gsa,
        fused_recurrent_gsa,
        naive_recurrent_gsa,
        dict(q="B T HV K", k="B T H K", v="B T H V", s="B T H M rate", g="B T H M decay"),
        state=dict(initial_state=("N H K M", "N H M V")),
    ),
]

# without g, as in ABC, the state also holds the running maximum
naive_recurrent_gsa.axes.append(  # type: ignore[attr-defined]
    naive_recurrent_gsa.axes[0] | {"initial_state": ("N H K M", "N H M V", "N H M")}  # type: ignore[attr-defined]
)
