# SPDX-License-Identifier: MIT
"""Softmax attention with its log-sum-exp, and its backward from an output and a log-sum-exp.

    o = softmax(scale q k^T) v            lse = log sum exp(scale q k^T)
    P = exp(scale q k^T - lse)            dv = P^T do
    dS = scale P (do v^T - sum(do o))     dq = dS k        dk = dS^T q

A softmax over several sets of keys is `merge_` of one call a set; each call's backward, given the
merged o and lse, is its share of the gradients of the whole.

torch's flash kernels run on CPUs (fp32, fp64) and on CUDA (fp16, bf16) where keys and values are
equally wide; blocks of matrix products everywhere else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 512  # queries of a block of matrix products
CUDA_MOST = 256  # channels of a head that torch's flash kernel takes there
aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """q `[P, HQ, n, K]`, k `[P, H, m, K]`, v `[P, H, m, V]`, HQ a multiple of H; o `[P, HQ, n, V]`
    and lse `[P, HQ, n]`. `causal`: the i-th query sees the first i keys. No size may be zero.
    """
    kernel = _kernel(q, v)
    if kernel == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    if kernel == "cuda":
        wide = [_to_eight(x) for x in (q, k, v)]
        found = aten._scaled_dot_product_flash_attention(*wide, 0.0, causal, scale=scale)
        return found[0][..., : v.shape[-1]], found[1]
    k, v = (_repeat(x, q) for x in (k, v))
    o, lse = q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3])
    for rows in _blocks(q):
        scores = _scores(q, k, rows, scale, causal)
        lse[:, :, rows] = scores.logsumexp(-1)
        o[:, :, rows] = (scores - lse[:, :, rows, None]).exp() @ v
    return o, lse


def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `attend` for the o and lse that are given."""
    kernel = _kernel(q, v)
    if kernel == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, causal, scale=scale
        )
    if kernel == "cuda":
        wide = [_to_eight(x).contiguous() for x in (do, q, k, v, o)]
        none = torch.zeros((), dtype=torch.int64, device=q.device)
        grads = aten._scaled_dot_product_flash_attention_backward(
            *wide, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, none, none,
            scale=scale,
        )  # fmt: skip
        return tuple(g[..., : x.shape[-1]] for g, x in zip(grads, (q, k, v), strict=True))
    heads = k.shape[1]
    k, v = (_repeat(x, q) for x in (k, v))
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (do * o).sum(-1, keepdim=True)
    for rows in _blocks(q):
        P = (_scores(q, k, rows, scale, causal) - lse[:, :, rows, None]).exp()
        dv += P.mT @ do[:, :, rows]
        dS = P * (do[:, :, rows] @ v.mT - delta[:, :, rows]) * scale
        dq[:, :, rows] = dS @ k
        dk += dS.mT @ q[:, :, rows]
    return dq, *(x.unflatten(1, (heads, -1)).sum(2) for x in (dk, dv))


def merge_(o: Tensor, lse: Tensor, new_o: Tensor, new_lse: Tensor) -> None:
    """Add a set of keys to a running o `[..., V]` and lse `[...]`, which start at 0 and -inf."""
    total = torch.logaddexp(lse, new_lse)
    o.mul_((lse - total).exp().unsqueeze(-1)).addcmul_(new_o, (new_lse - total).exp().unsqueeze(-1))
    lse.copy_(total)


def _kernel(q: Tensor, v: Tensor) -> str | None:
    if q.shape[-1] != v.shape[-1]:
        return None
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64):
        return "cpu"
    half = q.dtype in (torch.float16, torch.bfloat16)
    return "cuda" if q.device.type == "cuda" and half and q.shape[-1] <= CUDA_MOST else None


def _to_eight(x: Tensor) -> Tensor:
    """Channels up to a multiple of eight, which CUDA's kernel wants."""
    return F.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    groups = q.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _blocks(q: Tensor) -> list[slice]:
    return [slice(i, min(i + ROWS, q.shape[2])) for i in range(0, q.shape[2], ROWS)]


def _scores(q: Tensor, k: Tensor, rows: slice, scale: float, causal: bool) -> Tensor:
    scores = scale * (q[:, :, rows] @ k.mT)
    if not causal:
        return scores
    n, m = scores.shape[2:]
    above = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(rows.start + 1)
    return scores.masked_fill(above, -torch.inf)
