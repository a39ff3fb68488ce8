# SPDX-License-Identifier: MIT
"""Sinkhorn's normalisation: a positive matrix made doubly stochastic."""

from torch import Tensor

from fla.core.precision import promote_to_fp32


def sinkhorn(logits: Tensor, num_iters: int = 20) -> Tensor:
    """exp(logits) `[..., N, N]` with columns, then rows, normalised num_iters times, in fp32 (fp64
    for fp64) on logarithms; rows sum to 1.

    Example:
        >>> import torch
        >>> sinkhorn(torch.randn(3, 3)).sum(-1).round(decimals=4).tolist()
        [1.0, 1.0, 1.0]
    """
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"sinkhorn: logits has shape {list(logits.shape)}; expected [..., N, N]")
    if num_iters < 1:
        raise ValueError(f"sinkhorn: num_iters is {num_iters}; expected at least 1")
    x = promote_to_fp32(logits)
    for _ in range(num_iters):
        x = x - x.logsumexp(-2, keepdim=True)
        x = x - x.logsumexp(-1, keepdim=True)
    return x.exp().to(logits.dtype)


naive_sinkhorn = sinkhorn  # the published package's plain form of its kernel
