# SPDX-License-Identifier: MIT
"""`OpCase`: one operator, as its tests, benchmarks and documentation see it. Each page ends with
its own, `CASES`; `registry.py` collects them.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import checked
from fla.core.boundaries import boundaries_to_list
from fla.core.checks import check_groups, check_parts, check_same, check_sequences, check_shapes
from fla.core.precision import compute_dtype

FAMILIES = {
    "no decay": "S ← S + k vᵀ",
    "a decay per head or token": "S ← eᵍ S + k vᵀ",
    "a decay per channel": "S ← diag(eᵍ) S + k vᵀ",
    "delta rules": "S ← eᵍ S; S ← S + β k (v - Sᵀk)ᵀ",
    "low-rank transitions": "S ← diag(eᵍ) S + b (aᵀS) + k vᵀ",
    "states that solve or learn": "S minimises a loss on the tokens so far",
    "states that grow": "with log T, or with T",
    "softmax over some tokens": "softmax(q kᵀ) v over those kept",
}  # and what their state does

Inputs = dict[str, Tensor]
Loop = TypeVar("Loop", bound=Callable[..., Any])
Equation = Callable[[Inputs], dict[str, Any]]

QKV = dict(q="B T H K", k="B T H K unit", v="B T HV V")
SIZES = dict(M=9, D=16, R=2, L=10, Q=2, n=2)  # axes that not every operator has
SIZES |= {"1": 1, "3": 3}
# axes whose size others tell
DERIVED: dict[str, Callable[[dict[str, int]], int]] = {
    "V+1": lambda sizes: sizes["V"] + 1,
    "P": lambda sizes: sizes["K"] * (sizes["K"] + 1) // 2,
    "F": lambda sizes: 1 + sizes["K"] + sizes["K"] * (sizes["K"] + 1) // 2,
}


def _values(kind: str, x: Tensor) -> Tensor:
    """Normal numbers x brought into the domain of an argument."""
    return {
        "normal": lambda: x,
        "unit": lambda: F.normalize(x, dim=-1),
        "decay": lambda: F.logsigmoid(x + 1),
        "beta": lambda: 2 * x.sigmoid(),
        "rate": x.sigmoid,
        "small": lambda: x / 10,
        "negative": lambda: -x.exp(),
        "positive": lambda: 0.5 + x.square(),
        "count": lambda: torch.zeros(x.shape, dtype=torch.long),
        "average": lambda: torch.stack([x[:, 0], torch.ones_like(x[:, 1]), x[:, 2]], 1),
        "squares": lambda: x @ x.mT,
    }[kind]()


def _axes(spec: str) -> list[str]:
    return [a for a in spec.split() if not a.islower() or a == "n"]


def _draw(spec: str, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
    """Random fp64 values of an argument, inside its domain."""
    *_, last = spec.split()
    shape = [sizes[a] for a in _axes(spec)]
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return _values(last if last.islower() else "normal", x)


@dataclass(frozen=True)
class OpCase:
    """One operator, as its tests and benchmarks see it.

    Fields:
        name: the page, `fla/ops/<name>.py`.
        title: the operator in words; paper: its source; family: its row in the README's table.
        chunk, token, naive: the public functions (`naive` is the page's literal loop).
        tensors: axes, and the domain where it is not any number, of each tensor argument. `T*n` is
            an axis of n steps per token; without T an argument is a parameter.
        state: axes of each state argument; a tuple of them for an argument that is a tuple.
        fixed: keyword arguments that every call passes.
        chunk_fixed: those that calls of chunk and token pass and calls of naive do not.
        grain: tokens of a mini-batch that is part of the operator: it may be split there only, and
            its chunk size is no choice.
        equation: inputs to the arguments q, k, v, g, a, b, bonus of `recurrence/equation.py`, and
            `steps` where a token takes several; None if the operator is not a point of it.
    """

    name: str
    title: str
    paper: str
    family: str
    chunk: Callable
    token: Callable
    naive: Callable
    tensors: dict[str, str]
    equation: Equation | None = None
    state: dict[str, str | tuple[str, ...]] = field(
        default_factory=lambda: {"initial_state": "N HV K V"}
    )
    fixed: dict[str, Any] = field(default_factory=dict)
    chunk_fixed: dict[str, Any] = field(default_factory=dict)
    grain: int = 1

    def __post_init__(self) -> None:
        """The axes are the page's literal loop's, too, which checks its arguments by them."""
        names = inspect.getclosurevars(self.naive).nonlocals.get("names", {})
        loop: Any = self.naive if _told(self.naive) else inspect.unwrap(self.naive, stop=_told)
        if _told(loop):
            specs = {n: _checkable(spec) for n, spec in (self.tensors | self.state).items()}
            loop.axes.append({names.get(n, n): spec for n, spec in specs.items()})

    @cached_property
    def grouped(self) -> bool:
        """Whether value (or query) heads may be a multiple of the others."""
        axes = " ".join(self.tensors.values()).split()
        return "HV" in axes and "H" in axes

    def axes(self, name: str) -> list[str]:
        """The axes of a tensor argument."""
        return _axes(self.tensors[name])

    def inputs(
        self,
        B: int,
        T: int,
        H: int,
        K: int,
        V: int,
        *,
        HV: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
        **sizes: int,
    ) -> Inputs:
        """Random arguments inside the operator's domain."""
        generator = torch.Generator().manual_seed(seed)
        sizes = SIZES | dict(B=B, T=T, H=H, HV=HV or H, K=K, V=V) | sizes
        sizes["T*n"] = sizes["T"] * sizes["n"]
        return {
            name: _draw(spec, sizes, generator).to(device, dtype)
            for name, spec in self.tensors.items()
        }

    def without_groups(self, inputs: Inputs) -> Inputs:
        """Heads repeated to the value heads: the meaning of grouped value heads."""
        if not self.grouped:
            return inputs
        HV = next(x.shape[a.index("HV")] for n, x in inputs.items() if "HV" in (a := self.axes(n)))
        out = {}
        for name, x in inputs.items():
            axis = self.axes(name).index("H") if "H" in self.axes(name) else None
            out[name] = x if axis is None else x.repeat_interleave(HV // x.shape[axis], dim=axis)
        return out

    def states(
        self,
        N: int,
        H: int,
        K: int,
        V: int,
        *,
        HV: int | None = None,
        dtype: torch.dtype = torch.float64,
        seed: int = 7,
        **sizes: int,
    ) -> list[Tensor]:
        """Random initial states, flat."""
        generator = torch.Generator().manual_seed(seed)
        sizes = SIZES | dict(N=N, H=H, HV=HV or H, K=K, V=V) | sizes
        sizes |= {axis: size(sizes) for axis, size in DERIVED.items()}
        states = []
        for spec in self.state.values():
            for axes in [spec] if isinstance(spec, str) else spec:
                x = _draw(axes, sizes, generator)
                states.append(x.to(dtype) if x.is_floating_point() else x)
        return states

    def state_arguments(self, states: Sequence[Tensor] | None) -> dict[str, Any]:
        """Flat states as the arguments of a call; none at all for None."""
        if states is None:
            return {}
        rest: list[Tensor] = list(states)
        out: dict[str, Any] = {}
        for name, spec in self.state.items():
            if isinstance(spec, str):
                out[name] = rest.pop(0)
            else:
                out[name] = tuple(rest.pop(0) for _ in spec)
        return out

    def tokens(self, inputs: Inputs, begin: int, end: int) -> Inputs:
        """The tokens from begin to end of every input that has tokens."""
        out = {}
        for name, x in inputs.items():
            axes = self.axes(name)
            n = SIZES["n"] if "T*n" in axes else 1
            out[name] = x[:, begin * n : end * n] if {"T", "T*n"} & set(axes) else x
        return out

    def call(
        self, function: Callable, inputs: Inputs, states: Sequence[Tensor] | None = None, **kw: Any
    ) -> list[Tensor]:
        """`function` on the inputs: the output and the final states, flat."""
        fixed = self.fixed if function is self.naive else self.fixed | self.chunk_fixed
        fixed = fixed | {"output_final_state": bool(self.state)}
        results = function(**inputs, **self.state_arguments(states), **fixed, **kw)
        if isinstance(results, Tensor):
            return [results]
        flat: list[Tensor] = []
        for x in results:
            flat += x if isinstance(x, tuple) else [x]
        return [x for x in flat if x is not None]


def _wide(x: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in a dtype, tuples of them too; anything else as it is."""
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    if isinstance(x, tuple):
        parts = [_wide(part, dtype) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


def _per_sequence(loop: Callable[..., Any], arguments: Inputs, bounds: list[int]) -> tuple:
    """A loop called for each sequence of a packed row, and what it returns joined."""

    def rows(begin: int, end: int, i: int) -> dict[str, Any]:
        part = {}
        for name, x in arguments.items():
            if name.startswith("initial_"):
                x = x if x is None else x[i : i + 1]
            elif isinstance(x, Tensor) and x.dim() > 2:
                steps = x.shape[1] // bounds[-1]  # per token
                x = x[:, begin * steps : end * steps]
            part[name] = x
        return part

    results = []
    for i, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            results.append(loop(**rows(begin, end, i)))
            continue
        o, *finals = loop(**rows(0, 1, i))  # an empty sequence keeps its state; this has its shape
        given = [arguments.get(name) for name in inspect.signature(loop).parameters
                 if name.startswith("initial_")]  # fmt: skip
        ends = [
            x if x is None else torch.zeros_like(x) if S is None else S[i : i + 1]
            for S, x in zip(given, finals, strict=True)
        ]
        results.append((o[:, :0], *ends))
    outs, *states = zip(*results, strict=True)
    joined = (None if x[0] is None else torch.cat(x) for x in states)
    return torch.cat(outs, 1), *joined


def _told(function: Callable) -> bool:
    """Whether a function is a literal loop, which the page's case tells its axes."""
    return hasattr(function, "axes")


def _checkable(spec: Any) -> Any:
    """The axes of an argument without its domain, but for counts, which are no numbers."""
    if isinstance(spec, tuple):
        return tuple(_checkable(part) for part in spec)
    return " ".join([*_axes(spec), *(["count"] if spec.endswith("count") else [])])


def _check_one_of(
    op: str, given: dict[str, Any], axes: list[dict[str, Any]], grouped: tuple[str, ...]
) -> None:
    """`_check` by any of a loop's cases; the first one's error where none fits."""
    errors = []
    for specs in axes:
        try:
            return _check(op, given, specs, grouped)
        except (ValueError, TypeError) as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return None


def _check(op: str, given: dict[str, Any], axes: dict[str, Any], grouped: tuple[str, ...]) -> None:
    """Raise `ValueError` unless the arguments of a literal loop fit."""
    bounds, tensors = given.get("cu_seqlens"), {}
    for name, spec in axes.items():
        x = given.get(name)
        if isinstance(spec, tuple) and x is not None:
            check_parts(op, x, ", ".join(f"part {i}" for i in range(len(spec))))
        parts = zip(x or (), spec, strict=False) if isinstance(spec, tuple) else [(x, spec)]
        for i, (y, own) in enumerate(parts):
            own = own if bounds is not None else re.sub(r"\bN\b", "B", own)
            tensors[f"{name}[{i}]" if isinstance(spec, tuple) else name] = (y, own)
    plain = {n: (x, own.removesuffix(" count")) for n, (x, own) in tensors.items()}
    sizes = check_shapes(op, **plain)
    check_same(op, dtype=False, **{n: x for n, (x, s) in tensors.items() if "count" not in s})
    if {"H", "HV"} <= set(sizes):
        check_groups(op, sizes, grouped[0] if grouped else "q")
    for axis, found in sizes.items():
        right = int(axis) if axis.isdigit() else DERIVED.get(axis, lambda sizes: found)(sizes)  # noqa: B023
        if found != right:
            name = next(n for n, (_, own) in tensors.items() if axis in own.split())
            raise ValueError(f"{op}: {name} has {axis}={found}, but {right} was expected")
    if bounds is not None:
        check_sequences(op, sizes["B"], bounds, None)
        boundaries_to_list(bounds, sizes["T"], op)


def literal(*grouped: str, of: str = "v") -> Callable[[Loop], Loop]:
    """Decorator of a page's literal loop, which then takes every call that the other forms take.

    Half precision is computed in fp32 (states, which are fp32, meet it there), the output comes
    back in the dtype of the argument `of`, and the `grouped` arguments are repeated to its heads.
    A loop with a parameter `cu_seqlens` never sees it: it is called once per sequence.

    Example:
        >>> @literal("q")
        ... def product(q, v):
        ...     return q * v
        >>> o = product(torch.ones(1, 2, 1, 4).half(), torch.ones(1, 2, 3, 4).half())
        >>> o.shape, o.dtype
        (torch.Size([1, 2, 3, 4]), torch.float16)
    """

    def decorate(loop: Loop) -> Loop:
        signature = inspect.signature(loop)
        axes: list[dict[str, Any]] = []

        @checked
        @wraps(loop)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            _check_one_of(loop.__name__, given.arguments, axes, grouped)
            out, heads = given.arguments[of].dtype, given.arguments[of].shape[2:3]
            for name, x in given.arguments.items():
                given.arguments[name] = _wide(x, compute_dtype(out))
            for name in grouped:
                x, axis = given.arguments[name], 2 if given.arguments[name].dim() == 4 else 0
                given.arguments[name] = x.repeat_interleave(heads[0] // x.shape[axis], axis)
            bounds = given.arguments.pop("cu_seqlens", None)
            result = (
                loop(*given.args, **given.kwargs)
                if bounds is None
                else _per_sequence(loop, given.arguments, bounds.tolist())
            )
            return (
                result.to(out) if isinstance(result, Tensor) else (result[0].to(out), *result[1:])
            )

        call.axes = axes  # type: ignore[attr-defined]  # the page's cases add theirs
        return cast(Loop, call)

    return decorate


def renamed(function: Callable, **names: str) -> Callable:
    """`function` taking some of its arguments by the names the chunk form has for them."""

    @wraps(function)
    def call(**kwargs: Any) -> Any:
        return function(**{names.get(name, name): x for name, x in kwargs.items()})

    return call


def linear(x: Inputs) -> dict[str, Any]:
    return dict(q=x["q"], k=x["k"], v=x["v"])


def delta(x: Inputs) -> dict[str, Any]:
    beta = x["beta"][..., None]
    return dict(q=x["q"], k=x["k"], v=beta * x["v"], a=-beta * x["k"], b=x["k"])


def constant(log_decay: Tensor) -> Equation:
    return lambda x: linear(x) | {"g": log_decay.to(x["v"]).expand(x["v"].shape[:3])[..., None]}


def gated_delta(x: Inputs) -> dict[str, Any]:
    decay = x["g"][..., None] if x["g"].dim() == 3 else x["g"]
    return {**delta(x), "g": decay, "b": decay.exp() * x["k"]}
