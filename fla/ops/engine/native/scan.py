# SPDX-License-Identifier: MIT
"""The native selective scan as a torch operator: `selective_scan`, for `fla.ops.mamba`."""

from __future__ import annotations

import torch
from torch import Tensor

from fla.core import operator
from fla.core.boundaries import count_sequences
from fla.core.operator import Schema, needs_gradient
from fla.ops.engine.native import library
from fla.ops.engine.native.library import BLOCK, CHANNELS, TYPES, Scan, channels, readable
from fla.ops.engine.rows.convolution import rows


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """`scan.selective.selective_scan` in C++, for dtypes below fp64 on a CPU. chunk_size is for
    torch's form; tokens are computed one by one here.
    """
    inputs = (x, dt, A, B, C, initial_state)
    save = needs_gradient(*inputs)
    eager = type(x) is Tensor and not save and not torch.compiler.is_compiling()
    if eager and not operator.transformed():  # dispatching an operator costs as much as a step
        operator.refuse_forward_mode("native_scan", *inputs)
        y, final, _ = _forward(*inputs, cu_seqlens, save)
    else:
        y, final, _ = operator.call("native_scan", *inputs, cu_seqlens, save)
    return y, final


class _Problem(Scan):
    """The structure, and the tensors it points into."""

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, bounds: Tensor | None
    ):
        if bounds is not None:
            bounds = library.bounds("selective_scan", bounds, x.shape[1])
        tensors = {n: readable(y) for n, y in (("x", x), ("dt", dt), ("B", B), ("C", C))}
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


def _forward(
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


def _empty(x, dt, A, B, C, initial_state, cu_seqlens, save):
    D, K = A.shape
    sequences, T = count_sequences(x, cu_seqlens), x.shape[1]
    final = x.new_empty((sequences, K, D), dtype=torch.float32).mT
    blocks = sequences * -(-T // BLOCK) if cu_seqlens is None else T // BLOCK + sequences
    y = x.new_empty(x.shape, dtype=x.dtype if x.dtype in TYPES else torch.float32)
    return y, final, final.new_empty((blocks, K, D) if save else (0,))


def _backward(
    dy: Tensor, dfinal: Tensor | None, states: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor,
    C: Tensor, cu_seqlens: Tensor | None, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, dt, A, B, C and of the initial state, in fp32."""
    D, K = A.shape
    dx, ddt = states.new_empty(x.shape), states.new_empty(dt.shape)
    dstate = states.new_empty(count_sequences(x, cu_seqlens), K, D).mT
    dA = states.new_empty(len(dstate), *A.mT.shape)
    dB, dC = states.new_empty(2, -(-x.shape[2] // CHANNELS), *B.shape)
    p = _Problem(x, dt, A, B, C, cu_seqlens)
    p.point(dfinal=rows(dfinal), dinitial=dstate.mT, states=states, dA=dA, dB=dB, dC=dC)
    dy = readable(dy)
    p.y, p.dx, p.ddt = channels(dy), channels(dx), channels(ddt)
    library.call("fla_scan_backward", p)
    return dx, ddt, dA.sum(0).mT.contiguous(), dB.sum(0), dC.sum(0), dstate


operator.define(
    "native_scan",
    Schema(
        "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? initial_state",
        "Tensor? cu_seqlens, bool save",
        returns=3,
        saved=(2,),
    ),
    forward=_forward,
    fake=_empty,
    backward=_backward,
    device_types="cpu",
)
