# SPDX-License-Identifier: MIT
"""What transformers' own models keep for themselves, swapped for ours: the short convolution, which
they look for in another package, and the gated RMSNorm. Their recurrences come from here without it
(`provider.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch.nn as nn
from torch import Tensor

from fla.models.provided.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from fla.models.provider import implementation, stand_in
from fla.modules.fused_norm_gate import rms_norm_gated


def _gated_norm(self: Any, hidden_states: Tensor, gate: Tensor) -> Any:
    return rms_norm_gated(
        hidden_states, gate, self.weight, None, self.activation, eps=self.variance_epsilon
    )


class Acceleration:
    """What `accelerate` replaced, and the way back.

    Fields:
        replaced: a line for each thing that ours now stands in for.
    """

    def __init__(self, model: nn.Module):
        self.replaced: list[str] = []
        self._functions: list[tuple[Any, str, Any]] = []
        self._norms: list[nn.Module] = []
        ours: dict[str, Callable[..., Any]] = dict(
            causal_conv1d_fn=causal_conv1d_fn, causal_conv1d_update=causal_conv1d_update
        )
        homes = dict.fromkeys(type(module).__module__ for module in model.modules())
        for home in homes:
            if not home.startswith("transformers.models."):
                continue
            for name, function in ours.items():
                module = sys.modules[home]
                old = getattr(module, name, None)
                if old is not None and implementation(old) is not function:
                    self._functions.append((module, name, old))
                    setattr(module, name, stand_in(old, function))
                    self.replaced.append(f"{home}.{name}, in every model of that file")
        for path, module in model.named_modules():
            kind = type(module)
            theirs = kind.__module__ in homes and kind.__name__.endswith("RMSNormGated")
            if theirs and hasattr(module, "variance_epsilon") and hasattr(module, "activation"):
                module.forward = MethodType(_gated_norm, module)
                self._norms.append(module)
                self.replaced.append(f"{path} ({kind.__name__})")

    def undo(self) -> None:
        """Everything as it was."""
        for module, name, old in self._functions:
            setattr(module, name, old)
        for norm in self._norms:
            del norm.forward
        self._functions, self._norms, self.replaced = [], [], []

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        if not self.replaced:
            return "nothing replaced"
        return "\n".join(["replaced by fla:", *(f"  {line}" for line in self.replaced)])


def accelerate(model: nn.Module) -> Acceleration:
    """Run the short convolutions and gated norms of a model of transformers with ours, to the same
    numbers; on a CPU the convolution is a native kernel. Print the result to see what was replaced;
    `undo()` or the end of a `with` block takes it back. `ValueError` for a model without either.

    Example:
        >>> from transformers import Mamba2Config
        >>> from transformers.models.mamba2.modeling_mamba2 import Mamba2Model
        >>> config = Mamba2Config(
        ...     hidden_size=16, num_heads=2, head_dim=16, n_groups=1, state_size=4, vocab_size=9,
        ...     num_hidden_layers=1)
        >>> with accelerate(Mamba2Model(config)) as swapped:
        ...     len(swapped.replaced)
        2
    """
    swapped = Acceleration(model)
    if not swapped.replaced:
        raise ValueError(
            f"accelerate: {type(model).__name__} holds no short convolution and no gated norm of "
            "transformers; models such as Qwen3-Next, Qwen3.5, OLMo-Hybrid and Kimi-Linear do"
        )
    return swapped
