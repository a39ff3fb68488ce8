# SPDX-License-Identifier: MIT
"""Elementwise maps and norms of which autograd keeps the inputs alone: what lies between is formed
again in the backward, as `torch.compile` arranges by itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Form = Callable[..., Tensor]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form: Form, *tensors: Tensor | None) -> Tensor:
        ctx.form = form
        ctx.save_for_backward(*tensors)
        return form(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        wanted = ctx.needs_input_grad[1:]
        saved = zip(ctx.saved_tensors, wanted, strict=True)
        leaves = [x if x is None else x.detach().requires_grad_(need) for x, need in saved]
        with torch.enable_grad():
            y = ctx.form(*leaves)
        grads = iter(
            torch.autograd.grad(y, [x for x in leaves if x is not None and x.requires_grad], dy)
        )
        return None, *(next(grads) if need else None for need in wanted)


def recomputed(form: Form, *tensors: Tensor | None) -> Tensor:
    """form(*tensors), with nothing but the tensors kept for the backward.

    Example:
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> recomputed(lambda x: x.exp().log(), x).backward()
        >>> x.grad
        tensor(1.)
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return form(*tensors)
    if not any(x is not None and x.requires_grad for x in tensors):
        return form(*tensors)
    return _Recomputed.apply(form, *tensors)
