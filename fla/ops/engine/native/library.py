# SPDX-License-Identifier: MIT
"""Finds, loads and calls the compiled library through ctypes. The structures are the same as in
`src/problem.h`, which says the shape of every field.

FLA_NATIVE_ISA names an instruction set instead of the best that this machine runs.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fla.core.boundaries import boundaries_to_list
from fla.ops.engine.recurrence.operators import TERMS

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BLOCK, PANEL, CHANNELS = 64, 32, 128
OUT_OF_MEMORY = 1
VIEWS = (*TERMS, "o")
GRADIENTS = ("dq", "dk", "dv", "dg", "dbeta", "da", "db")
STATES = ("initial", "dfinal", "final_state", "dinitial", "states", "bounds")
SIZES = ("N", "T", "H", "HV", "K", "V")


class View(Structure):
    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("batch", "token", "head", "channel")),
        ("type", c_int32),
    ]


class Problem(Structure):
    _fields_ = [
        *((name, View) for name in (*VIEWS, *GRADIENTS)),
        *((name, c_void_p) for name in STATES),
        *((name, c_int64) for name in SIZES),
        ("scale", c_float),
        *((name, c_int32) for name in ("decay", "erase", "l2norm", "read_before", "parts")),
    ]


class Conv(Structure):
    _fields_ = [
        *((name, View) for name in ("x", "y", "dx")),
        *((name, c_void_p) for name in ("weight", "bias", "history", "dfinal")),
        *((name, c_void_p) for name in ("final_history", "dweight", "dbias", "dhistory", "bounds")),
        *((name, c_int64) for name in ("N", "T", "D", "W")),
        ("silu", c_int32),
    ]


class Scan(Structure):
    _fields_ = [
        *((name, View) for name in ("x", "dt", "B", "C", "y", "dx", "ddt")),
        *((name, c_void_p) for name in ("A", "initial", "dfinal", "final_state", "dinitial")),
        *((name, c_void_p) for name in ("states", "dA", "dB", "dC", "bounds")),
        *((name, c_int64) for name in ("N", "T", "D", "K")),
    ]


class Gated(Structure):
    _fields_ = [
        *((name, View) for name in ("x", "g", "y", "dx", "dg")),
        *((name, c_void_p) for name in ("weight", "bias", "dweight", "dbias")),
        *((name, c_int64) for name in ("N", "D")),
        ("eps", c_float),
        *((name, c_int32) for name in ("norm", "gate")),
    ]


PROBLEMS: dict[str, tuple[type[Structure], tuple[str, ...]]] = {  # and the functions that take them
    "fla_problem_size": (Problem, ("fla_forward", "fla_backward", "fla_token")),
    "fla_conv_size": (Conv, ("fla_conv_forward", "fla_conv_backward")),
    "fla_scan_size": (Scan, ("fla_scan_forward", "fla_scan_backward")),
    "fla_gated_size": (Gated, ("fla_gated_forward", "fla_gated_backward")),
}


def view(x: Tensor | None) -> View:
    """`[B, T, heads]` or `[B, T, heads, channels]` as it lies in memory."""
    if x is None:
        return View()
    strides = x.stride()
    if len(strides) == 3:  # one number for all channels
        strides = (*strides, 0)
    return View(x.data_ptr(), *strides, TYPES[x.dtype])


def channels(x: Tensor) -> View:
    """`[B, T, D]`: one head of D channels."""
    return view(x.unsqueeze(2))


def bounds(op: str, cu_seqlens: Tensor, total: int) -> Tensor:
    """The checked boundaries `[N + 1]` as the kernels read them."""
    boundaries_to_list(cu_seqlens, total, op)
    return cu_seqlens.to(torch.int64).contiguous()


def readable(x: Tensor) -> Tensor:
    """What the kernels read: anything but fp32, bf16 and fp16 as fp32."""
    return x if x.dtype in TYPES else x.float()


@cache
def library() -> ctypes.CDLL:
    """The loaded library; raises `OSError` where it is absent or built from other sources."""
    path = os.environ.get("FLA_NATIVE_LIBRARY") or next(
        map(str, Path(__file__).parent.glob("libfla_engine*")), None
    )
    if path is None:
        raise OSError("it was not built")
    lib = ctypes.CDLL(path)
    try:
        ours = _declare(lib)
    except AttributeError as error:
        raise OSError(f"{path} was built from other sources ({error})") from None
    if not ours:
        raise OSError(f"{path} was built from other sources")
    return lib


def _declare(lib: ctypes.CDLL) -> bool:
    """Declares the functions of `lib`; whether its structures have the sizes of those above."""
    lib.fla_isa_name.restype = ctypes.c_char_p
    for size, (problem, functions) in PROBLEMS.items():
        getattr(lib, size).restype = c_int64
        for name in functions:
            getattr(lib, name).argtypes = [POINTER(problem), c_int, c_int]
    return all(getattr(lib, size)() == ctypes.sizeof(p) for size, (p, _) in PROBLEMS.items())


def _missing() -> str | None:
    """Why there are no native kernels, or None if they run."""
    try:
        library()
    except OSError as error:
        return (
            f"the native kernels are not there: {error}; install a C++ compiler and fla again "
            "(pip install --force-reinstall --no-deps .)"
        )
    return None


@cache
def instruction_sets() -> list[str]:
    """Instruction sets that the library was built for and this machine runs, the best first."""
    lib = library()
    names = [lib.fla_isa_name(i).decode() for i in range(lib.fla_isa_count())]
    return [name for i, name in enumerate(names) if lib.fla_isa_runs(i)]


@cache
def instruction_set_name() -> str:
    """The instruction set in use."""
    wanted, names = os.environ.get("FLA_NATIVE_ISA"), instruction_sets()
    if wanted and wanted not in names:
        raise ValueError(f"FLA_NATIVE_ISA is {wanted!r}; this machine runs {', '.join(names)}")
    return wanted or names[0]


@cache
def instruction_set() -> int:
    """The number of the instruction set in use."""
    lib, name = library(), instruction_set_name().encode()
    return next(i for i in range(lib.fla_isa_count()) if lib.fla_isa_name(i) == name)


def call(function: str, problem: Problem | Conv | Scan | Gated) -> None:
    """Run one of the library's functions on torch's number of threads."""
    status = getattr(library(), function)(
        ctypes.byref(problem), instruction_set(), torch.get_num_threads()
    )
    if status == OUT_OF_MEMORY:
        raise MemoryError(f"{function}: no memory for a thread's workspace; use fewer threads")
    if status:
        raise RuntimeError(f"{function}: status {status}")


MISSING = _missing()  # a constant, which torch.compile takes as one


def runs(facts: Any) -> str | None:
    """Why no native kernel runs a call, or None."""
    if facts.device.type != "cpu":
        return f"the native kernels are for CPU tensors, not for {facts.device.type}"
    return MISSING or ("fp64 is computed by torch" if facts.dtype == torch.float64 else None)


def in_cpp(text: str) -> Callable[[], str]:
    """What a native form says of itself: `{}` stands for the language and the instruction set."""
    return lambda: text.format(f"C++ ({instruction_set_name()})")
