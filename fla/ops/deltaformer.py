# SPDX-License-Identifier: MIT
r"""# DeltaFormer: a delta rule that reads and erases through softmax

Zhong et al. (2025), *Understanding Transformer from the Perspective of Associative Memory*,
arXiv:2505.19488.

    u_t = v_t - beta_t sum_{j < t} softmax_{j < t}(scale q_t . k_j) u_j
    o_t = sum_{j <= t} softmax_{j <= t}(scale q_t . k_j) u_j

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]`, scale = K^-0.5 |
| v | `v` | `[B, T, H, V]` |
| beta | `beta` | `[B, T, H]`, absent 1 |
| S_t = (k, u) | `initial_state`, result | the keys and u of all tokens so far, `[N, P + T, H, .]` |

Both stages weigh with the scores of q, as published code does; the first leaves out the token
itself. beta may have any sign and size: the published layer passes it without a sigmoid.

Cost grows with T squared; the state grows with T. `attention_mask` `[B, T]` marks real tokens of
padded rows: the others write nothing and their o is 0.

Numerics: blocks of `C` rows: softmax over whole rows, and a triangular system within the block
solved by substitution. Exact for any C, in fp32 or wider.

On the one equation: outside; with the identity for softmax it would be the delta rule.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fla._arguments import checked, refuse_symbolic, shaped
from fla.core import operator
from fla.core.boundaries import boundaries_to_list
from fla.core.checks import check_parts, check_sequences, check_tensors
from fla.core.layout import SequenceLayout
from fla.core.precision import promote_to_fp32
from fla.core.stage import Form, Stage, first_tensor
from fla.ops.case import OpCase
from fla.ops.engine.recurrence.recurrence import check_chunk_size

BLOCK = 128
State = tuple[Tensor, Tensor]


@shaped(q="B T H K", k="B T H K", v="B T H V", beta="B T H")
def naive_deltaformer_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, State | None]:
    """The equations, token by token."""
    keys, us = [], []
    if initial_state is not None:
        keys, us = (list(x.unbind(1)) for x in initial_state)
    out, scale = [], k.shape[-1] ** -0.5
    for t in range(q.shape[1]):
        u = v[:, t]
        if keys:
            scores = scale * torch.einsum("bhk,bjhk->bhj", q[:, t], torch.stack(keys, 1))
            read = torch.einsum("bhj,bjhv->bhv", scores.softmax(-1), torch.stack(us, 1))
            u = u - (read if beta is None else beta[:, t, :, None] * read)
        keys.append(k[:, t])
        us.append(u)
        scores = scale * torch.einsum("bhk,bjhk->bhj", q[:, t], torch.stack(keys, 1))
        out.append(torch.einsum("bhj,bjhv->bhv", scores.softmax(-1), torch.stack(us, 1)))
    final = (torch.stack(keys, 1), torch.stack(us, 1)) if output_final_state else None
    return torch.stack(out, 1), final


def _block(q: Tensor, v: Tensor, beta: Tensor, keys: Tensor, us: Tensor):
    """(o, u) `[B, H, C, V]` of one block whose own keys end `keys` `[B, H, P + C, K]`; `us`
    `[B, H, P, V]` are those of the tokens before it.
    """
    n, past, scale = q.shape[2], us.shape[2], 1 / math.sqrt(q.shape[-1])
    above = torch.ones(n, past + n, dtype=torch.bool, device=q.device).triu(past)
    scores = scale * (q @ keys.mT)
    before = scores.masked_fill(above, -torch.inf)
    if past == 0:  # the first token of all meets none
        before = before.masked_fill(torch.arange(n, device=q.device)[:, None] == 0, 0.0)
    weights = beta.unsqueeze(-1) * before.softmax(-1).masked_fill(above, 0.0)
    rhs = v - weights[..., :past] @ us
    u = torch.linalg.solve_triangular(weights[..., past:], rhs, upper=False, unitriangular=True)
    scores = scores.masked_fill(above.triu(past + 1), -torch.inf)
    return scores.softmax(-1) @ torch.cat([us, u], 2), u


def _sequence(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: State | None, C: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, keys, u) of `[B, H, T, .]`, the block's scores formed again in the backward."""
    keys = k if state is None else torch.cat([state[0], k], 2)
    us = v[:, :, :0] if state is None else state[1]
    past, out = us.shape[2], []
    for begin in range(0, q.shape[2], C):
        rows = [x[:, :, begin : begin + C] for x in (q, v, beta)]
        seen = keys[:, :, : past + begin + rows[0].shape[2]]
        o, u = operator.recomputed(_block, *rows, seen, us)
        us = torch.cat([us, u], 2)
        out.append(o)
    return (torch.cat(out, 2) if out else v), keys, us


