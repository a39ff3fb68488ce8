# SPDX-License-Identifier: MIT
"""The Triton kernels as torch operators. Triton is imported when one first runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fla.core import operator
from fla.core.boundaries import count_sequences
from fla.core.operator import Schema
from fla.ops.engine.kernels.tensors import flat, fp32, on_device
from fla.ops.engine.recurrence.operators import (
    CHUNK_TERMS,
    SWITCHES,
    chunk_schema,
    define_tokens,
    run_tokens,
    split,
)
from fla.ops.engine.recurrence.terms import CHUNK_SIZE, Point, Switches, Terms
from fla.ops.engine.rows.convolution import SCHEMA as CONVOLUTION
from fla.ops.engine.rows.convolution import empty, rows

K_MOST = 256  # key channels where there is an erase; a program holds them all


def chunk(
    terms: Terms,
    switches: Switches,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`recurrence.chunk.chunk` in Triton, for dtypes below fp64, and with an erase for K up to 256.
    The state is fp32.
    """
    return operator.call(
        "triton_chunk", *terms.named(CHUNK_TERMS), initial_state, cu_seqlens, float(switches.scale),
        switches.l2norm, switches.read_before,
    )  # fmt: skip


def recurrent(
    terms: Terms,
    switches: Switches,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """`recurrence.token.recurrent` in Triton, without gradients. With `overwrite` the final state
    is written over `initial_state`, contiguous fp32.
    """
    return run_tokens("triton_tokens", terms, switches, initial_state, cu_seqlens, overwrite)


def few_keys(point: Point) -> str | None:
    """Why a program cannot hold the keys of a call, or None."""
    if point.erase != "none" and point.K > K_MOST:
        return f"the Triton kernels hold at most {K_MOST} key channels of an erase"
    return None


def trained(point: Point) -> str | None:
    """Why the chunk form has no gradients of a call, or None."""
    if point.columns or point.rates:
        return (
            "there are no Triton kernels for gradients through a beta per value channel, or "
            "through a decay of value channels"
        )
    return None


def _chunk(*args: Any) -> tuple[Tensor, Tensor]:
    """o and the final state."""
    from fla.ops.engine.kernels.launch import Call

    terms, (initial_state, cu_seqlens, *switches) = split(CHUNK_TERMS, args)
    with on_device(terms.q.device):
        call = Call(terms, Switches(*switches), cu_seqlens)
        states, written, final = call.run_states(fp32(initial_state))
        return call.output(states, written), final


def _empty_chunk(q, k, v, *rest):
    shape = (count_sequences(q, rest[-4]), v.shape[2], q.shape[3], v.shape[3])
    return v.new_empty(v.shape), v.new_empty(shape, dtype=torch.float32)


def _chunk_backward(do: Tensor, dfinal: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, g, beta, a, b (empty if absent) and of the initial state. What the
    forward pass held is computed again.
    """
    from fla.ops.engine.kernels.launch import Call

    terms, (initial_state, cu_seqlens, *switches) = split(CHUNK_TERMS, args)
    with on_device(do.device):
        call = Call(terms, Switches(*switches), cu_seqlens, backward=True)
        found, dstate = call.gradients(do, fp32(initial_state), fp32(dfinal))
    grads = [
        do.new_empty(0) if x is None else found[name]
        for name, x in zip(CHUNK_TERMS, args[: len(CHUNK_TERMS)], strict=True)
    ]
    return *grads, dstate


operator.define(
    "triton_chunk",
    chunk_schema(CHUNK_TERMS, SWITCHES, saved=0, saves_state=True),
    forward=_chunk,
    fake=_empty_chunk,
    backward=_chunk_backward,
)


def _token_form(
    terms: Terms,
    switches: Switches,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    overwrite: bool,
) -> tuple[Tensor, Tensor]:
    """o and the final state: a new tensor, or `initial_state` itself, overwritten."""
    from fla.ops.engine.kernels import launch

    with on_device(terms.q.device):
        return launch.tokens(terms, switches, fp32(initial_state), cu_seqlens, overwrite)


define_tokens("triton_tokens", _token_form)


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
    return operator.call("triton_conv", x, weight, bias, history, cu_seqlens, silu)


def _convolution(x, weight, bias, history, cu_seqlens):
    from fla.ops.engine.kernels.convolution import Convolution
    from fla.ops.engine.kernels.launch import cuts

    tokens = x.flatten(0, 1).contiguous()
    return Convolution(tokens, weight, bias, rows(history), cuts(x, cu_seqlens))


def _convolve(x, weight, bias, history, cu_seqlens, silu):
    with on_device(x.device):
        y, final = _convolution(x, weight, bias, history, cu_seqlens).forward(silu)
    return y.view(x.shape), final.mT.contiguous()


def _convolve_backward(dy, dfinal, x, weight, bias, history, cu_seqlens, silu):
    """Gradients of x, and in fp32 of weight, bias and history."""
    with on_device(x.device):
        call = _convolution(x, weight, bias, history, cu_seqlens)
        dy = dy.flatten(0, 1).contiguous()
        dx, dweight, dbias, dhistory = call.backward(dy, rows(dfinal), silu)
    dbias = dbias if bias is not None else dbias.new_empty(0)
    return dx.view(x.shape), dweight.mT.contiguous(), dbias, dhistory.mT.contiguous()


operator.define(
    "triton_conv", CONVOLUTION, forward=_convolve, fake=empty, backward=_convolve_backward
)


def scan(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """`scan.vector.scan` in Triton, for x and g `[B, T, D]` below fp64. chunk_size is for torch's
    form; chunks hold 64 tokens here.
    """
    return operator.call("triton_scan", x, g, initial_state, cu_seqlens)


def _scan(x, g, initial_state, cu_seqlens):
    """h and the final state."""
    from fla.ops.engine.kernels.launch import cuts
    from fla.ops.engine.kernels.scan import forward

    with on_device(x.device):
        where = cuts(x, cu_seqlens)
        h, final, _ = forward(flat(x), flat(g), fp32(initial_state), where, False)
    return h.view(x.shape), final


def _empty_scan(x, g, initial_state, cu_seqlens):
    shape = (count_sequences(x, cu_seqlens), x.shape[2])
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)


def _scan_backward(dh, dfinal, x, g, initial_state, cu_seqlens):
    """Gradients of x, g and of the initial state."""
    from fla.ops.engine.kernels.launch import cuts
    from fla.ops.engine.kernels.scan import backward

    with on_device(x.device):
        states = (fp32(initial_state), fp32(dfinal))
        dx, dg, dinitial = backward(flat(x), flat(g), flat(dh), *states, cuts(x, cu_seqlens))
    return dx.view(x.shape), dg.view(g.shape), dinitial


operator.define(
    "triton_scan",
    Schema("Tensor x, Tensor g, Tensor? initial_state", "Tensor? cu_seqlens", saves_state=True),
    forward=_scan,
    fake=_empty_scan,
    backward=_scan_backward,
)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """`scan.selective.selective_scan` in Triton, for dtypes below fp64. chunk_size is for torch's
    form; chunks hold 16 tokens here.
    """
    return operator.call("triton_selective", x, dt, A, B, C, initial_state, cu_seqlens)


def _selective_inputs(x, dt, A, B, C, cu_seqlens):
    from fla.ops.engine.kernels import selective
    from fla.ops.engine.kernels.launch import cuts

    inputs = selective.Inputs(flat(x), flat(dt), fp32(A), flat(B), flat(C))
    return selective, inputs, cuts(x, cu_seqlens, selective.CHUNK)


def _selective(x, dt, A, B, C, initial_state, cu_seqlens):
    """y and the final state."""
    with on_device(x.device):
        kernels, inputs, where = _selective_inputs(x, dt, A, B, C, cu_seqlens)
        y, final, _ = kernels.forward(inputs, fp32(initial_state), where, False)
    return y.view(x.shape), final


def _empty_selective(x, dt, A, B, C, initial_state, cu_seqlens):
    shape = (count_sequences(x, cu_seqlens), *A.shape)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.float32)


def _selective_backward(dy, dfinal, x, dt, A, B, C, initial_state, cu_seqlens):
    """Gradients of x, dt, A, B, C and of the initial state."""
    with on_device(x.device):
        kernels, inputs, where = _selective_inputs(x, dt, A, B, C, cu_seqlens)
        states = (fp32(initial_state), fp32(dfinal))
        *grads, dstate = kernels.backward(inputs, flat(dy), *states, where)
    return *(g.view(y.shape) for g, y in zip(grads, (x, dt, A, B, C), strict=True)), dstate


operator.define(
    "triton_selective",
    Schema(
        "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? initial_state",
        "Tensor? cu_seqlens",
        saves_state=True,
    ),
    forward=_selective,
    fake=_empty_selective,
    backward=_selective_backward,
)
