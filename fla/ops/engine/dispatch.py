# SPDX-License-Identifier: MIT
"""Which backend runs an operator, and why: `resolve` decides, `explain` tells.

The rule: an explicit choice (`backend=` on the call, then `use_backend(...)`, then FLA_BACKEND)
runs or raises. Without one the first available backend of `triton`, `native`, `torch` runs: the
native kernels for CPU tensors below fp64 where they are built, torch for everything else. Asking
for a backend that cannot run raises with the reason.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fla.core.parallel import refuse_sharded
from fla.core.precision import compute_dtype
from fla.ops.engine.kernels import recurrence as triton_ops
from fla.ops.engine.native import library
from fla.ops.engine.recurrence.terms import CHUNK_SIZE
from fla.ops.engine.recurrence.token import SEGMENT

BACKENDS = ("triton", "native", "torch")
_chosen: str | None = None


# operators whose kernels are torch's alone, and those that have none in one language
_TORCH = (
    "block_sparse_attention", "deltaformer", "deltaformer_attn", "dilated_attention",
    "log_linear_attn", "titans_linear", "ttt_linear",
)  # fmt: skip
_LOSSES = ("cross_entropy_loss", "fused_linear_cross_entropy_loss", "fused_linear_divergence")
_ROWS = ("rms_norm", "swiglu", "swiglu_linear")  # on a GPU torch's do
_MODULES = (*_LOSSES, *_ROWS, "rms_norm_gated")
_NOT = {
    "native": ("hgrn", "rwkv4", *_LOSSES),
    "triton": ("abc", "gated_oja_rule", "gsa", *_ROWS),
}
_FORMS = ("fused_recurrent_", "fused_chunk_", "chunk_", "parallel_", "")
_WITHOUT = {
    backend: frozenset(form + name for form in _FORMS for name in (*_TORCH, *own))
    | {"fused_recurrent_mesa_net"}
    for backend, own in _NOT.items()
}


def unavailable(
    backend: str,
    device: torch.device,
    op: str = "",
    dtype: torch.dtype | None = None,
    key_channels: int = 0,
) -> str | None:
    """Why a backend cannot run (an operator, of a dtype, with an erase of so many key channels) on
    a device, or None where it can.
    """
    if backend == "torch":
        return None
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "native" and device.type != "cpu":
        return f"the native kernels are for CPU tensors, not for {device.type}"
    missing = library.MISSING if backend == "native" else triton_ops.missing(device)
    if missing is not None:
        return missing
    if dtype == torch.float64:
        return "fp64 is computed by torch"
    if op in _WITHOUT[backend] or op.startswith("naive_"):
        return f"{op} has no {'native' if backend == 'native' else 'Triton'} kernel yet"
    if backend == "triton" and key_channels > triton_ops.K_MOST:
        return f"the Triton kernels hold at most {triton_ops.K_MOST} key channels of an erase"
    return None


def requested(backend: str | None = None) -> tuple[str | None, str]:
    """The explicit choice in force and where it came from; (None, ...) where there is none."""
    if backend is not None:
        return backend, "the call's backend argument"
    if _chosen is not None:
        return _chosen, "use_backend()"
    from_environment = os.environ.get("FLA_BACKEND") or None
    return from_environment, "the environment variable FLA_BACKEND"


def resolve(
    op: str,
    device: torch.device,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    key_channels: int = 0,
) -> str:
    """The backend that runs `op` on `device`. An explicit choice that cannot run raises
    `ValueError`.
    """
    if op not in _MODULES:  # those look at a token alone
        refuse_sharded(op)
    choice, origin = requested(backend)
    if choice is None:
        return _first_available(op, device, dtype, key_channels)
    reason = unavailable(choice, device, op, dtype, key_channels)
    if reason is not None:
        raise ValueError(
            f"{op}: backend {choice!r} was asked for by {origin} but cannot run on {device}: "
            f"{reason}; use "
            f"backend='torch', or unset it and let fla choose"
        )
    return choice


def resolve_module(op: str, x: Tensor) -> str:
    """What runs one of `_MODULES`: torch's form inside `torch.compile`, which fuses it, and where
    kernels are asked for that it does not have.
    """
    wanted = requested()[0]
    if torch.compiler.is_compiling():
        return "torch"
    if wanted is None:
        return _first_available(op, x.device, x.dtype, 0)
    without = wanted == "triton" and op in _ROWS
    if without or (wanted == "native" and unavailable("native", x.device, op, x.dtype)):
        return "torch"
    return resolve(op, x.device, None, x.dtype)


_first: dict[tuple, str] = {}


def _first_available(*call: Any) -> str:
    """Of (op, device, dtype, key channels). Triton's interpreter is never chosen on a CPU."""
    backend = _first.get(call)
    if backend is None:
        op, device, *kind = call
        order = BACKENDS[1:] if device.type == "cpu" else BACKENDS
        backend = next(b for b in order if unavailable(b, device, op, *kind) is None)
        if device.type == "cuda" and triton_ops.missing(device) is not None:
            triton_ops.warn_once(triton_ops.missing(device))
        if not torch.compiler.is_compiling():
            _first[call] = backend
    return backend


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run every operator inside the block on one backend, or raise where it cannot.

    Example:
        >>> with use_backend("torch"):
        ...     resolve("demo", torch.device("cpu"))
        'torch'
    """
    global _chosen
    unavailable(backend, torch.device("cpu"))
    previous, _chosen = _chosen, backend
    try:
        yield
    finally:
        _chosen = previous


@dataclass(frozen=True)
class Explanation:
    """What runs a call, and why the other backends do not."""

    op: str
    backend: str
    form: str
    device: str
    dtype: str
    compute: str
    why: str
    rejected: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"{self.op} on {self.device}, {self.dtype} in, computed in {self.compute}",
            f"  runs: {self.backend}, {self.form}",
            f"  because: {self.why}",
            *(f"  not {name}: {reason}" for name, reason in self.rejected.items()),
        ]
        return "\n".join(lines)


FORMS = {
    # whole names first, then what they start with
    **dict.fromkeys(
        ("chunk_hgrn", "chunk_rwkv4"), "vector scan, chunks side by side; backward by hand"
    ),
    **dict.fromkeys(
        ("fused_recurrent_hgrn", "fused_recurrent_rwkv4", "fused_recurrent_mamba"),
        "scan in chunks of one token; backward by hand",
    ),
    "chunk_mamba": "selective scan, a chunk's states formed at once; backward by hand",
    "chunk_log_linear_attn": "chunk form over a hierarchy of states, under plain autograd",
    "fused_recurrent_log_linear_attn": "chunks of one token, under plain autograd",
    "chunk_mesa_net": "chunk form, conjugate gradients; backward by a second solve",
    "fused_recurrent_mesa_net": "token form with an exact solve, under plain autograd",
    **dict.fromkeys(
        ("block_sparse_attention", "dilated_attention"),
        "dense pieces in torch's flash kernels (elsewhere in blocks), merged; backward by hand",
    ),
    "deltaformer_attn": "exact blocks of rows, formed again in the backward",
    "fused_recurrent_deltaformer": "exact blocks of one row, formed again in the backward",
    "causal_conv1d": "one product per tap, under plain autograd",
    "rms_norm_gated": "in fp32; backward by hand",
    **dict.fromkeys(("rms_norm", "swiglu"), "torch's own"),
    "swiglu_linear": "the product formed again in the backward",
    "cross_entropy_loss": "in fp32, under plain autograd",
    **dict.fromkeys(
        ("fused_linear_cross_entropy_loss", "fused_linear_divergence"),
        "logits of a chunk of tokens at a time, turned into gradients at once",
    ),
    **dict.fromkeys(
        ("chunk_ttt_linear", "chunk_titans_linear"), "mini-batches in turn, under plain autograd"
    ),
    "chunk_": f"chunk form, chunk_size tokens a chunk (default {CHUNK_SIZE}); backward by hand",
    "fused_chunk_": f"chunk form, {CHUNK_SIZE} tokens a chunk; backward by hand",
    "fused_recurrent_": f"token form; under autograd recomputed in segments of {SEGMENT} tokens",
    "parallel_": "chunk form; output_attentions adds the T x T matrix",
    "naive_": "the page's literal loop, under plain autograd",
}


SCAN_FORM = "channels side by side, token by token, in C++ ({}); backward by hand"
NATIVE_FORMS = {
    **dict.fromkeys(("chunk_mamba", "fused_recurrent_mamba", "causal_conv1d"), SCAN_FORM),
    **dict.fromkeys(
        ("rms_norm", "rms_norm_gated"), "a pass over the rows in C++ ({}); backward by hand"
    ),
    **dict.fromkeys(
        ("swiglu", "swiglu_linear"), "torch forward, a pass over the rows in C++ ({}) for gradients"
    ),
    "fused_recurrent_": "token by token in C++ ({}); with gradients as the chunk form, or torch's "
    "token form where beta is per value channel, or a decay of value channels is not alone",
    "": "chunks of 16 tokens in C++ ({}); backward by hand",
}
TRITON_FORMS = {
    "rms_norm_gated": "one pass over the rows in Triton; backward by hand",
    "cross_entropy_loss": "two passes over a row in Triton; backward by hand",
    **dict.fromkeys(
        ("fused_linear_cross_entropy_loss", "fused_linear_divergence"),
        "logits of a chunk of tokens at a time, turned into gradients at once in Triton",
    ),
    "causal_conv1d": "chunks of 64 tokens side by side, in Triton; backward by hand",
    **dict.fromkeys(
        ("chunk_hgrn", "fused_recurrent_hgrn", "chunk_rwkv4", "fused_recurrent_rwkv4"),
        "vector scan in Triton, 64 tokens at once; backward by hand",
    ),
    **dict.fromkeys(
        ("chunk_mamba", "fused_recurrent_mamba"),
        "selective scan in Triton, 16 tokens at once; backward by hand",
    ),
    "fused_recurrent_": "token by token in Triton; with gradients as the chunk form, or torch's "
    "token form where beta is per value channel, or there is a decay of value channels",
    "": "chunks of 64 tokens in Triton; backward by hand",
}


def _form(name: str, forms: dict[str, str]) -> str | None:
    beginnings = (f for f in forms if f[-1:] in ("_", "") and name.startswith(f))
    return forms.get(name) or forms.get(next(beginnings, name))


ERASES = {"beta", "a", "b"}  # arguments of operators that erase


def explain(op: Callable, *args: object, **kwargs: object) -> Explanation:
    """Which implementation `op(*args, **kwargs)` would run, on what, and why; runs nothing.

    Example:
        >>> from fla.ops.linear_attn import chunk_linear_attn
        >>> x = torch.zeros(1, 4, 2, 8)
        >>> explain(chunk_linear_attn, x, x, x, backend="torch").backend
        'torch'
    """
    name = op.__name__
    form = _form(name, FORMS)
    if form is None:
        raise ValueError(
            f"explain: {name} is not an operator of fla.ops; pass a function such as "
            "fla.ops.chunk_gated_delta_rule"
        )
    bound = inspect.signature(op).bind_partial(*args, **kwargs).arguments
    tensor = next((x for x in bound.values() if isinstance(x, Tensor)), None)
    if tensor is None:
        raise ValueError(
            f"explain: no tensor among the arguments of {name}; pass the tensors of the call"
        )
    choice, origin = requested(bound.get("backend"))  # type: ignore[arg-type]
    kind: Any = (tensor.dtype, tensor.shape[-1] if bound.keys() & ERASES else 0)
    backend = resolve(name, tensor.device, bound.get("backend"), *kind)  # type: ignore[arg-type]
    others = {b: unavailable(b, tensor.device, name, *kind) for b in BACKENDS if b != backend}
    if backend == "triton":
        form = str(_form(name, TRITON_FORMS))
    if backend == "native":
        form = str(_form(name, NATIVE_FORMS)).format(library.instruction_set_name())
    return Explanation(
        op=name,
        backend=backend,
        form=form,
        device=str(tensor.device),
        dtype=str(tensor.dtype).removeprefix("torch."),
        compute=str(compute_dtype(tensor.dtype)).removeprefix("torch."),
        why=f"it was asked for by {origin}" if choice else "it is the first available backend",
        rejected={
            b: reason or ("another was asked for" if choice else "an earlier one is available")
            for b, reason in others.items()
        },
    )
