# SPDX-License-Identifier: MIT
"""Argument checks whose specification is also the error message."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_checked = os.environ.get("FLA_CHECK_INPUTS") == "1"


@contextmanager
def checked_inputs(on: bool = True) -> Iterator[None]:
    """Inside the block operators look at the values of their decays and refuse those above 0. It
    costs a pass over them and on a device a synchronisation, so it is off unless asked for here or
    by FLA_CHECK_INPUTS=1.

    Example:
        >>> with checked_inputs():
        ...     check_log_decay("demo", g=torch.tensor([-0.5]))
    """
    global _checked
    previous, _checked = _checked, on
    try:
        yield
    finally:
        _checked = previous


def checks_inputs() -> bool:
    """Whether operators look at values now."""
    return _checked


def check_log_decay(op: str, **decays: Tensor | None) -> None:
    """Raise `ValueError` for a log decay above 0, where inputs are checked."""
    if not _checked:
        return
    for name, x in decays.items():
        if x is not None and x.numel() and bool(x.max() > 0):
            raise ValueError(
                f"{op}: {name} holds {x.max().item():.4g}; a natural log of a decay in (-inf, 0] "
                "was expected; pass for example -softplus(x) or logsigmoid(x)"
            )


def check_shapes(op: str, **specs: tuple[Tensor | None, str]) -> dict[str, int]:
    """Bind axis names to sizes and raise `ValueError` on the first argument that disagrees.

    Each keyword is `name=(tensor, "B T H K")`; a tensor of None is skipped. The first argument that
    mentions an axis fixes its size, and the message names that argument.

    Example:
        >>> sizes = check_shapes("demo", q=(torch.zeros(1, 2, 3, 4), "B T H K"))
        >>> sizes["K"]
        4
    """
    sizes: dict[str, int] = {}
    source: dict[str, str] = {}
    for name, (tensor, spec) in specs.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{op}: {name} is a {type(tensor).__name__}; pass a torch.Tensor [{spec}]"
            )
        axes, shape = spec.split(), tensor.shape
        if len(shape) != len(axes):
            raise ValueError(
                f"{op}: {name} has shape {list(shape)}, but {len(axes)} axes "
                f"[{_named(axes, sizes)}] were expected; reshape {name} to that layout"
            )
        for axis, size in zip(axes, shape, strict=True):
            if axis not in sizes:
                sizes[axis], source[axis] = size, name
            if size == 0 and axis in ("H", "HV", "K", "V"):
                raise ValueError(f"{op}: {name} has shape {list(shape)}; expected {axis} above 0")
            if sizes[axis] != size:
                raise ValueError(
                    f"{op}: {name} has shape {list(shape)}, but [{_named(axes, sizes)}] was "
                    f"expected: {axis} is {sizes[axis]} in {source[axis]}; "
                    f"pass {name} with {axis}={sizes[axis]}"
                )
    return sizes


def _named(axes: list[str], sizes: dict[str, int]) -> str:
    return " ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes)


def check_parts(op: str, state: Any, parts: str, when: str = "") -> None:
    """Raise `ValueError` unless the initial state is a tuple of as many tensors as `parts`, such as
    "S, n, m", names; `when` says in the message what asks for them.
    """
    if not isinstance(state, tuple | list) or len(state) != len(parts.split(",")):
        size = f" of {len(state)}" if isinstance(state, tuple | list) else ""
        raise ValueError(
            f"{op}: initial_state is a {type(state).__name__}{size}; {when}({parts}) was expected"
        )


def check_same(op: str, *, dtype: bool = True, **tensors: Tensor | None) -> None:
    """Raise `ValueError` unless the tensors are floating point, on one device and, with `dtype`, of
    one dtype.
    """
    first_name, first = next((name, t) for name, t in tensors.items() if t is not None)
    for name, t in tensors.items():
        if t is None:
            continue
        if not t.is_floating_point():
            problem = f"has dtype {t.dtype}; a floating-point tensor was expected"
            raise ValueError(f"{op}: {name} {problem}")
        if t.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {t.device} but {first_name} is on {first.device}; "
                f"move {name} with .to({str(first.device)!r})"
            )
        if dtype and t.dtype != first.dtype:
            raise ValueError(
                f"{op}: {name} has dtype {t.dtype} but {first_name} has {first.dtype}; "
                f"cast {name} with .to({first.dtype})"
            )


def check_tensors(op: str, **specs: tuple[Tensor | None, str]) -> dict[str, int]:
    """`check_shapes`, and that all are floating point and on one device: for a page that computes
    with its arguments before the engine checks what it is given.
    """
    sizes = check_shapes(op, **specs)
    check_same(op, dtype=False, **{name: tensor for name, (tensor, _) in specs.items()})
    return sizes


def check_groups(op: str, sizes: dict[str, int], grouped: str = "v") -> None:
    """Raise `ValueError` unless HV, the heads of v (or q), is a multiple of H, the heads of k."""
    heads, value_heads = sizes["H"], sizes["HV"]
    if heads == 0 or value_heads % heads:
        raise ValueError(
            f"{op}: {grouped} has HV={value_heads} heads and k has H={heads}; HV must be a "
            f"multiple of H (grouped {'value' if grouped == 'v' else 'query'} heads)"
        )


def check_sequences(
    op: str,
    batch: int,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    name: str = "initial_state",
) -> int:
    """The number of sequences N: `len(cu_seqlens) - 1` for packed input (which needs B = 1), else
    B.
    """
    if cu_seqlens is None:
        sequences, origin = batch, f"the batch size B={batch}"
    else:
        check_boundaries(op, batch, cu_seqlens)
        sequences = cu_seqlens.shape[0] - 1
        origin = f"cu_seqlens, which bounds {sequences} sequences"
    if initial_state is not None and initial_state.shape[0] != sequences:
        raise ValueError(
            f"{op}: {name} holds {initial_state.shape[0]} states but {sequences} were expected "
            f"from {origin}; pass one state per sequence"
        )
    return sequences


def check_boundaries(
    op: str, batch: int, cu_seqlens: Tensor, device: torch.device | None = None
) -> None:
    """Shape, dtype and device of `cu_seqlens`, which may lie beside the tokens, on `device`, or on
    the host; its values are checked where they are read.
    """
    if batch != 1:
        raise ValueError(
            f"{op}: cu_seqlens was given with batch size {batch}; packed sequences need B=1: "
            "concatenate them along the time axis"
        )
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{op}: cu_seqlens must be a 1-D tensor [0, ..., T] of at least two boundaries, got "
            f"{cu_seqlens!r}"
        )
    if cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.dtype == torch.bool:
        raise ValueError(
            f"{op}: cu_seqlens has dtype {cu_seqlens.dtype}; int32 or int64 was expected"
        )
    if cu_seqlens.is_meta or (not cu_seqlens.is_cpu and device not in (None, cu_seqlens.device)):
        raise ValueError(
            f"{op}: cu_seqlens is on {cu_seqlens.device} and the tokens on {device}; move it there"
        )


def refuse(op: str, name: str, value: object, fix: str) -> None:
    """Raise `ValueError` when an argument this implementation cannot honour was given."""
    if value is not None:
        raise ValueError(f"{op}: {name} is not supported here (got {type(value).__name__}); {fix}")
