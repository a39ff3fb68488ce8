# SPDX-License-Identifier: MIT
"""The short convolution in Triton as a torch operator: `convolve`, for
`fla.modules.convolution`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.ops.engine.kernels.recurrence import interpreted, on_device
from fla.ops.engine.kernels.selfcheck import TOKENS, differs_from, trusted
from fla.ops.engine.rows.convolution import register, rows


class Kind(NamedTuple):
    """What the kernels are compiled for."""

    device: torch.device
    dtype: torch.dtype
    W: int
    silu: bool

    def __str__(self) -> str:
        return f"a short convolution of {self.W} taps, {self.dtype}, on {self.device}"


def runs(x: Tensor, weight: Tensor, silu: bool) -> bool:
    """Whether the kernels give what torch gives; else torch is to be used."""
    return trusted(Kind(x.device, x.dtype, weight.shape[1], silu), differs, interpreted())


def differs(kind: Kind) -> str | None:
    """How the kernels differ from torch on a small problem, or None."""
    generator = torch.Generator().manual_seed(0)
    shapes = dict(x=(2, TOKENS, 20), weight=(20, kind.W), bias=(20,))
    tensors = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    tensors = {n: x.to(kind.device, kind.dtype) for n, x in tensors.items()}

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        row = F.pad(x.mT, (kind.W - 1, 0))
        y = F.conv1d(row, weight.unsqueeze(1), bias, groups=len(weight)).mT
        return F.silu(y) if kind.silu else y

    def kernels(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return convolve(x, weight, bias, None, None, kind.silu)[0]

    return differs_from(plain, kernels, tensors, kind.dtype)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """x `[B, T, D]`, weight `[D, W]`, bias `[D]`, history `[N, D, W]`: (y, the last W inputs
    `[N, D, W]` in fp32). Differentiable in every tensor.
    """
    return torch.ops.fla.triton_conv(x, weight, bias, history, cu_seqlens, silu)


def _call(x, weight, bias, history, cu_seqlens):
    from fla.ops.engine.kernels.convolution import Convolution
    from fla.ops.engine.kernels.launch import cuts

    tokens = x.flatten(0, 1).contiguous()
    return Convolution(tokens, weight, bias, rows(history), cuts(x, cu_seqlens))


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    with on_device(x.device):
        y, final = _call(x, weight, bias, history, cu_seqlens).forward(silu)
    return y.view(x.shape), final.mT.contiguous()


def _backward_op(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and history, those of the latter three in fp32."""
    with on_device(x.device):
        call = _call(x, weight, bias, history, cu_seqlens)
        dy = dy.flatten(0, 1).contiguous()
        dx, dweight, dbias, dhistory = call.backward(dy, rows(dfinal), silu)
    return dx.view(x.shape), dweight.mT.contiguous(), dbias, dhistory.mT.contiguous()


register("triton_conv", _convolve, _backward_op)
