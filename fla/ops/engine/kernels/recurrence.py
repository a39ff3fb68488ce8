# SPDX-License-Identifier: MIT
"""The Triton kernels as torch operators: `chunk` and `recurrent` with the signatures of those in
plain torch, registered with fake kernels and one backward. Triton is imported when one first runs.
"""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fla.core.boundaries import count_sequences
from fla.ops.engine.kernels.selfcheck import differs, kind_of, trusted
from fla.ops.engine.kernels.tensors import fp32
from fla.ops.engine.recurrence import chunk as plain
from fla.ops.engine.recurrence import token

K_MOST = 256  # key channels where there is an erase; a program holds them all
OLDEST = "3.5"
INPUTS = ("q", "k", "v", "g", "beta", "a", "b")


@cache
def _missing() -> str | None:
    if find_spec("triton") is None:
        return f"Triton is not installed; pip install 'triton>={OLDEST}'"
    if tuple(map(int, version("triton").split(".")[:2])) < tuple(map(int, OLDEST.split("."))):
        return f"Triton {version('triton')} is too old; pip install 'triton>={OLDEST}'"
    return None


@cache
def warn_once(reason: str) -> None:
    warnings.warn(f"fla: torch's form runs on this GPU: {reason}", RuntimeWarning, stacklevel=6)


def on_device(device: torch.device) -> AbstractContextManager:
    """Triton starts kernels on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing(device: torch.device) -> str | None:
    """Why no kernel runs on a device, or None where they do."""
    if device.type == "cuda" or (device.type == "cpu" and interpreted()):
        return _missing()
    return f"the Triton kernels are for GPU tensors, not for {device.type}"


def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    l2norm: bool = False,
    read_before: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `fla.ops.engine.recurrence.chunk.chunk`, for dtypes below fp64, with an erase for K up to 256; the
    state is fp32.
    """
    inputs: Any = dict(q=q, k=k, v=v, g=g, beta=beta, a=a, b=b)
    kind = kind_of(inputs, read_before, True)
    if not trusted(kind, partial(differs, chunk), interpreted()):
        options: Any = dict(scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)
        return plain.chunk(**inputs, **options, l2norm=l2norm, read_before=read_before)
    return torch.ops.fla.triton_chunk(
        *inputs.values(), initial_state, cu_seqlens, float(scale), l2norm, read_before
    )


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    gv: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    l2norm: bool = False,
    read_before: bool = False,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `fla.ops.engine.recurrence.token.recurrent`, without gradients: beta may be per value channel. With
    `overwrite` the final state is `initial_state` itself, contiguous fp32, overwritten.
    """
    inputs: Any = dict(q=q, k=k, v=v, g=g, beta=beta, gv=gv, a=a, b=b)
    kind = kind_of(inputs, read_before, False)
    if not trusted(kind, partial(differs, recurrent), interpreted()):
        inputs["g" if g is None or g.dim() == 3 else "gk"] = inputs.pop("g")
        options: Any = dict(scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)
        return token.recurrent(**inputs, **options, l2norm=l2norm, read_before=read_before)
    rest = (initial_state, cu_seqlens, float(scale), l2norm, read_before)
    if overwrite:
        return torch.ops.fla.triton_tokens_(*inputs.values(), *rest), initial_state
    return torch.ops.fla.triton_tokens(*inputs.values(), *rest)


@torch.library.custom_op("fla::triton_chunk", mutates_args=())
def _chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    read_before: bool,
) -> tuple[Tensor, Tensor]:
    """o and the final state."""
    from fla.ops.engine.kernels.launch import Call

    with on_device(q.device):
        call = Call((q, k, v, g, beta, a, b), cu_seqlens, scale, l2norm, read_before)
        states, written, final = call.run_states(fp32(initial_state))
        return call.output(states, written), final


@_chunk.register_fake
def _empty(q, k, v, g, beta, a, b, initial_state, cu_seqlens, scale, l2norm, read_before):
    shape = (count_sequences(q, cu_seqlens), v.shape[2], q.shape[3], v.shape[3])
    return v.new_empty(v.shape), v.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("fla::triton_chunk_backward", mutates_args=())
def _chunk_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    read_before: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta, a, b (empty where absent) and of the initial state. What the
    forward pass held is computed again.
    """
    from fla.ops.engine.kernels.launch import Call

    tensors = (q, k, v, g, beta, a, b)
    with on_device(q.device):
        call = Call(tensors, cu_seqlens, scale, l2norm, read_before, backward=True)
        found, dstate = call.gradients(do, fp32(initial_state), fp32(dfinal))
    grads: Any = (
        q.new_empty(0) if x is None else found[name].to(x.dtype)
        for name, x in zip(INPUTS, tensors, strict=True)
    )
    return *grads, dstate


@_chunk_backward.register_fake
def _empty_backward(
    do, dfinal, q, k, v, g, beta, a, b, initial_state, cu_seqlens, scale, l2norm, read_before
):
    tensors = (q, k, v, g, beta, a, b)
    inputs = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)
    shape = (count_sequences(q, cu_seqlens), v.shape[2], q.shape[3], v.shape[3])
    return *inputs, q.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.options = inputs[-3:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:-3])


def _backward(ctx, do, dfinal):
    *tensors, initial_state, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(tensors[2]) if do is None else do
    *grads, dstate = torch.ops.fla.triton_chunk_backward(
        do, dfinal, *tensors, initial_state, cu_seqlens, *ctx.options
    )
    grads = [None if x is None else grad for x, grad in zip(tensors, grads, strict=True)]
    dstate = None if initial_state is None else dstate.to(initial_state.dtype)
    return *grads, dstate, None, None, None, None


_chunk.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("fla::triton_tokens", mutates_args=())
def _tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    gv: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    read_before: bool,
) -> tuple[Tensor, Tensor]:
    """o and the final state."""
    from fla.ops.engine.kernels import launch

    tensors = (q, k, v, g, beta, gv, a, b)
    with on_device(q.device):
        state = fp32(initial_state)
        return launch.tokens(tensors, state, cu_seqlens, scale, l2norm, read_before)


@_tokens.register_fake
def _(q, k, v, g, beta, gv, a, b, initial_state, cu_seqlens, scale, l2norm, read_before):
    shape = (count_sequences(q, cu_seqlens), v.shape[2], q.shape[3], v.shape[3])
    return v.new_empty(v.shape), v.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("fla::triton_tokens_", mutates_args=("state",))
def _overwriting_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    gv: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm: bool,
    read_before: bool,
) -> Tensor:
    """o; the final state is written over `state`."""
    from fla.ops.engine.kernels import launch

    tensors = (q, k, v, g, beta, gv, a, b)
    with on_device(q.device):
        return launch.tokens(tensors, state, cu_seqlens, scale, l2norm, read_before, True)[0]


@_overwriting_tokens.register_fake
def _(q, k, v, g, beta, gv, a, b, state, cu_seqlens, scale, l2norm, read_before):
    return v.new_empty(v.shape)
