# SPDX-License-Identifier: MIT
"""Gated MLP: `down(silu(gate(x)) * up(x))`; Shazeer (2020), arXiv:2002.05202. And the plain one
with a norm in its middle.
"""

import math

import torch.nn as nn
from torch import Tensor

from fla.modules.activations import ACT2FN, swiglu, swiglu_linear
from fla.modules.layernorm import LayerNorm


def intermediate_width(hidden_size: int, hidden_ratio: float | None) -> int:
    """`hidden_size * hidden_ratio * 2/3` (ratio 4 by default), rounded up to a multiple of 256."""
    ratio = 4 if hidden_ratio is None else hidden_ratio
    return 256 * math.ceil(int(hidden_size * ratio * 2 / 3) / 256)


class GatedMLP(nn.Module):
    """SwiGLU MLP on `[..., hidden_size]`. `fuse_swiglu` recomputes the gated product in the
    backward instead of storing it.

    Example:
        >>> import torch
        >>> GatedMLP(8, intermediate_size=16)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        hidden_size: int,
        hidden_ratio: float | None = None,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        fuse_swiglu: bool = True,
    ):
        super().__init__()
        if hidden_act not in ("swish", "silu"):
            raise ValueError(f"GatedMLP: hidden_act is {hidden_act!r}; expected 'swish' or 'silu'")
        width = intermediate_size or intermediate_width(hidden_size, hidden_ratio)
        self.hidden_size, self.intermediate_size, self.fuse_swiglu = hidden_size, width, fuse_swiglu
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.fuse_swiglu:
            return swiglu_linear(gate, up, self.down_proj.weight, self.down_proj.bias)
        return self.down_proj(swiglu(gate, up))


class SubNormMLP(nn.Module):
    """`fc2(norm(act(fc1(x))))` on `[..., hidden_size]`: sub-LN, Wang et al. (2022),
    arXiv:2210.06423.

    Example:
        >>> import torch
        >>> SubNormMLP(8, 32)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str = "gelu",
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        if hidden_act not in ACT2FN:
            raise ValueError(
                f"SubNormMLP: hidden_act is {hidden_act!r}; expected one of {', '.join(ACT2FN)}"
            )
        self.hidden_act = hidden_act
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.norm = LayerNorm(intermediate_size, eps=norm_eps)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(ACT2FN[self.hidden_act](self.fc1(x))))
