# SPDX-License-Identifier: MIT
"""Gated norms in groups, as Mamba-2 has them (Dao, Gu 2024, arXiv:2405.21060).

    norm_before_gate:   y = norm(x) * silu(z)           else:   y = norm(x * silu(z))

The norm runs over each group of `group_size` channels of the last axis (all of them where None),
in fp32 for lower dtypes; without z there is no gate.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import checked
from fla.modules.layernorm import layer_norm


@checked
def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """The module's equation with LayerNorm, or with RMSNorm."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    gate = None if z is None else F.silu(z.to(wide.dtype))
    if gate is not None and not norm_before_gate:
        wide = wide * gate
    group = x.shape[-1] if group_size is None else group_size
    if x.shape[-1] % group:
        raise ValueError(
            f"layernorm_fn: group_size is {group_size}, which does not divide the {x.shape[-1]} "
            "channels of x; pass a divisor"
        )
    y: Any = layer_norm(
        wide.unflatten(-1, (-1, group)), None, None, eps=eps, is_rms_norm=is_rms_norm
    )
    y = y.flatten(-2) * weight
    y = y if bias is None else y + bias
    return (y if gate is None or not norm_before_gate else y * gate).to(x.dtype)


@checked
def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """The module's equation with RMSNorm."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


rms_norm_ref = rmsnorm_fn


class LayerNormGated(nn.Module):
    """`layernorm_fn` with its parameters."""

    @checked
    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.ones(hidden_size, **factory))
        self.bias = nn.Parameter(torch.zeros(hidden_size, **factory))
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate

    @checked
    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return layernorm_fn(
            x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate
        )


class RMSNormGated(nn.Module):
    """`rmsnorm_fn` with its weight.

    Example:
        >>> x, z = torch.randn(2, 2, 3, 8)
        >>> RMSNormGated(8, group_size=4)(x, z).shape
        torch.Size([2, 3, 8])
    """

    @checked
    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.ones(hidden_size, **factory))
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate

    @checked
    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)
