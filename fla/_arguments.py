# SPDX-License-Identifier: MIT
"""`checked`: what a signature's annotations say of its arguments, held at every call.

A tensor has to be a tensor, a flag a bool, a count a whole number from 1 on, a number finite. The
tables hold what counts and numbers of one name may be beside that; shapes, dtypes and devices are
checked where they are read (`fla.core.checks`).
"""

from __future__ import annotations

import inspect
import math
import numbers
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache, wraps
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fla.core.operator import transformed

F = TypeVar("F", bound=Callable[..., Any])

# The least an integer argument may be where that is not 1; None for any.
LEAST: dict[str, int | None] = {
    "layer_idx": 0,
    "ignore_index": None,
    "logits_to_keep": 0,
    "num_items_in_batch": 0,
    "seed": 0,
    "rank": 0,
    "max_seqlen": 0,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# The range of a float argument, (least, most, whether the least itself is allowed).
RANGES: dict[str, tuple[float, float, bool]] = {
    "eps": (0.0, math.inf, True),
    "norm_eps": (0.0, math.inf, True),
    "dropout": (0.0, 1.0, True),
    "hidden_ratio": (0.0, math.inf, False),
    "initializer_range": (0.0, math.inf, True),
}

KNOWN = {"Tensor": Tensor, "bool": bool, "str": str, "dtype": torch.dtype}
if dist.is_available():
    KNOWN["ProcessGroup"] = dist.ProcessGroup
WORDS = {
    "Tensor": "a torch.Tensor",
    "bool": "True or False",
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "None": "None",
    "dtype": "a torch.dtype",
    "ProcessGroup": "a torch.distributed.ProcessGroup",
}
CONTAINERS: dict[str, tuple[type, ...]] = {
    "dict": (Mapping,), "list": (list, tuple), "tuple": (list, tuple), "Sequence": (list, tuple)
}  # fmt: skip


def _head(part: str) -> str:
    """The name of a type in an annotation, without its module and what it holds."""
    return part.partition("[")[0].rpartition(".")[2]


class Argument:
    """What one parameter accepts.

    Fields:
        types: types that need no further look; a value of another type goes through `problem`.
        off: whether None stands for False, as for a flag that is off by default: layers hand their
            callers' `use_cache=None` down.
    """

    def __init__(self, name: str, annotation: str, default: Any = None):
        self.name, self.off = name, default is False
        self.least = LEAST.get(name, 1)
        if type(default) is int and self.least is not None:
            self.least = min(self.least, default)
        self.parts = [part.strip() for part in re.split(r"\|(?![^\[]*\])", annotation)]
        self.types = {KNOWN[_head(part)] for part in self.parts if _head(part) in KNOWN}
        self.containers = tuple(x for part in self.parts for x in CONTAINERS.get(_head(part), ()))
        if Tensor in self.types:
            self.types.add(torch.nn.Parameter)
        if "None" in self.parts:
            self.types.add(type(None))

    @property
    def understood(self) -> bool:
        """Whether every part of the annotation is one that is checked here."""
        return all(_head(part) in {**WORDS, **CONTAINERS} for part in self.parts)

    def problem(self, value: Any) -> str | None:
        """What was expected instead of a value, or None if it is right."""
        if isinstance(value, Tensor) and Tensor in self.types:
            return None
        if isinstance(value, bool | torch.SymBool) or type(value).__name__ == "bool_":
            return None if bool in self.types else f"expected {self._wanted()}"
        if isinstance(value, numbers.Integral | torch.SymInt):
            return self._count(value) if "int" in self.parts else self._number(value)
        if isinstance(value, numbers.Real | torch.SymFloat):
            return self._number(value)
        if any(isinstance(value, kind) for kind in self.types - {bool}):
            return None
        if self.containers and isinstance(value, self.containers):
            return self._elements(value)
        return f"expected {self._wanted()}"

    def _count(self, value: Any) -> str | None:
        if "float" in self.parts:
            return self._number(value)
        if self.least is None or value >= self.least:
            return None
        return f"expected a whole number from {self.least} on"

    def _number(self, value: Any) -> str | None:
        if "float" not in self.parts:
            return f"expected {self._wanted()}"
        if isinstance(value, torch.SymFloat | torch.SymInt):
            return None
        if not math.isfinite(value):
            return "expected a finite number"
        low, high, closed = RANGES.get(self.name, (-math.inf, math.inf, True))
        if not low <= value <= high or (value == low and not closed):
            return f"expected a number from {low} to {high}"
        return None

    def _elements(self, value: Any) -> str | None:
        """The length of a tuple whose annotation tells it."""
        for part in self.parts:
            if part.startswith(("tuple[float", "tuple[int")) and "..." not in part:
                length = part.count(",") + 1
                numbers_ = isinstance(value, list | tuple) and len(value) == length
                if not numbers_ or not all(isinstance(x, numbers.Real) for x in value):
                    return f"expected {length} numbers"
        return None

    def _wanted(self) -> str:
        return " or ".join(WORDS.get(_head(part)) or f"a {_head(part)}" for part in self.parts)


def arguments_of(function: Callable) -> dict[str, Argument]:
    """The parameters of a function that are checked, by name."""
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind = parameter.annotation
        text = kind if isinstance(kind, str) else inspect.formatannotation(kind)
        argument = Argument(name, text, parameter.default)
        if argument.understood and parameter.annotation is not parameter.empty:
            found[name] = argument
    return found


@cache
def fields_of(cls: type) -> tuple[Argument, ...]:
    """The fields of a dataclass that are checked: those that a class of this package brings."""
    own = {name for c in cls.__mro__ if c.__module__.startswith("fla.") for name in vars(c)}
    found = []
    for field in [f for f in fields(cls) if f.name in own]:
        text = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
        found.append(Argument(field.name, text, field.default))
    return tuple(argument for argument in found if argument.understood)


def check_fields(values: Any) -> None:
    """Raise for the first field of a dataclass that its annotation does not allow."""
    cls: Any = type(values)
    for argument in fields_of(cls):
        refuse_wrong(type(values).__name__, argument, getattr(values, argument.name))


def refuse_wrong(owner: str, argument: Argument, value: Any) -> None:
    """Raise `TypeError` for a value of a wrong type, `ValueError` for one out of its range."""
    problem = argument.problem(value)
    if problem is None:
        return
    plain = isinstance(value, str | numbers.Number) or value is None
    shown = repr(value) if plain else f"a {type(value).__name__}"
    right_type = isinstance(value, numbers.Real) and {"int", "float"} & set(argument.parts)
    kind = ValueError if right_type and not isinstance(value, bool) else TypeError
    raise kind(f"{owner}: {argument.name} is {shown}; {problem}")


def check_width(
    owner: str,
    name: str,
    x: Any,
    width: int | None,
    dims: int = 0,
    beside: Tensor | None = None,
    of: str = "weight",
) -> None:
    """Raise unless x is a floating-point tensor `[..., width]`, of `dims` dimensions and on the
    device of `beside`, an argument called `of`, if told.
    """
    if torch.compiler.is_compiling():
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: {name} is a {type(x).__name__}; expected a torch.Tensor")
    if not x.is_floating_point():
        raise ValueError(f"{owner}: {name} has dtype {x.dtype}; expected a floating-point tensor")
    wrong = x.dim() == 0 or (width is not None and x.shape[-1] != width)
    if wrong or (dims and x.dim() != dims):
        axes = {2: "M", 3: "B, T"}.get(dims, "...")
        raise ValueError(
            f"{owner}: {name} has shape {list(x.shape)}; expected [{axes}, {width or 'D'}]"
        )
    if beside is not None and x.device != beside.device:
        raise ValueError(
            f"{owner}: {name} is on {x.device} and {of} on {beside.device}; move one of them"
        )


def check_targets(
    owner: str, logits: tuple[str, Tensor], target: Tensor, size: int, ignored: int
) -> None:
    """Raise unless targets are integers below `size`, or `ignored`, one for each row of logits. On
    a device, which would have to be waited for, values are not looked at.
    """
    name, x = logits
    check_width(owner, name, x, None)
    if target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise TypeError(f"{owner}: target has dtype {target.dtype}; expected int64")
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"{owner}: target has shape {list(target.shape)}; expected {list(x.shape[:-1])}, one "
            f"for each row of {name}"
        )
    if target.device != x.device:
        raise ValueError(f"{owner}: target is on {target.device} and {name} on {x.device}; move it")
    if not target.is_cpu or torch.compiler.is_compiling() or transformed():
        return
    wrong = ((target < 0) | (target >= size)) & (target != ignored)
    if bool(wrong.any()):
        raise ValueError(
            f"{owner}: target holds {int(target[wrong][0])}; expected 0 to {size - 1}, or "
            f"{ignored} for none"
        )


