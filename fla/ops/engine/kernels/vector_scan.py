# SPDX-License-Identifier: MIT
"""The vector scan in Triton as a torch operator: `scan`, with the signature of that in torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fla.core.boundaries import count_sequences
from fla.ops.engine.kernels.recurrence import interpreted, on_device
from fla.ops.engine.kernels.selfcheck import TOKENS, differs_from, trusted
from fla.ops.engine.kernels.tensors import flat, fp32
from fla.ops.engine.scan import vector as plain


class Kind(NamedTuple):
    """What the kernels are compiled for."""

    device: torch.device
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"a vector scan, {self.dtype}, on {self.device}"


def scan(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """As `fla.ops.engine.scan.scan`, for x and g `[B, T, D]` below fp64; chunks hold 64 tokens."""
    if not trusted(Kind(x.device, x.dtype), differs, interpreted()):
        return plain.scan(x, g, initial_state, cu_seqlens, chunk_size)
    return torch.ops.fla.triton_scan(x, g, initial_state, cu_seqlens)


SCANS = {"torch": plain.scan, "triton": scan}  # by backend


def differs(kind: Kind) -> str | None:
    """How the kernels differ from torch on a small problem, or None."""
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 1, TOKENS, 20, generator=generator)
    inputs = {n: y.to(kind.device, kind.dtype) for n, y in (("x", x), ("g", -g.abs()))}
    return differs_from(plain.scan, scan, inputs, kind.dtype)


@torch.library.custom_op("fla::triton_scan", mutates_args=())
def _scan(
    x: Tensor, g: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h and the final state."""
    from fla.ops.engine.kernels.launch import cuts
    from fla.ops.engine.kernels.scan import forward

    with on_device(x.device):
        where = cuts(x, cu_seqlens)
        h, final, _ = forward(flat(x), flat(g), fp32(initial_state), where, False)
    return h.view(x.shape), final


@_scan.register_fake
def _(x, g, initial_state, cu_seqlens):
    shape = (count_sequences(x, cu_seqlens), x.shape[2])
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("fla::triton_scan_backward", mutates_args=())
def _scan_backward(
    dh: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, g and of the initial state."""
    from fla.ops.engine.kernels.launch import cuts
    from fla.ops.engine.kernels.scan import backward

    with on_device(x.device):
        states = (fp32(initial_state), fp32(dfinal))
        dx, dg, dinitial = backward(flat(x), flat(g), flat(dh), *states, cuts(x, cu_seqlens))
    return dx.view(x.shape), dg.view(g.shape), dinitial


@_scan_backward.register_fake
def _(dh, dfinal, x, g, initial_state, cu_seqlens):
    shape = (count_sequences(x, cu_seqlens), x.shape[2])
    return x.new_empty(x.shape), g.new_empty(g.shape), x.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx, dh, dfinal):
    x, g, initial_state, cu_seqlens = ctx.saved_tensors
    dh = torch.zeros_like(x) if dh is None else dh
    dx, dg, dstate = torch.ops.fla.triton_scan_backward(dh, dfinal, x, g, initial_state, cu_seqlens)
    return dx, dg, None if initial_state is None else dstate.to(initial_state.dtype), None


_scan.register_autograd(_backward, setup_context=_setup_context)
