# SPDX-License-Identifier: MIT
r"""# mLSTM: exponential input gates and a normaliser

Beck et al. (2024), *xLSTM: Extended Long Short-Term Memory*, arXiv:2405.04517.

    S_t = sigmoid(f_t) S_{t-1} + exp(i_t) k_t v_t^T        n_t = sigmoid(f_t) n_{t-1} + exp(i_t) k_t
    o_t = S_t^T q_t / max(|n_t . q_t|, 1)                  q scaled by `scale`

| symbol | argument | shape |
|---|---|---|
| q, k | `q`, `k` | `[B, T, H, K]` |
| v | `v` | `[B, T, HV, V]`, HV a multiple of H |
| i, f | `i`, `f` | `[B, T, HV]`, logits, any number |
| S, n, m | `initial_state`, result | `([N, HV, K, V], [N, HV, K], [N, HV])` fp32 |

Numerics: exp(i) is never formed. With `m_t = max(log sigmoid(f_t) + m_{t-1}, i_t)` the state holds
S exp(-m) and n exp(-m), so decays are exp(log sigmoid(f_t) + m_{t-1} - m_t) <= 1, writes
exp(i_t - m_t) <= 1, and the bound 1 becomes exp(-m_t). m_t is summed in fp64.

On the one equation: scalar decay, no erase, written k and exp(i - m) [v, 1], and a division.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import checked
from fla.core.boundaries import count_sequences
from fla.core.checks import check_groups, check_parts, check_sequences, check_tensors
from fla.core.precision import promote_to_fp32
from fla.ops.case import QKV, OpCase, literal
from fla.ops.engine.recurrence.recurrence import Options, recurrence
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Terms
from fla.ops.engine.scan.running import lasts, repeat_rows, running, starts

State = tuple[Tensor, Tensor, Tensor]


@literal("q", "k")
def naive_recurrent_mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, State | None]:
    """The paper's stabilised equations, token by token."""
    B, T, H, K = q.shape
    zeros = (q.new_zeros(B, H, K, v.shape[-1]), q.new_zeros(B, H, K))
    S, n, m = initial_state or (*zeros, q.new_full((B, H), -torch.inf))
    out = []
    for t in range(T):
        new = torch.maximum(F.logsigmoid(f[:, t]) + m, i[:, t])
        decay, write = (F.logsigmoid(f[:, t]) + m - new).exp(), (i[:, t] - new).exp()
        kv = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        S = decay[..., None, None] * S + write[..., None, None] * kv
        n, m = decay[..., None] * n + write[..., None] * k[:, t], new
        query = (K**-0.5 if scale is None else scale) * q[:, t]
        bound = torch.maximum((n * query).sum(-1).abs(), (-m).exp())
        out.append(torch.einsum("bhkv,bhk->bhv", S, query) / bound[..., None])
    return torch.stack(out, 1), (S, n, m) if output_final_state else None


def _stabiliser(
    i: Tensor, log_f: Tensor, m0: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(m_t, m_{t-1}, the last m): `m_t = F_t + max(m_0, max_{j <= t} (i_j - F_j))`."""
    N = count_sequences(i, cu_seqlens)
    first = i.new_full((N, *i.shape[2:]), -torch.inf) if m0 is None else m0
    F_t = running("sum", log_f.double(), cu_seqlens)
    top = running("max", i.double() - F_t, cu_seqlens)
    carried = repeat_rows(first.double(), i.shape[1], cu_seqlens)
    m = (F_t + torch.maximum(carried, top)).to(i.dtype)
    return m, starts(m, first.to(m), cu_seqlens), lasts(m, first.to(m), cu_seqlens)


def _mlstm(
    op: str,
    options: Options,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    initial_state: State | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, State | None]:
    sizes = check_tensors(
        op,
        q=(q, "B T H K"),
        k=(k, "B T H K"),
        v=(v, "B T HV V"),
        i=(i, "B T HV"),
        f=(f, "B T HV"),
    )
    check_groups(op, sizes)
    check_sequences(op, sizes["B"], cu_seqlens, None)
    state, m0 = _joined(op, sizes, initial_state, cu_seqlens)
    i, log_f = promote_to_fp32(i), F.logsigmoid(promote_to_fp32(f))
    m, before, last = _stabiliser(i, log_f, m0, cu_seqlens)
    values = torch.cat([promote_to_fp32(v), promote_to_fp32(v).new_ones(*v.shape[:-1], 1)], -1)
    values = (i - m).exp().unsqueeze(-1) * values
    q, k = q.to(values.dtype), k.to(values.dtype)
    decay = log_f + before - m
    o, final = recurrence(op, options, Terms(q, k, values, g=decay), state, cu_seqlens)
    bound = torch.maximum(o[..., -1:].abs(), (-m).exp().unsqueeze(-1))
    o = (o[..., :-1] / bound).to(v.dtype)
    return o, None if final is None else (final[..., :-1], final[..., -1], last)


def _joined(
    op: str, sizes: dict[str, int], state: State | None, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """[S, n] as one state, and m; or `ValueError`."""
    if state is None:
        return None, None
    check_parts(op, state, "S, n, m")
    axes = ("N HV K V", "N HV K", "N HV")
    spec: Any = {f"initial_state[{j}]": (x, a) for j, (x, a) in enumerate(zip(state, axes))}  # noqa: B905
    found = check_tensors(op, **spec)
    for axis in ("HV", "K", "V"):
        if found[axis] != sizes[axis]:
            raise ValueError(
                f"{op}: initial_state[0] has shape {list(state[0].shape)}; [N HV K V] with "
                f"{axis}={sizes[axis]} was expected"
            )
    check_sequences(op, sizes["B"], cu_seqlens, state[0], "initial_state[0]")
    return torch.cat([state[0], state[1].unsqueeze(-1)], -1), state[2]


@checked
def chunk_mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """mLSTM chunk by chunk.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 2, 16).unbind()
        >>> i, f = torch.randn(2, 1, 100, 2).unbind()
        >>> chunk_mlstm(q, k, v, i, f)[0].shape
        torch.Size([1, 100, 2, 16])
    """
    options = Options(scale, output_final_state, chunk_size=chunk_size, backend=backend)
    return _mlstm("chunk_mlstm", options, q, k, v, i, f, initial_state, cu_seqlens)


@checked
def fused_recurrent_mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State | None]:
    """mLSTM token by token. Differentiable."""
    options = Options(scale, output_final_state, backend=backend)
    return _mlstm("fused_recurrent_mlstm", options, q, k, v, i, f, initial_state, cu_seqlens)


CASES = [
    OpCase(
        "mlstm",
        "mLSTM",
        "arXiv:2405.04517",
        "a decay per head or token",
        chunk_mlstm,
        fused_recurrent_mlstm,
        naive_recurrent_mlstm,
        QKV | dict(i="B T HV", f="B T HV"),
        state=dict(initial_state=("N HV K V", "N HV K", "N HV")),
    ),
]