def refuse_symbolic(op: str, length: Any) -> None:
    """Raise `NotImplementedError` where a graph is exported for any length and an operator's steps
    depend on it.
    """
    if isinstance(length, torch.SymInt) and torch.compiler.is_exporting():
        raise NotImplementedError(
            f"{op}: its steps depend on the number of tokens, so torch.export needs a fixed one; "
            "drop the dimension's entry in dynamic_shapes"
        )


def checked(function: F) -> F:
    """Decorator of a function or a constructor whose annotations are held at every call. It costs
    about 0.1 us an argument, and nothing in compiled code.

    Example:
        >>> @checked
        ... def double(x: Tensor, times: int = 2) -> Tensor:
        ...     return x * times
        >>> double(torch.ones(1), times=0)
        Traceback (most recent call last):
        ValueError: double: times is 0; expected a whole number from 1 on
    """
    known = arguments_of(function)
    places = [known.get(name) for name in inspect.signature(function).parameters]
    name = function.__qualname__
    owner = name.split(".")[-2] if name.endswith(("__init__", "forward")) and "." in name else name

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            for i, (argument, value) in enumerate(zip(places, args, strict=False)):
                if argument is not None and type(value) not in argument.types:
                    if value is None and argument.off:
                        args = (*args[:i], False, *args[i + 1 :])
                    else:
                        refuse_wrong(owner, argument, value)
            for key, value in kwargs.items():
                argument = known.get(key)
                if argument is not None and type(value) not in argument.types:
                    if value is None and argument.off:
                        kwargs[key] = False  # of a key that is there: the iteration goes on
                    else:
                        refuse_wrong(owner, argument, value)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def shaped(**specs: str) -> Callable[[F], F]:
    """`checked`, and each named tensor is a floating-point one of those axes on one device. Axes of
    one name have one size; `...` are leading axes, which broadcast, `<...` to those of the first.

    Example:
        >>> @shaped(x="... D", weight="D")
        ... def scale(x: Tensor, weight: Tensor) -> Tensor:
        ...     return x * weight
        >>> scale(torch.ones(2, 3), torch.ones(4))
        Traceback (most recent call last):
        ValueError: scale: weight has shape [4]; expected [D=3], as x has
    """
    axes = {
        n: ("..." in s, s.replace("...", "").strip("< ").split(), s.startswith("<"))
        for n, s in specs.items()
    }

    def decorate(function: F) -> F:
        order = list(inspect.signature(function).parameters)
        places = [(order.index(name), name) for name in axes]
        right: set[tuple] = set()  # what was found right: most calls look like one before

        @checked
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                given = [args[i] if i < len(args) else kwargs.get(name) for i, name in places]
                kind = tuple([x if x is None else (x.shape, x.dtype, x.device) for x in given])
                if kind not in right:
                    _check_axes(function.__name__, axes, dict(zip(axes, given, strict=True)))
                    if len(right) < REMEMBERED:
                        right.add(kind)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


