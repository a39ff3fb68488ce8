# SPDX-License-Identifier: MIT
"""Rows through a norm, a gate or both in the native kernels: RMSNorm, gated RMSNorm, SwiGLU's
gradient.

    u = x / sqrt(mean(x^2) + eps), or x        z = w u + b        y = z act(g), or z
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fla.ops.engine.native import library
from fla.ops.engine.native.library import BLOCK, TYPES, Gated, View

GATES = {None: 0, "silu": 1, "swish": 1, "sigmoid": 2}
PLAIN = (Tensor, Parameter)


def misfit(x: Tensor, g: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> str | None:
    """Why the kernels cannot read a call, or None: they want g like x, weight and bias a row of it,
    all plain tensors of the CPU below fp64. torch's forms broadcast, and raise where that fails.
    """
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return "a trace or a transform sees torch's operators alone"
    shape, row = x.shape, x.shape[-1:]
    for y, wanted in ((x, shape), (g, shape), (weight, row), (bias, row)):
        if y is not None and not (
            type(y) in PLAIN and y.dtype in TYPES and y.is_cpu and y.shape == wanted
        ):
            return "they take plain CPU tensors below fp64 that do not broadcast"
    return None if x.numel() else "there is nothing to compute"


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _view(x: Tensor | None) -> View:
    if x is None:
        return View()
    return View(x.data_ptr(), 0, x.stride(0), 0, x.stride(1), TYPES[x.dtype])


def _parameter(x: Tensor | None) -> Tensor | None:
    if x is None or (x.dtype == torch.float32 and x.is_contiguous()):
        return x
    return x.float().contiguous()


def _problem(
    x: Tensor, g: Tensor | None, weight: Tensor | None, bias: Tensor | None, activation: str | None,
    eps: float | None,
) -> tuple[Gated, list[Any]]:  # fmt: skip
    """The problem, and what must live as long as it; without eps there is no norm."""
    x, g = _rows(x), None if g is None else _rows(g)
    weight, bias = _parameter(weight), _parameter(bias)
    p = Gated(
        x=_view(x), g=_view(g), weight=None if weight is None else weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(), N=x.shape[0], D=x.shape[1],
        eps=eps or 0.0, norm=eps is not None, gate=GATES[activation],
    )  # fmt: skip
    return p, [x, g, weight, bias]


def forward(
    x: Tensor, g: Tensor | None, weight: Tensor | None, bias: Tensor | None, activation: str | None,
    eps: float | None,
) -> Tensor:  # fmt: skip
    """y in x's dtype; x and g `[..., D]`, weight and bias `[D]`."""
    p, alive = _problem(x, g, weight, bias, activation, eps)
    y = x.new_empty(x.shape)
    p.y = _view(y.view(-1, p.D))
    library.call("fla_gated_forward", p)
    del alive
    return y


def backward(
    dy: Tensor, x: Tensor, g: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    activation: str | None, eps: float | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, g, weight and bias, each in its dtype."""
    p, alive = _problem(x, g, weight, bias, activation, eps)
    rows = _rows(dy)
    dx, dg = x.new_empty(x.shape), None if g is None else g.new_empty(g.shape)
    p.y, p.dx = _view(rows), _view(dx.view(-1, p.D))
    p.dg = _view(None if dg is None else dg.view(-1, p.D))
    sums = torch.empty(2, -(-p.N // BLOCK), p.D, dtype=torch.float32, device="cpu")
    p.dweight = None if weight is None else sums[0].data_ptr()
    p.dbias = None if bias is None else sums[1].data_ptr()
    library.call("fla_gated_backward", p)
    del alive
    dweight, dbias = (
        None if y is None else part.sum(0).to(y.dtype)
        for y, part in zip((weight, bias), sums, strict=True)
    )
    return dx, dg, dweight, dbias


def rows(
    x: Tensor, g: Tensor | None, weight: Tensor | None, bias: Tensor | None, activation: str | None,
    eps: float | None,
) -> Tensor:  # fmt: skip
    """`forward`, differentiable once."""
    # autograd costs more than a token
    form = DifferentiableRows.apply if torch.is_grad_enabled() else forward
    return form(x, g, weight, bias, activation, eps)


class DifferentiableRows(torch.autograd.Function):
    """`forward` under autograd, which saves only its inputs."""

    @staticmethod
    def forward(ctx: Any, x, g, weight, bias, activation: str | None, eps: float | None) -> Tensor:
        ctx.save_for_backward(x, g, weight, bias)
        ctx.switches = (activation, eps)
        return forward(x, g, weight, bias, activation, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor):
        return *backward(dy, *ctx.saved_tensors, *ctx.switches), None, None
