# SPDX-License-Identifier: MIT
"""L2 norm: `y = x / sqrt(sum(x^2) + eps)` over the last axis; finite, with a finite gradient, at x
= 0.
"""

import torch
import torch.nn as nn
from torch import Tensor

from fla._arguments import checked
from fla.ops.engine.recurrence.gates import l2norm

__all__ = ["L2Norm", "l2_norm", "l2norm"]

l2_norm = l2norm


class L2Norm(nn.Module):
    """`l2norm` as a module."""

    @checked
    def __init__(self, eps: float = 1e-6, output_dtype: torch.dtype | None = None):
        super().__init__()
        self.eps, self.output_dtype = eps, output_dtype

    @checked
    def forward(self, x: Tensor) -> Tensor:
        return l2norm(x, self.eps, self.output_dtype)
