# SPDX-License-Identifier: MIT
"""What transformers' own models take from this package, and a short convolution they can take too.

From 5.17 on, the modelling files of Qwen3-Next, Qwen3.5, OLMo-Hybrid, Kimi-Linear and others look
up `chunk_gated_delta_rule`, `chunk_kda` and their token forms in the package `fla` when they are
imported, on any device; installing this package is all it takes. Their short convolution comes from
another package; without it they cannot keep packed sequences apart in the convolution.
`packed_convolution()` closes that gap.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fla.modules.convolution import causal_conv1d

# modelling module -> the functions it takes from a package named fla
CONSUMERS = {
    "qwen3_next": ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
    "qwen3_5": ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
    "qwen3_5_moe": ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
    "olmo_hybrid": ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
    "kimi_linear": ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"),
}


@dataclass(frozen=True)
class Use:
    """What one function of one transformers model runs."""

    model: str
    function: str
    runs: str
    why: str


def _module(model: str) -> ModuleType | None:
    name = f"transformers.models.{model}.modeling_{model}"
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    return None if found is None else importlib.import_module(name)


def report() -> list[Use]:
    """List, for each transformers model that can use `fla`, what its functions run, and why.

    Example:
        >>> {use.runs for use in report() if use.model == "qwen3_next"}
        {'fla'}
    """
    uses = []
    for model, functions in CONSUMERS.items():
        module = _module(model)
        if module is None:
            uses.append(Use(model, "-", "-", "this transformers version has no such model"))
            continue
        for name in functions:
            function = getattr(module, name, None)
            if function is None:
                uses.append(Use(model, name, "-", "this transformers version has no such function"))
                continue
            values = inspect.getclosurevars(inspect.unwrap(function, stop=_is_wrapper)).nonlocals
            implementation = values.get("implementation")
            home = getattr(implementation, "__module__", "")
            if implementation is not None and home.startswith("fla."):
                uses.append(Use(model, name, "fla", f"{home}.{implementation.__name__}"))
            else:
                wanted = values.get("func_name", name)
                uses.append(Use(model, name, "transformers", f"fla has no {wanted} yet"))
    return uses


def _is_wrapper(function: Any) -> bool:
    return "implementation" in inspect.getclosurevars(function).nonlocals


def packed_causal_conv1d(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **_unrelated: Any,
) -> Tensor:
    """transformers' `causal_conv1d_fn` on `[B, D, T]` with boundaries: `cu_seq_lens_q` or
    `cu_seqlens`, or `seq_idx` `[1, T]` that changes where a sequence starts. Other keyword
    arguments belong to other layers: transformers hands all of them to each.
    """
    cu_seq_lens_q = cu_seqlens if cu_seq_lens_q is None else cu_seq_lens_q
    if cu_seq_lens_q is None and seq_idx is not None:
        starts = seq_idx.flatten().diff().ne(0).nonzero().flatten() + 1
        ends = starts.new_tensor([hidden_states.shape[-1]])
        cu_seq_lens_q = torch.cat([ends.new_zeros(1), starts, ends])
    y, _ = causal_conv1d(
        hidden_states.transpose(1, 2).to(weight.dtype),
        weight,
        bias,
        activation=activation,
        cu_seqlens=cu_seq_lens_q,
    )
    return y.transpose(1, 2).to(hidden_states.dtype)


@contextmanager
def packed_convolution() -> Iterator[list[str]]:
    """Inside the block, transformers' Qwen3-Next, Qwen3.5, OLMo-Hybrid and Kimi-Linear convolve
    with `packed_causal_conv1d`, so that packed sequences stay apart in convolution and recurrence
    alike. The boundaries go to the model's call as `cu_seq_lens_q=`; to Kimi-Linear's, which hands
    on keyword arguments as they are, as `cu_seqlens=`. Yields the models changed.
    """
    changed: dict[str, Any] = {}
    for model in CONSUMERS:
        module = _module(model)
        if module is not None and hasattr(module, "causal_conv1d_fn"):
            changed[module.__name__] = module.causal_conv1d_fn
            module.causal_conv1d_fn = packed_causal_conv1d  # type: ignore[attr-defined]
    try:
        yield [name.rpartition("modeling_")[2] for name in changed]
    finally:
        for name, original in changed.items():
            sys.modules[name].causal_conv1d_fn = original  # type: ignore[attr-defined]
