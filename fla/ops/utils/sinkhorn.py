# SPDX-License-Identifier: MIT
"""Sinkhorn's normalisation: a positive matrix made doubly stochastic."""

import torch
from torch import Tensor


def sinkhorn(logits: Tensor, num_iters: int = 20) -> Tensor:
    """exp(logits) `[..., N, N]` with columns, then rows, normalised num_iters times, in fp32 (fp64
    for fp64) on logarithms; rows sum to 1.

    Example:
        >>> sinkhorn(torch.randn(3, 3)).sum(-1).round(decimals=4).tolist()
        [1.0, 1.0, 1.0]
    """
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"sinkhorn: logits has shape {list(logits.shape)}; expected [..., N, N]")
    if num_iters < 1:
        raise ValueError(f"sinkhorn: num_iters is {num_iters}; expected at least 1")
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    for _ in range(num_iters):
        x = x - x.logsumexp(-2, keepdim=True)
        x = x - x.logsumexp(-1, keepdim=True)
    return x.exp().to(logits.dtype)


naive_sinkhorn = sinkhorn  # the published package's plain form of its kernel
