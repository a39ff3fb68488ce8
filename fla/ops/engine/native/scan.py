# SPDX-License-Identifier: MIT
"""The native selective scan as a torch operator: `selective_scan`, for `fla.ops.mamba`."""

from __future__ import annotations

import torch
from torch import Tensor

from fla.core.boundaries import boundaries_to_list, count_sequences
from fla.ops.engine.native import library
from fla.ops.engine.native.library import BLOCK, CHANNELS, TYPES, Scan, channels, wide
from fla.ops.engine.rows.convolution import rows


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `fla.ops.engine.scan.selective.selective_scan`, for dtypes below fp64 on a CPU."""
    inputs = (x, dt, A, B, C, initial_state)
    save = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in inputs)
    eager = type(x) is Tensor and not save and not torch.compiler.is_compiling()
    run = _scan if eager else torch.ops.fla.native_scan  # whose dispatch costs as much as a step
    y, final, _ = run(*inputs, cu_seqlens, save)
    return y, final


class _Problem(Scan):
    """The structure, and the tensors it points into."""

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, bounds: Tensor | None
    ):
        if bounds is not None:
            boundaries_to_list(bounds, x.shape[1], "selective_scan")
            bounds = bounds.to(torch.int64).contiguous()
        tensors = {n: wide(y) for n, y in (("x", x), ("dt", dt), ("B", B), ("C", C))}
        super().__init__(
            **{name: channels(y) for name, y in tensors.items()},
            N=count_sequences(x, bounds), T=x.shape[1], D=x.shape[2], K=A.shape[1],
        )  # fmt: skip
        self.alive: list[Tensor] = list(tensors.values())
        self.point(A=rows(A), bounds=bounds)

    def point(self, **tensors: Tensor | None) -> None:
        for name, x in tensors.items():
            setattr(self, name, None if x is None else x.data_ptr())
            self.alive += [] if x is None else [x]


def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and where `save` the first state of every block of tokens."""
    y, final, states = _empty(x, dt, A, B, C, initial_state, cu_seqlens, save)
    p = _Problem(x, dt, A, B, C, cu_seqlens)
    p.point(initial=rows(initial_state), final_state=final.mT, states=states if save else None)
    p.y = channels(y)
    library.call("fla_scan_forward", p)
    return y, final, states


_op = torch.library.custom_op("fla::native_scan", mutates_args=(), device_types="cpu")(_scan)


@_op.register_fake
def _empty(x, dt, A, B, C, initial_state, cu_seqlens, save):
    D, K = A.shape
    sequences, T = count_sequences(x, cu_seqlens), x.shape[1]
    final = x.new_empty((sequences, K, D), dtype=torch.float32).mT
    blocks = sequences * -(-T // BLOCK) if cu_seqlens is None else T // BLOCK + sequences
    y = x.new_empty(x.shape, dtype=x.dtype if x.dtype in TYPES else torch.float32)
    return y, final, final.new_empty((blocks, K, D) if save else (0,))


@torch.library.custom_op("fla::native_scan_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    states: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and of the initial state, in fp32."""
    dx, ddt, _, _, _, dstate = _empty_backward(dy, dfinal, x, dt, A, B, C, states, cu_seqlens)
    dA = states.new_empty(len(dstate), *A.mT.shape)
    dB, dC = states.new_empty(2, -(-x.shape[2] // CHANNELS), *B.shape)
    p = _Problem(x, dt, A, B, C, cu_seqlens)
    p.point(dfinal=rows(dfinal), dinitial=dstate.mT, states=states, dA=dA, dB=dB, dC=dC)
    dy = wide(dy)
    p.y, p.dx, p.ddt = channels(dy), channels(dx), channels(ddt)
    library.call("fla_scan_backward", p)
    return dx, ddt, dA.sum(0).mT.contiguous(), dB.sum(0), dC.sum(0), dstate


@_scan_backward.register_fake
def _empty_backward(dy, dfinal, x, dt, A, B, C, states, cu_seqlens):
    D, K = A.shape
    inputs = (states.new_empty(y.shape) for y in (x, dt, A, B, C))
    return *inputs, states.new_empty(count_sequences(x, cu_seqlens), K, D).mT


def _setup_context(ctx, inputs, output):
    *tensors, initial_state, cu_seqlens, save = inputs
    ctx.set_materialize_grads(False)
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    if save:
        ctx.save_for_backward(*tensors, output[2], cu_seqlens)


def _backward(ctx, dy, dfinal, _unused):
    *tensors, states, cu_seqlens = ctx.saved_tensors
    dy = tensors[0].new_zeros(tensors[0].shape) if dy is None else dy
    *grads, dstate = torch.ops.fla.native_scan_backward(dy, dfinal, *tensors, states, cu_seqlens)
    grads = [grad.to(x.dtype) for grad, x in zip(grads, tensors, strict=True)]
    dstate = None if ctx.state_dtype is None else dstate.to(ctx.state_dtype)
    return *grads, dstate, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
