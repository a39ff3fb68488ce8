# SPDX-License-Identifier: MIT
"""Calls that work, whose arguments are replaced one by one."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

import fla.modules as M
from fla.modules.activations import sigmoidglu, swiglu, swiglu_linear
from fla.modules.convolution import causal_conv1d
from fla.modules.fused_cross_entropy import cross_entropy_loss
from fla.modules.fused_norm_gate import rms_norm_gated
from fla.modules.l2norm import l2norm
from fla.modules.layernorm import layer_norm, rms_norm
from fla.modules.token_shift import token_shift
from fla.ops.block_sparse_attention import block_sparse_attention, local_window
from fla.ops.case import OpCase
from fla.ops.dilated_attention import dilated_attention
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
        right: labels of replacements that are no mistake here.
    """

    name: str
    function: Callable
    arguments: dict[str, Any]
    optional: set[str] = field(default_factory=set)
    free: dict[str, set[int]] = field(default_factory=dict)
    further: list[tuple[str, str, Any]] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    right: set[str] = field(default_factory=set)

    def call(self, **changes: Any) -> Any:
        return self.function(**{**self.arguments, **changes})

    def tensors(self) -> list[str]:
        """The arguments that are tensors, or tuples of them."""
        return [n for n, x in self.arguments.items() if isinstance(x, Tensor | tuple)]

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
        for form in ("chunk", "token", "naive"):
            yield from _operator(case, form)


def _operator(case: OpCase, form: str) -> Iterator[Target]:
    function = getattr(case, form)
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
    hints = {n: str(p.annotation) for n, p in own.items()}
    optional = {n for n in (*given, *states) if own[n].default is None or "None" in hints[n]}
    fixed_here = case.fixed | (case.chunk_fixed if form != "naive" else {})
    arguments = plain | given | fixed_here | states
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
        (M.LongConvolution, dict(hidden_size=16, max_len=8)),
        (M.FusedCrossEntropyLoss, {}), (M.FusedLinearCrossEntropyLoss, {}), (M.FusedKLDivLoss, {}),
        (M.HedgehogFeatureMap, dict(head_dim=16)), (M.L2Norm, {}), (M.SubNormMLP, dict(hidden_size=16, intermediate_size=32)),
    ):  # fmt: skip
        try:
            cls(**arguments)
        except TypeError:
            arguments = {}
        yield _constructor(cls.__name__, cls, arguments)
    last = {"x": {0, 1, 3}}  # any rows
    yield _forward("L2Norm", M.L2Norm(), dict(x=x), free={"x": {0, 1, 2, 3}}, right={"meta"})
    for module in (M.RMSNorm(16), M.LayerNorm(16), M.GatedMLP(16, intermediate_size=32)):
        yield _forward(type(module).__name__, module, dict(x=x), free=last)
    gated = M.FusedRMSNormGated(16)
    broadcast = {"rank - 1", "rank + 1", "axis 0 - 1"}  # of g; x alone is then too small
    yield _forward("FusedRMSNormGated", gated, dict(x=x, g=g), right=broadcast)
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


