# SPDX-License-Identifier: MIT
"""The native short convolution as a torch operator: `convolve`, for `fla.modules.convolution`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla.ops.engine.layout import boundaries_to_list, count_sequences
from fla.ops.engine.native import library
from fla.ops.engine.native.library import TYPES, Conv, view


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
        return _convolve(*arguments)  # an operator's dispatch costs more than one token
    return torch.ops.fla.native_conv(*arguments)


def _rows(x: Tensor) -> Tensor:
    """`[.., D, W]` as contiguous fp32 rows `[.., W, D]`."""
    return x.mT.to(torch.float32).contiguous()


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Conv, list[Any]]:
    """The problem, and what must live as long as it."""
    rows = dict(weight=_rows(weight), bias=bias, history=history)
    rows["bias"] = None if bias is None else bias.to(torch.float32).contiguous()
    rows["history"] = None if history is None else _rows(history)
    if cu_seqlens is not None:
        boundaries_to_list(cu_seqlens, x.shape[1], "causal_conv1d")
        rows["bounds"] = cu_seqlens.to(torch.int64).contiguous()
    pointers = {name: None if y is None else y.data_ptr() for name, y in rows.items()}
    N = count_sequences(x, cu_seqlens)
    x = x if x.dtype in TYPES else x.float()
    p = Conv(x=_view(x), N=N, T=x.shape[1], D=x.shape[2], W=weight.shape[1], silu=silu, **pointers)
    return p, [x, *rows.values()]


def _view(x: Tensor) -> library.View:
    """`[B, T, D]`: one head of D channels."""
    return view(x.unsqueeze(2))


def _convolve(
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
    p.y, p.final_history = _view(y), final.data_ptr()
    library.call("fla_conv_forward", p)
    del alive
    return y, final.mT.contiguous()


_op = torch.library.custom_op("fla::native_conv", mutates_args=(), device_types="cpu")(_convolve)


@_op.register_fake
def _(x, weight, bias, history, cu_seqlens, silu):
    N = count_sequences(x, cu_seqlens)
    final = x.new_empty((N, x.shape[2], weight.shape[1]), dtype=torch.float32)
    return x.new_empty(x.shape), final


@torch.library.custom_op("fla::native_conv_backward", mutates_args=(), device_types="cpu")
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
    p, alive = _conv(x, weight, bias, history, cu_seqlens, silu)
    dx = x.new_empty(x.shape)
    dweight = torch.empty(p.N, p.W, p.D, dtype=torch.float32)
    dbias, dhistory = dweight.new_empty(p.N, p.D), torch.empty_like(dweight)
    rows = None if dfinal is None else _rows(dfinal)
    p.y, p.dx = _view(dy), _view(dx)
    p.dfinal = None if rows is None else rows.data_ptr()
    p.dweight, p.dbias, p.dhistory = dweight.data_ptr(), dbias.data_ptr(), dhistory.data_ptr()
    library.call("fla_conv_backward", p)
    del alive
    return dx, dweight.sum(0).mT.contiguous(), dbias.sum(0), dhistory.mT.contiguous()


@_backward_op.register_fake
def _(dy, dfinal, x, weight, bias, history, cu_seqlens, silu):
    N = count_sequences(x, cu_seqlens)
    wide = torch.float32
    state = x.new_empty((N, *weight.shape), dtype=wide)
    dweight = weight.new_empty(weight.shape, dtype=wide)
    return x.new_empty(x.shape), dweight, x.new_empty(x.shape[2:], dtype=wide), state


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy, dfinal):
    x, weight, bias, history, cu_seqlens = ctx.saved_tensors
    dy = x.new_zeros(x.shape) if dy is None else dy
    grads = torch.ops.fla.native_conv_backward(
        dy, dfinal, x, weight, bias, history, cu_seqlens, ctx.silu
    )
    like = zip(grads, (x, weight, bias, history), strict=True)
    return *(None if y is None else grad.to(y.dtype) for grad, y in like), None, None


_op.register_autograd(_backward, setup_context=_setup_context)
