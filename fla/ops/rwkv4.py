# SPDX-License-Identifier: MIT
r"""# RWKV-4: an exponential moving average with a bonus for the current token

Peng et al. (2023), *RWKV: Reinventing RNNs for the Transformer Era*, arXiv:2305.13048.

    o_t = (a_{t-1} + exp(u + k_t) v_t) / (b_{t-1} + exp(u + k_t))
    a_t = exp(-exp(w)) a_{t-1} + exp(k_t) v_t        b_t = exp(-exp(w)) b_{t-1} + exp(k_t)

as one state: S_t = [a_t, b_t], elementwise.

| symbol | argument | shape |
|---|---|---|
| w | `w` | `[C]`, the log of the decay rate |
| u | `u` | `[C]` |
| k, v | `k`, `v` | `[B, T, C]`, k any number |
| S_0, S_T | `state`, result | `[N, 3, 1, C]` fp32: a exp(-e), b exp(-e), e; we return e = log b |

Numerics: exp(k) is never formed. log b_t is a running log-sum, taken in fp64 along the decay line;
a_t / b_t is an average, whose weights exp(log b_{t-1} - exp(w) - log b_t) and exp(k_t - log b_t)
sum to one.

On the one equation: K = V = 1, so the average is a vector scan, read before the write.
"""

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_sequences, check_tensors
from fla.core.precision import promote_to_fp32
from fla.ops.case import OpCase, literal
from fla.ops.engine.recurrence.recurrence import (
    Options,
    call_trace_hooks,
    check_chunk_size,
    trace_hooks,
)
from fla.ops.engine.recurrence.terms import CHUNK_SIZE
from fla.ops.engine.scan.running import lasts, repeat_rows, running, starts
from fla.ops.engine.scan.stages import VECTOR_SCAN


@literal()
def naive_recurrent_rwkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The equation, token by token, with the largest exponent e divided out."""
    if state is None:
        zero = k.new_zeros(k.shape[0], k.shape[2])
        a, b, e = zero, zero, torch.full_like(zero, -torch.inf)
    else:
        a, b, e = state[:, :, 0].unbind(1)
    out = []
    for t in range(k.shape[1]):
        top = torch.maximum(e, u + k[:, t])
        old, new = (e - top).exp(), (u + k[:, t] - top).exp()
        out.append((old * a + new * v[:, t]) / (old * b + new))
        top = torch.maximum(e - w.exp(), k[:, t])
        old, new = (e - w.exp() - top).exp(), (k[:, t] - top).exp()
        a, b, e = old * a + new * v[:, t], old * b + new, top
    final = torch.stack([a / b, torch.ones_like(b), b.log() + e], 1).unsqueeze(2)
    return torch.stack(out, 1), final if output_final_state else None


def _log_b(w: Tensor, k: Tensor, first: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`log b_t = log sum_{j <= t} exp(k_j - (t - j) exp(w))`, `first` before the first token."""
    steps = running("sum", torch.ones_like(k[:, :, :1]).double(), cu_seqlens)
    line = steps * w.double().exp()
    log = running("logsumexp", k.double() + line, cu_seqlens)
    first = repeat_rows(first.double(), k.shape[1], cu_seqlens)
    return torch.logaddexp(log, first) - line


@checked
def chunk_rwkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """RWKV-4 chunk by chunk.

    Example:
        >>> w, u = torch.randn(2, 8).unbind()
        >>> k, v = torch.randn(2, 1, 100, 8).unbind()
        >>> o, state = chunk_rwkv4(w, u, k, v)
        >>> o.shape, state.shape
        (torch.Size([1, 100, 8]), torch.Size([1, 3, 1, 8]))
    """
    op = "chunk_rwkv4" if chunk_size != 1 else "fused_recurrent_rwkv4"
    sizes = check_tensors(op, w=(w, "C"), u=(u, "C"), k=(k, "B T C"), v=(v, "B T C"))
    check_tensors(op, w=(w, "C"), state=(state, "N three one C"))
    if state is not None and state.shape[1:3] != (3, 1):
        raise ValueError(f"{op}: state has shape {list(state.shape)}; [N, 3, 1, C] was expected")
    N = check_sequences(op, sizes["B"], cu_seqlens, state, "state")
    check_chunk_size(op, chunk_size)
    keys, values = promote_to_fp32(k), promote_to_fp32(v)
    if state is None:
        average, first = None, keys.new_full((N, sizes["C"]), -torch.inf)
    else:
        a, b, e = promote_to_fp32(state)[:, :, 0].unbind(1)
        average, first = a / b, b.log() + e
    log_b = _log_b(w, keys, first, cu_seqlens)
    before = starts(log_b, first.to(log_b), cu_seqlens)
    decay = (before - w.double().exp() - log_b).to(keys.dtype)
    gain = (keys - log_b).exp().to(keys.dtype)
    means, last = VECTOR_SCAN(op, backend, gain * values, decay, average, cu_seqlens, chunk_size)
    zero = last.new_zeros(last.shape) if average is None else average
    new = torch.sigmoid(promote_to_fp32(u) + keys - before).to(keys.dtype)
    if trace_hooks:
        rows = {"q": 1 - new, "k": gain, "v": values, "gk": decay}
        tensors = {name: x.unsqueeze(-1) for name, x in rows.items()}
        start = None if average is None else average[..., None, None]
        call_trace_hooks(
            op, Options(1.0, read_before=True), **tensors, state=start, cu_seqlens=cu_seqlens
        )
    o = (1 - new) * starts(means, zero, cu_seqlens) + new * values
    if not output_final_state:
        return o.to(v.dtype), None
    e = lasts(log_b, first.to(log_b), cu_seqlens).to(last.dtype)
    return o.to(v.dtype), torch.stack([last, torch.ones_like(last), e], 1).unsqueeze(2)


@checked
def fused_recurrent_rwkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """RWKV-4 token by token: chunks of one."""
    return chunk_rwkv4(w, u, k, v, state, output_final_state, cu_seqlens, 1, backend)


CASES = [
    OpCase(
        "rwkv4",
        "RWKV-4",
        "arXiv:2305.13048",
        "a decay per channel",
        chunk_rwkv4,
        fused_recurrent_rwkv4,
        naive_recurrent_rwkv4,
        dict(w="D", u="D", k="B T D", v="B T D"),
        state=dict(state="N 3 1 D average"),
    ),
]
