# SPDX-License-Identifier: MIT
"""L2 norm: `y = x / sqrt(sum(x^2) + eps)` over the last axis; finite, with a finite gradient, at x
= 0.
"""

import torch
import torch.nn as nn
from torch import Tensor


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last axis, in fp32 for lower dtypes.

    Example:
        >>> l2norm(torch.tensor([3.0, 4.0])).tolist()
        [0.6000000238418579, 0.800000011920929]
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    return y.to(output_dtype or x.dtype)


l2_norm = l2norm


class L2Norm(nn.Module):
    """`l2norm` as a module."""

    def __init__(self, eps: float = 1e-6, output_dtype: torch.dtype | None = None):
        super().__init__()
        self.eps, self.output_dtype = eps, output_dtype

    def forward(self, x: Tensor) -> Tensor:
        return l2norm(x, self.eps, self.output_dtype)