def _packed(
    rows: list[Tensor], state: State | None, cu_seqlens: Tensor | None, C: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, keys, u) of q, k, v, beta `[B, H, T, .]`; of packed sequences o alone counts."""
    form: Any = _sequence
    if cu_seqlens is None:
        return form(*rows, state, C)
    bounds = boundaries_to_list(cu_seqlens, rows[0].shape[2], "deltaformer_attn")
    parts = ([x[:, :, a:b] for x in rows] for a, b in pairwise(bounds))
    o = torch.cat([form(*part, None, C)[0] for part in parts], 2)
    return o, rows[1], o


BLOCKS = Stage(
    "deltaformer",
    {"torch": Form(_packed, "exact blocks of rows, formed again in the backward")},
    lambda rows, *_: first_tensor(rows[0]),
)


@checked
def deltaformer_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    C: int = BLOCK,
    initial_state: State | None = None,
    output_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, State]:
    """DeltaFormer in exact blocks of C rows; o, and with `output_final_state` also the state.

    Example:
        >>> q, k, v = torch.randn(3, 1, 40, 2, 8).unbind()
        >>> deltaformer_attn(q, k, v, beta=torch.rand(1, 40, 2)).shape
        torch.Size([1, 40, 2, 8])
    """
    op = "deltaformer_attn"
    sizes = check_tensors(
        op, q=(q, "B T H K"), k=(k, "B T H K"), v=(v, "B T H V"), beta=(beta, "B T H")
    )
    check_sequences(op, sizes["B"], cu_seqlens, None)
    check_chunk_size(op, C)
    refuse_symbolic(op, q.shape[1])
    if attention_mask is not None:
        if initial_state is not None or output_final_state:
            raise ValueError(
                f"{op}: attention_mask cannot be combined with a state; pack the real tokens and "
                "pass cu_seqlens"
            )
        layout = SequenceLayout.resolve(
            sizes["B"], sizes["T"], attention_mask=attention_mask, cu_seqlens=cu_seqlens
        )
        if layout.indices is not None:
            beta = v.new_ones(v.shape[:3]) if beta is None else beta
            q, k, v, beta = (layout.pack(x) for x in (q, k, v, beta))
            bounds = layout.cu_seqlens
            o: Any = deltaformer_attn(q, k, v, beta, cu_seqlens=bounds, C=C, backend=backend)
            return layout.unpack(o)
    ones = promote_to_fp32(v).new_ones(v.shape[:3])
    rows: Any = [
        promote_to_fp32(x).transpose(1, 2) for x in (q, k, v, ones if beta is None else beta)
    ]
    state = None if initial_state is None else _head_first(op, sizes, initial_state, cu_seqlens)
    if cu_seqlens is not None and (state is not None or output_final_state):
        raise ValueError(
            f"{op}: packed sequences have states of different lengths; call it once per sequence"
        )
    o, keys, us = BLOCKS(op, backend, rows, state, cu_seqlens, C)
    o = o.transpose(1, 2).to(v.dtype)
    return (o, (keys.transpose(1, 2), us.transpose(1, 2))) if output_final_state else o


def _head_first(op: str, sizes: dict[str, int], state: State, cu_seqlens: Tensor | None) -> State:
    check_parts(op, state, "k, u")
    for i, (x, axis) in enumerate(zip(state, "KV", strict=True)):
        if x.dim() != 4 or x.shape[::2] != (sizes["B"], sizes["H"]) or x.shape[3] != sizes[axis]:
            raise ValueError(
                f"{op}: initial_state[{i}] has shape {list(x.shape)}; [B, past, H, {axis}] with "
                f"B={sizes['B']} H={sizes['H']} {axis}={sizes[axis]} was expected"
            )
    return promote_to_fp32(state[0]).transpose(1, 2), promote_to_fp32(state[1]).transpose(1, 2)


@checked
def fused_recurrent_deltaformer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, State]:
    """DeltaFormer token by token: blocks of one row."""
    return deltaformer_attn(
        q, k, v, beta, None, cu_seqlens, 1, initial_state, output_final_state, backend
    )


CASES = [
    OpCase(
        "deltaformer",
        "DeltaFormer",
        "arXiv:2505.19488",
        "states that grow",
        deltaformer_attn,
        fused_recurrent_deltaformer,
        naive_deltaformer_attn,
        dict(q="B T H K", k="B T H K", v="B T H V", beta="B T H rate"),
        state={},
    ),
]
