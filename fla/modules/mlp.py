# SPDX-License-Identifier: MIT
"""Gated MLP: `down(silu(gate(x)) * up(x))`; Shazeer (2020), arXiv:2002.05202. And the plain one
with a norm in its middle.
"""

import math

import torch.nn as nn
from torch import Tensor

from fla._arguments import check_width, checked
from fla._lazy import lazy_names
from fla.modules.activations import activation, powglu, powglu_linear, swiglu, swiglu_linear
from fla.modules.layernorm import LayerNorm
from fla.modules.linear import is_plain

# loads torch's DTensor, which takes a second
__getattr__, _names = lazy_names(__name__, {"fla.modules.parallel": ["SwiGLULinearParallel"]})


@checked
def intermediate_width(hidden_size: int, hidden_ratio: float | None) -> int:
    """`hidden_size * hidden_ratio * 2/3` (ratio 4 by default), rounded up to a multiple of 256."""
    ratio = 4 if hidden_ratio is None else hidden_ratio
    return 256 * math.ceil(int(hidden_size * ratio * 2 / 3) / 256)


class SwiGLULinear(nn.Module):
    """`swiglu_linear(x, y, weight, bias)` as a module without parameters, which a
    `SwiGLULinearParallel` can be put on.

    Example:
        >>> import torch
        >>> SwiGLULinear()(torch.randn(3, 8), torch.randn(3, 8), torch.randn(4, 8)).shape
        torch.Size([3, 4])
    """

    @checked
    def forward(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return swiglu_linear(x, y, weight, bias)


class GatedMLP(nn.Module):
    """Gated MLP on `[..., hidden_size]`, by SwiGLU, or with `hidden_act="powlu"` by `powglu` of
    `powglu_power`. `fuse_swiglu` recomputes the gated product of SwiGLU in the backward instead of
    storing it, as long as `down_proj` is a plain linear layer; another one is called.

    Example:
        >>> import torch
        >>> GatedMLP(8, intermediate_size=16)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    @checked
    def __init__(
        self,
        hidden_size: int,
        hidden_ratio: float | None = None,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        fuse_swiglu: bool = True,
        powglu_power: float = 3.0,
    ):
        super().__init__()
        if hidden_act not in ("swish", "silu", "powlu"):
            raise ValueError(
                f"GatedMLP: hidden_act is {hidden_act!r}; expected 'swish', 'silu' or 'powlu'"
            )
        width = intermediate_size or intermediate_width(hidden_size, hidden_ratio)
        self.hidden_size, self.intermediate_size, self.fuse_swiglu = hidden_size, width, fuse_swiglu
        self.hidden_act, self.powglu_power = hidden_act, powglu_power
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)
        self.swiglu_linear = SwiGLULinear()

    @checked
    def forward(self, x: Tensor) -> Tensor:
        weight = self.gate_proj.weight if is_plain(self.gate_proj) else None
        check_width("GatedMLP", "x", x, self.hidden_size, beside=weight)
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
        fused = self.fuse_swiglu and is_plain(down)
        if self.hidden_act == "powlu":
            if fused:
                return powglu_linear(gate, up, down.weight, down.bias, self.powglu_power)
            return down(powglu(gate, up, self.powglu_power))
        return (
            self.swiglu_linear(gate, up, down.weight, down.bias)
            if fused
            else down(swiglu(gate, up))
        )


class SubNormMLP(nn.Module):
    """`fc2(norm(act(fc1(x))))` on `[..., hidden_size]`: sub-LN, Wang et al. (2022),
    arXiv:2210.06423.

    Example:
        >>> import torch
        >>> SubNormMLP(8, 32)(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    @checked
    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str = "gelu",
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.act, self.hidden_size = activation("SubNormMLP", hidden_act), hidden_size
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.norm = LayerNorm(intermediate_size, eps=norm_eps)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    @checked
    def forward(self, x: Tensor) -> Tensor:
        check_width("SubNormMLP", "x", x, self.hidden_size)
        return self.fc2(self.norm(self.act(self.fc1(x))))