REMEMBERED = 4096


def _check_axes(
    owner: str, specs: dict[str, tuple[bool, list[str], bool]], given: dict[str, Any]
) -> None:
    sizes: dict[str, int] = {}
    first: Tensor | None = None
    lead: torch.Size | None = None
    source = ""
    for name, (dots, axes, _) in specs.items():
        x = given.get(name)
        if x is None:
            continue
        check_width(owner, name, x, None, beside=first, of=source)
        if first is None:
            first, source = x, name
        own = x.shape[x.dim() - len(axes) :]
        fits = x.dim() >= len(axes) if dots else x.dim() == len(axes)
        fits = fits and all(_same(sizes, a, n, dots) for a, n in zip(axes, own, strict=True))
        if fits and dots:
            before = x.shape[: x.dim() - len(axes)]
            to = lead if specs[name][2] else None
            fits = lead is None or lead == before or _broadcast(lead, before, to)
            lead = before if lead is None else lead
        if not fits:
            wanted = [f"{a}={sizes[a]}" if a in sizes else a for a in axes]
            wanted = [*map(str, lead or ["..."]), *wanted] if dots else wanted
            raise ValueError(
                f"{owner}: {name} has shape {list(x.shape)}; expected [{', '.join(wanted)}], as "
                f"{source} has"
            )


def _same(sizes: dict[str, int], axis: str, size: int, broadcasts: bool) -> bool:
    """Whether a size is that of its axis so far, or may be broadcast to it."""
    known = sizes.get(axis)
    if known is None or (known == 1 and broadcasts):
        sizes[axis] = size
        return True
    return size == known or (size == 1 and broadcasts)


def _broadcast(one: torch.Size, other: torch.Size, to: torch.Size | None) -> bool:
    """Whether two shapes broadcast, to a shape if told."""
    try:
        return torch.broadcast_shapes(one, other) == to or to is None
    except RuntimeError:
        return False
