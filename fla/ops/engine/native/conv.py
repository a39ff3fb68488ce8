# SPDX-License-Identifier: MIT
"""The native short convolution as a torch operator: `convolve`, for `fla.modules.convolution`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla.core import operator
from fla.core.boundaries import count_sequences
from fla.ops.engine.native import library
from fla.ops.engine.native.library import Conv, channels, readable
from fla.ops.engine.rows.convolution import SCHEMA, empty, rows


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
    arguments = (x, weight, bias, history, cu_seqlens, silu)
    if not torch.compiler.is_compiling() and type(x) is Tensor and not torch.is_grad_enabled():
        return _forward(*arguments)  # dispatching an operator costs more than one token
    return operator.call("native_conv", *arguments)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Conv, list[Any]]:
    """The problem, and what must live as long as it."""
    filled = dict(weight=rows(weight), history=rows(history))
    filled["bias"] = None if bias is None else bias.to(torch.float32).contiguous()
    if cu_seqlens is not None:
        filled["bounds"] = library.bounds("causal_conv1d", cu_seqlens, x.shape[1])
    pointers = {name: None if y is None else y.data_ptr() for name, y in filled.items()}
    N = count_sequences(x, cu_seqlens)
    x = readable(x)
    p = Conv(
        x=channels(x), N=N, T=x.shape[1], D=x.shape[2], W=weight.shape[1], silu=silu, **pointers
    )
    return p, [x, *filled.values()]


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    p, alive = _conv(x, weight, bias, history, cu_seqlens, silu)
    y = x.new_empty(x.shape)
    final = torch.empty(p.N, p.W, p.D, dtype=torch.float32)
    p.y, p.final_history = channels(y), final.data_ptr()
    library.call("fla_conv_forward", p)
    del alive
    return y, final.mT.contiguous()


def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, and in fp32 of weight, bias and history."""
    p, alive = _conv(x, weight, bias, history, cu_seqlens, silu)
    dx = x.new_empty(x.shape)
    dweight = torch.empty(p.N, p.W, p.D, dtype=torch.float32)
    dbias, dhistory = dweight.new_empty(p.N, p.D), torch.empty_like(dweight)
    last = rows(dfinal)
    p.y, p.dx = channels(dy), channels(dx)
    p.dfinal = None if last is None else last.data_ptr()
    p.dweight, p.dbias, p.dhistory = dweight.data_ptr(), dbias.data_ptr(), dhistory.data_ptr()
    library.call("fla_conv_backward", p)
    del alive
    dbias = dbias.sum(0) if bias is not None else dbias.new_empty(0)
    return dx, dweight.sum(0).mT.contiguous(), dbias, dhistory.mT.contiguous()


operator.define(
    "native_conv", SCHEMA, forward=_forward, fake=empty, backward=_backward, device_types="cpu"
)
