# SPDX-License-Identifier: MIT
"""The selective scan in Triton as a torch operator: `selective_scan`, for `fla.ops.mamba`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fla.core.boundaries import count_sequences
from fla.ops.engine.kernels.recurrence import interpreted, on_device
from fla.ops.engine.kernels.selfcheck import TOKENS, differs_from, trusted
from fla.ops.engine.kernels.tensors import flat, fp32
from fla.ops.engine.scan import selective as plain


class Kind(NamedTuple):
    """What the kernels are compiled for."""

    device: torch.device
    dtype: torch.dtype
    N: int

    def __str__(self) -> str:
        return f"a selective scan of {self.N} states a channel, {self.dtype}, on {self.device}"


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `fla.ops.engine.scan.selective.selective_scan`, for dtypes below fp64."""
    if not trusted(Kind(x.device, x.dtype, A.shape[1]), differs, interpreted()):
        return plain.selective_scan(x, dt, A, B, C, initial_state, cu_seqlens)
    return torch.ops.fla.triton_selective(x, dt, A, B, C, initial_state, cu_seqlens)


def differs(kind: Kind) -> str | None:
    """How the kernels differ from torch on a small problem, or None."""
    generator = torch.Generator().manual_seed(0)
    x, dt = torch.randn(2, 1, TOKENS, 20, generator=generator)
    B, C = torch.randn(2, 1, TOKENS, kind.N, generator=generator)
    A = -torch.rand(20, kind.N, generator=generator)
    inputs = {n: y.to(kind.device, kind.dtype) for n, y in dict(x=x, dt=dt.abs(), B=B, C=C).items()}
    inputs["A"] = A.to(kind.device)
    return differs_from(plain.selective_scan, selective_scan, inputs, kind.dtype)


def _inputs(x, dt, A, B, C, cu_seqlens):
    from fla.ops.engine.kernels import selective
    from fla.ops.engine.kernels.launch import cuts

    inputs = selective.Inputs(flat(x), flat(dt), fp32(A), flat(B), flat(C))
    return selective, inputs, cuts(x, cu_seqlens, selective.CHUNK)


@torch.library.custom_op("fla::triton_selective", mutates_args=())
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the final state."""
    with on_device(x.device):
        kernels, inputs, where = _inputs(x, dt, A, B, C, cu_seqlens)
        y, final, _ = kernels.forward(inputs, fp32(initial_state), where, False)
    return y.view(x.shape), final


@_scan.register_fake
def _(x, dt, A, B, C, initial_state, cu_seqlens):
    shape = (count_sequences(x, cu_seqlens), *A.shape)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("fla::triton_selective_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and of the initial state."""
    with on_device(x.device):
        kernels, inputs, where = _inputs(x, dt, A, B, C, cu_seqlens)
        states = (fp32(initial_state), fp32(dfinal))
        *grads, dstate = kernels.backward(inputs, flat(dy), *states, where)
    tensors = zip(grads, (x, dt, A, B, C), strict=True)
    dx, ddt, dA, dB, dC = (grad.view(y.shape).to(y.dtype) for grad, y in tensors)
    return dx, ddt, dA, dB, dC, dstate


@_scan_backward.register_fake
def _(dy, dfinal, x, dt, A, B, C, initial_state, cu_seqlens):
    dx, ddt, dA, dB, dC = (y.new_empty(y.shape) for y in (x, dt, A, B, C))
    shape = (count_sequences(x, cu_seqlens), *A.shape)
    return dx, ddt, dA, dB, dC, x.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy, dfinal):
    *tensors, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    *grads, dstate = torch.ops.fla.triton_selective_backward(
        dy, dfinal, *tensors, initial_state, cu_seqlens
    )
    return *grads, None if initial_state is None else dstate.to(initial_state.dtype), None


_scan.register_autograd(_backward, setup_context=_setup_context)