def functions() -> Iterator[Target]:
    """Functions beside the operators of the registry: sparse attention and functional modules."""
    q, k, v = torch.randn(3, 1, 9, 2, 8).unbind()
    rows = dict(q=q, k=k, v=v)
    bounds = [("cu_seqlens", *bad) for bad in BOUNDS]
    lists = dict(segment_lengths=[4, 8], dilation_rates=[1, 2])
    free = {"v": {3}}
    # fewer queries than keys are the last tokens
    fewer = {"q": {1}} | free
    yield _function(dilated_attention, rows | lists, fewer, further=bounds)
    pattern = local_window(9, 2, block_size=4, causal=True)
    yield _function(block_sparse_attention, rows | dict(pattern=pattern), free, further=bounds)
    x, w = torch.randn(2, 5, 16), torch.randn(16)
    yield _function(token_shift, dict(x=x[:1]), {"x": {0, 1, 2}}, further=bounds, right={"meta"})
    conv = dict(x=x[:1].repeat(1, 2, 1)[:, :9], weight=torch.randn(16, 4))
    yield _function(causal_conv1d, conv, {"x": {0, 1}, "weight": {1}}, further=bounds)
    z, y = torch.randn(6, 10), torch.randint(0, 10, (6,))
    yield _function(cross_entropy_loss, dict(logits=z, target=y), {"logits": {1}})
    yield _function(l2norm, dict(x=x), {"x": {0, 1, 2, 3}}, right={"meta"})
    for norm in (rms_norm, layer_norm):
        yield _function(norm, dict(x=x, weight=w, bias=w), {"x": {0, 1, 3}})
    yield _function(rms_norm_gated, dict(x=x, g=x, weight=w, bias=w), {"x": {3}}, right=BROADCAST)
    for gate in (swiglu, sigmoidglu):
        yield _function(gate, dict(x=x, y=x), {"x": {3}, "y": {3}}, right=BROADCAST | {"meta"})
    linear = dict(x=x, y=x, weight=torch.randn(4, 16), bias=torch.randn(4))
    yield _function(swiglu_linear, linear, {"x": {3}, "y": {3}}, right=BROADCAST)


BROADCAST = {"rank - 1", "rank + 1", "axis 0 - 1"}


def _function(
    function: Callable, tensors: dict[str, Any], free: dict[str, set[int]], **more: Any
) -> Target:
    own = inspect.signature(function).parameters
    plain = {n: x for n, x in defaults(function).items() if n not in tensors}
    optional = {n for n in tensors if "None" in str(own[n].annotation)}
    further = [bad for bad in more.pop("further", []) if bad[0] in own]
    return Target(function.__name__, function, plain | tensors, optional, free, further, **more)


def bad_masks(mask: Tensor) -> list[tuple[str, Tensor]]:
    return [
        ("half", mask * 0.5), ("two", mask * 2), ("minus", -mask), ("nan", mask * float("nan")),
        ("complex", mask.to(torch.complex64)), ("three axes", mask[None]),
    ]  # fmt: skip


RENAMED = {
    "attn_mode": "mode", "dt_init_scheme": "dt_init", "time_step_init_scheme": "dt_init",
    "time_step_rank": "dt_rank", "hidden_act": "activation", "use_cache": "causal",
}  # fmt: skip


def _built(model: Callable, config: Callable) -> Callable:
    """A function of a config's fields that makes the config and, without memory, its model."""

    @wraps(config)
    def build(**values: Any) -> Any:
        with torch.device("meta"):
            return model(config(**values))

    return build


def models() -> Iterator[Target]:
    x = ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    for name, (model_class, config, arguments) in MODELS.items():
        own = {n for c in config.__mro__ if c.__module__.startswith("fla.") for n in vars(c)}
        values = {n: x for n, x in defaults(config).items() if n in own} | TINY | arguments
        yield Target(config.__name__, _built(model_class, config), values, aliases=RENAMED)
        model = make_model(name)
        further = [("attention_mask", *bad) for bad in bad_masks(mask)]
        further += [
            ("labels", "too large", x + 64), ("labels", "negative", x - 90), ("input_ids", "too large", x + 64),
            ("input_ids", "negative", x - 64), ("logits_to_keep", "negative", -3),
            ("position_ids", "shape", torch.arange(4)[None]), ("past_key_values", "a tuple", ((x, x),)),
        ]  # fmt: skip
        tensors = dict(input_ids=x, attention_mask=mask, labels=x)
        yield _forward(name, model, tensors, further=further)


GROUPS = {
    "ops": ops,
    "functions": functions,
    "modules": modules,
    "layers": layers,
    "models": models,
}


def targets(group: str) -> Iterator[Target]:
    """The working calls of a group."""
    yield from GROUPS[group]()
