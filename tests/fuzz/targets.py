# SPDX-License-Identifier: MIT
"""Calls that work, whose arguments are replaced one by one."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fla.modules as M
from fla.ops.case import OpCase
from fla.ops.registry import OPS
from tests.layers.test_layers import LAYERS
from tests.models.common import MODELS, TINY, ids
from tests.models.common import make as make_model

SKIPPED = {"self", "cp_context", "kwargs", "device", "dtype", "backend"}


@dataclass
class Target:
    """A call `function(**arguments)` that works.

    Fields:
        optional: tensor arguments that may be None.
        free: axes of tensor arguments whose size no other argument fixes.
        further: (argument, label, bad value) beside what the argument's kind suggests.
        aliases: other words that name an argument in a message.
    """

    name: str
    function: Callable
    arguments: dict[str, Any]
    optional: set[str] = field(default_factory=set)
    free: dict[str, set[int]] = field(default_factory=dict)
    further: list[tuple[str, str, Any]] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)

    def call(self, **changes: Any) -> Any:
        return self.function(**{**self.arguments, **changes})

    def names(self, argument: str, message: str) -> bool:
        """Whether a message names an argument."""
        words = {argument, *self.aliases.get(argument, "").split()} - {""}
        return any(re.search(rf"\b{re.escape(word)}\b", message) for word in words)


def defaults(function: Callable) -> dict[str, Any]:
    """Arguments that are no tensors, with their defaults."""
    return {
        n: p.default
        for n, p in inspect.signature(function).parameters.items()
        if p.default is not p.empty and n not in SKIPPED and p.kind is not p.VAR_KEYWORD
    }


BOUNDS = [
    ("floats", torch.tensor([0.0, 4.0, 9.0])),
    ("two rows", torch.tensor([[0, 4, 9]])),
    ("short", torch.tensor([0, 4, 8])),
    ("long", torch.tensor([0, 4, 10])),
    ("from 1", torch.tensor([1, 4, 9])),
    ("decreasing", torch.tensor([0, 5, 4, 9])),
    ("negative", torch.tensor([0, -4, 9])),
    ("one", torch.tensor([0])),
    ("empty", torch.tensor([], dtype=torch.long)),
    ("list", [0, 4, 9]),
    ("meta", torch.tensor([0, 4, 9], device="meta")),
    ("bool", torch.tensor([False, True])),
]


def ops() -> Iterator[Target]:
    for case in OPS:
        for form in ("chunk", "token"):
            yield from _operator(case, getattr(case, form))


def _operator(case: OpCase, function: Callable) -> Iterator[Target]:
    renames = inspect.getclosurevars(function).nonlocals.get("names", {})
    function = getattr(function, "__wrapped__", function) if renames else function
    inputs = case.inputs(1, 9, 2, 8, 6, HV=4 if case.grouped else None)
    states = case.state_arguments(
        case.states(1, 2, 8, 6, HV=4 if case.grouped else None, dtype=torch.float32)
    )
    axes = {n: case.axes(n) for n in inputs}
    seen = Counter(a for names in axes.values() for a in set(names))
    fixed = " ".join(s if isinstance(s, str) else " ".join(s) for s in case.state.values()).split()
    free = {
        n: {i for i, a in enumerate(names) if seen[a] == 1 and a not in fixed}
        for n, names in axes.items()
    }
    given = {renames.get(n, n): x for n, x in inputs.items()}
    free = {renames.get(n, n): x for n, x in free.items()}
    own = inspect.signature(function).parameters
    plain = {n: x for n, x in defaults(function).items() if n not in given}
    optional = {n for n in (*given, *states) if own[n].default is None}
    arguments = plain | given | case.fixed | case.chunk_fixed | states
    further = [("cu_seqlens", *bad) for bad in BOUNDS if "cu_seqlens" in own]
    yield Target(function.__name__, function, arguments, optional, free, further)


def _constructor(name: str, cls: Callable, arguments: dict[str, Any]) -> Target:
    return Target(name, cls, defaults(cls) | arguments)


def _forward(name: str, module: Any, tensors: dict[str, Tensor], **more: Any) -> Target:
    own = inspect.signature(module.forward).parameters
    plain = {n: x for n, x in defaults(module.forward).items() if n not in tensors}
    optional = {n for n in tensors if own[n].default is None}
    return Target(f"{name}.forward", module, plain | tensors, optional, **more)


def modules() -> Iterator[Target]:
    x, g = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    for cls, arguments in (
        (M.RMSNorm, dict(hidden_size=16)), (M.LayerNorm, dict(hidden_size=16)),
        (M.GroupNorm, dict(num_groups=2, hidden_size=16)), (M.FusedRMSNormGated, dict(hidden_size=16)),
        (M.FusedLayerNormGated, dict(hidden_size=16)), (M.ShortConvolution, dict(hidden_size=16, kernel_size=4)),
        (M.GatedMLP, dict(hidden_size=16, intermediate_size=32)), (M.RotaryEmbedding, dict(dim=16)),
        (M.TokenShift, dict(hidden_size=16)), (M.LongConvolution, dict(hidden_size=16, max_len=8)),
        (M.FusedCrossEntropyLoss, {}), (M.FusedLinearCrossEntropyLoss, {}), (M.FusedKLDivLoss, {}),
        (M.HedgehogFeatureMap, dict(head_dim=16)), (M.L2Norm, {}), (M.SubNormMLP, dict(hidden_size=16, intermediate_size=32)),
    ):  # fmt: skip
        try:
            cls(**arguments)
        except TypeError:
            arguments = {}
        yield _constructor(cls.__name__, cls, arguments)
    last = {"x": {0, 1}}
    for module in (
        M.RMSNorm(16),
        M.LayerNorm(16),
        M.L2Norm(),
        M.GatedMLP(16, intermediate_size=32),
    ):
        yield _forward(type(module).__name__, module, dict(x=x), free=last)
    gated = M.FusedRMSNormGated(16)
    yield _forward("FusedRMSNormGated", gated, dict(x=x, g=g))
    conv = M.ShortConvolution(16, 4)
    bounds = [("cu_seqlens", *bad) for bad in BOUNDS]
    yield _forward(
        "ShortConvolution", conv, dict(x=x[:1].repeat(1, 2, 1)[:, :9]), free=last, further=bounds
    )
    z, y = torch.randn(6, 10), torch.randint(0, 10, (6,))
    outside = [("target", "too large", y + 10), ("target", "negative", y - 20)]
    cross = M.FusedCrossEntropyLoss()
    yield _forward(
        "FusedCrossEntropyLoss",
        cross,
        dict(input=z, target=y),
        free={"input": {1}},
        further=outside,
    )
    linear = M.FusedLinearCrossEntropyLoss()
    w = torch.randn(10, 8)
    yield _forward("FusedLinearCrossEntropyLoss", linear, dict(x=torch.randn(6, 8), target=y, weight=w),
                   free={"weight": {0}}, further=outside)  # fmt: skip


def layers() -> Iterator[Target]:
    x = torch.randn(2, 9, 32)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    for name, make in LAYERS.items():
        cls = make.func if isinstance(make, partial) else None
        if cls is not None:
            yield _constructor(cls.__name__, cls, dict(make.keywords))
        torch.manual_seed(0)
        layer = make(layer_idx=0).eval()
        further = [("attention_mask", *bad) for bad in bad_masks(mask)]
        further += [("cu_seqlens", *bad) for bad in BOUNDS]
        yield _forward(name, layer, dict(hidden_states=x, attention_mask=mask), free={"hidden_states": set()},
                       further=further)  # fmt: skip


def bad_masks(mask: Tensor) -> list[tuple[str, Tensor]]:
    return [
        ("half", mask * 0.5), ("two", mask * 2), ("minus", -mask), ("nan", mask * float("nan")),
        ("complex", mask.to(torch.complex64)), ("three axes", mask[None]),
    ]  # fmt: skip


def models() -> Iterator[Target]:
    x = ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    for name, (_, config, arguments) in MODELS.items():
        yield _constructor(config.__name__, config, TINY | arguments)
        model = make_model(name)
        further = [("attention_mask", *bad) for bad in bad_masks(mask)]
        further += [
            ("labels", "too large", x + 64), ("labels", "negative", x - 90), ("input_ids", "too large", x + 64),
            ("input_ids", "negative", x - 64), ("logits_to_keep", "negative", -3),
            ("position_ids", "shape", torch.arange(4)[None]), ("past_key_values", "a tuple", ((x, x),)),
        ]  # fmt: skip
        tensors = dict(input_ids=x, attention_mask=mask, labels=x)
        yield _forward(name, model, tensors, further=further)


def targets(group: str) -> Iterator[Target]:
    """The working calls of a group."""
    yield from {"ops": ops, "modules": modules, "layers": layers, "models": models}[group]()
