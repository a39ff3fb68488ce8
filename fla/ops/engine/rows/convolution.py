# SPDX-License-Identifier: MIT
"""The short convolution as a torch operator. Fake kernels and autograd are the same whatever runs
it; `register` takes what differs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fla.core.boundaries import count_sequences


def register(
    name: str, forward: Callable, backward: Callable, device_types: str | None = None
) -> None:
    """Make `torch.ops.fla.<name>` of `forward(x, weight, bias, history, cu_seqlens, silu)`, which
    returns (y, the last W inputs `[N, D, W]` in fp32), and of its gradient
    `backward(dy, dfinal, *inputs)`: those of x, weight, bias and history, the latter three in fp32.
    """
    kind: Any = dict(mutates_args=(), device_types=device_types)
    op = torch.library.custom_op(f"fla::{name}", **kind)(forward)
    gradient = torch.library.custom_op(f"fla::{name}_backward", **kind)(backward)
    op.register_fake(_empty)
    gradient.register_fake(_empty_gradients)

    def differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple:
        x, weight, bias, history, cu_seqlens = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        grads = getattr(torch.ops.fla, f"{name}_backward")(
            dy, dfinal, x, weight, bias, history, cu_seqlens, ctx.silu
        )
        like = zip(grads, (x, weight, bias, history), strict=True)
        return *(None if y is None else grad.to(y.dtype) for grad, y in like), None, None

    op.register_autograd(differentiate, setup_context=_setup_context)


def rows(x: Tensor | None) -> Tensor | None:
    """`[.., D, W]` as contiguous fp32 rows `[.., W, D]`, as kernels read filters and states."""
    return None if x is None else x.mT.to(torch.float32).contiguous()


def _empty(x, weight, bias, history, cu_seqlens, silu):
    shape = (count_sequences(x, cu_seqlens), *weight.shape)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)


def _empty_gradients(dy, dfinal, x, weight, bias, history, cu_seqlens, silu):
    state = x.new_empty((count_sequences(x, cu_seqlens), *weight.shape), dtype=torch.float32)
    dweight, dbias = state.new_empty(weight.shape), state.new_empty(x.shape[2:])
    return x.new_empty(x.shape), dweight, dbias, state


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
