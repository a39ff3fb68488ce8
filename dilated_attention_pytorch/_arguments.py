# SPDX-License-Identifier: MIT
"""What all modules here do with their arguments, masks and ranks."""

import difflib
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fla.core.parallel import current
from fla.distributed import sequence_parallel


def no_effect(owner: str, why: str, **arguments: tuple[Any, Any]) -> None:
    """Warn of arguments, `name=(value, default)`, that were set and can change nothing."""
    given = [
        f"{name}={value!r}" for name, (value, default) in arguments.items() if value != default
    ]
    if given:
        warnings.warn(f"{owner}: {', '.join(given)} changes nothing: {why}", stacklevel=3)


def no_pool(owner: str, **arguments: tuple[Any, Any]) -> None:
    """`no_effect` for pools, caches and counters of them."""
    no_effect(owner, "torch's own allocator reuses memory; leave it out", **arguments)


def refuse(owner: str, fix: str, **arguments: Any) -> None:
    """`ValueError` for an argument that is set and cannot be honoured."""
    for name, value in arguments.items():
        if value not in (None, False):
            raise ValueError(f"{owner}: {name}={value!r} cannot be honoured; {fix}")


def choose(owner: str, argument: str, name: str, among: Iterable[str]) -> str:
    """The name, or `ValueError` with similar names."""
    names = sorted(among)
    if name not in names:
        near = difflib.get_close_matches(name, names)
        hint = f"did you mean {near[0]!r}? All: " if near else "expected one of "
        raise ValueError(f"{owner}: {argument} is {name!r}; {hint}{', '.join(names)}")
    return name


def check_dropout(owner: str, dropout: float) -> float:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{owner}: dropout is {dropout}; expected a share from 0 to below 1")
    return dropout


def check_input(owner: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise `ValueError` unless all have four dimensions, and q the tokens of k."""
    for name, x in (("query", q), ("key", k), ("value", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{owner}: {name} is {list(x.shape)}; expected [batch, tokens, heads, channels]"
            )
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"{owner}: query has {q.shape[1]} tokens and key {k.shape[1]}; a sparse pattern pairs "
            "positions, so pass as many of each, or use dense attention"
        )


def rows_apart(
    owner: str, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """`attend` on the real tokens of each row alone, 0 elsewhere; `mask` `[B, T]`, True where a
    token is real.
    """
    if mask is None:
        return attend(q, k, v)
    if mask.shape != q.shape[:2] or mask.dtype.is_floating_point:
        raise ValueError(
            f"{owner}: the mask is {mask.dtype} {list(mask.shape)}; expected bool "
            f"{list(q.shape[:2])}, one value per token. Masks of pairs of tokens cannot be "
            "honoured: the pattern is the mask, with is_causal"
        )
    o = q.new_zeros(*q.shape[:3], v.shape[3])
    for b, own in enumerate(mask.bool()):
        o[b, own] = attend(q[b : b + 1, own], k[b : b + 1, own], v[b : b + 1, own])[0]
    return o


@contextmanager
def over_ranks(owner: str, ring_size: int | None, dropout: float) -> Iterator[bool]:
    """Inside, the tokens of every rank are one sequence; False where one process works alone."""
    if ring_size == 1:
        yield False
        return
    size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ring_size is not None and ring_size != size:
        raise ValueError(
            f"{owner}: ring_size={ring_size}, but {size} process(es) run; launch as many with "
            "torchrun, or leave it out. A ring is not simulated on fewer"
        )
    if size > 1 and dropout:
        raise ValueError(
            f"{owner}: dropout={dropout} under sequence parallelism would draw another mask than "
            "one process does; use 0"
        )
    if size == 1 or current() is not None:
        yield size > 1
    else:
        with sequence_parallel():
            yield True


def check_placement(
    owner: str, x: Tensor, device: torch.device | str | None, dtype: torch.dtype | None
) -> None:
    """A module without parameters computes where and in what its input is."""
    if device is not None and x.device.type != torch.device(device).type:
        raise ValueError(f"{owner}: built for {device}, and query lies on {x.device}; move it")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{owner}: built for {dtype}, and query is {x.dtype}; convert it")
