# SPDX-License-Identifier: MIT
"""What every token mixer shares: the forward protocol, padding and boundaries, and its place in the
cache.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn as nn
from torch import Tensor

from fla.ops.engine.layout import SequenceLayout


@dataclass
class State:
    """What a recurrent mixer carries from one call to the next: inputs of its convolutions and the
    recurrence.
    """

    recurrent: Tensor
    conv: tuple[Tensor, ...] = ()


class StateCache(Protocol):
    """The cache as mixers see it; `fla.models.utils.Cache` is one."""

    def get_seq_length(self, layer_idx: int = 0) -> int: ...
    def read_state(self, layer_idx: int) -> State | None: ...
    def write_state(self, layer_idx: int, state: State) -> None: ...
    def update_keys(
        self, keys: Tensor, values: Tensor, layer_idx: int, real: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


class Mixer(nn.Module):
    """A token mixer `[B, T, D] -> [B, T, D]`. Subclasses define `mix` on tokens that are all real.

    A decoder resolves the layout once, packs the real tokens and hands `layout` down. A mixer used
    alone builds it from `attention_mask` or `cu_seqlens`, packs, and unpacks its result.
    """

    layer_idx: int | None

    @classmethod
    def from_config(cls, config: Any, layer_idx: int) -> Mixer:
        """Build from a model config: constructor arguments take the config fields of the same name,
        `mode` takes `attn_mode`.
        """
        names = inspect.signature(cls).parameters
        values = {name: getattr(config, name) for name in names if hasattr(config, name)}
        if "mode" in names and hasattr(config, "attn_mode"):
            values["mode"] = config.attn_mode
        return cls(**{**values, "layer_idx": layer_idx})

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        cu_seqlens: Tensor | None = None,
        layout: SequenceLayout | None = None,
    ) -> tuple[Tensor, None, StateCache | None]:
        """Returns (o, None, past_key_values). attention_mask `[B, T]` (or `[B, past + T]` under a
        cache), 1 for real tokens on any side; cu_seqlens bounds packed sequences.
        """
        name = type(self).__name__
        if output_attentions:
            raise ValueError(
                f"{name}: output_attentions is not supported: no attention matrix is formed"
            )
        if use_cache and past_key_values is None:
            raise ValueError(
                f"{name}: use_cache needs past_key_values; pass a fla.models.utils.Cache"
            )
        if past_key_values is not None and self.layer_idx is None:
            raise ValueError(f"{name}: a cache needs layer_idx; pass layer_idx to the constructor")
        if layout is not None:
            if attention_mask is not None or cu_seqlens is not None:
                raise ValueError(
                    f"{name}: layout already holds padding and boundaries; drop attention_mask "
                    "and cu_seqlens"
                )
            return self.mix(hidden_states, layout, past_key_values), None, past_key_values
        past = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
        layout = SequenceLayout.resolve(
            *hidden_states.shape[:2],
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            past_length=past,
        )
        o = self.mix(layout.pack(hidden_states), layout, past_key_values)
        return layout.unpack(o), None, past_key_values

    def mix(self, x: Tensor, layout: SequenceLayout, cache: StateCache | None) -> Tensor:
        """x `[B, T, D]`, or `[1, total, D]` where `layout.packed`."""
        raise NotImplementedError

    def initial_values(self) -> dict[str, Tensor]:
        """Fresh values of the parameters that do not start like weights and norms."""
        return {}


class RecurrentMixer(Mixer):
    """A mixer with a `State`. Subclasses define `recur`."""

    def mix(self, x: Tensor, layout: SequenceLayout, cache: StateCache | None) -> Tensor:
        state = None if cache is None else cache.read_state(self.layer_idx)
        o, state = self.recur(x, layout.cu_seqlens, state, keep=cache is not None)
        if cache is not None:
            cache.write_state(self.layer_idx, state)
        return o

    def recur(
        self, x: Tensor, cu_seqlens: Tensor | None, state: State | None, keep: bool
    ) -> tuple[Tensor, State | None]:
        """Mix x from `state`; the new state where `keep`."""
        raise NotImplementedError

    def convolve(
        self, inputs: list[Tensor], cu_seqlens: Tensor | None, state: State | None, keep: bool
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """q, k and v through their short convolutions: (outputs, new states)."""
        convs: list[Any] = [self.q_conv1d, self.k_conv1d, self.v_conv1d]
        caches = [None] * 3 if state is None else state.conv
        results = [
            conv(x, cache=cache, output_final_state=keep, cu_seqlens=cu_seqlens)
            for conv, x, cache in zip(convs, inputs, caches, strict=True)
        ]
        return [y for y, _ in results], tuple(s for _, s in results)


MODES = ("chunk", "fused_recurrent")


def check_mode(name: str, mode: str) -> str:
    """`mode` if it is one, else `ValueError`."""
    if mode not in MODES:
        raise ValueError(f"{name}: mode is {mode!r}; expected one of {', '.join(MODES)}")
    return mode


def whole(name: str, what: str, value: float) -> int:
    """`value` as an int, or `ValueError` where it is not whole."""
    if value != int(value):
        raise ValueError(f"{name}: {what} is {value}; it must be a whole number")
    return int(value)
