# SPDX-License-Identifier: MIT
"""The cache: transformers' cache layers, with states for recurrent mixers and a count of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from fla.layers.mixer import State


class RecurrentLayer(LinearAttentionLayer):
    """One recurrent mixer's `State`, where transformers reorders, resets and offloads it."""

    is_compileable = False  # the state is replaced, not overwritten in place
    several = False  # whether the recurrence keeps a tuple of tensors

    def read(self) -> State | None:
        if not self.has_previous_state[0]:
            return None
        conv = tuple(
            x
            for i in range(self.number_of_states)
            if self.is_conv_states_initialized[i] and (x := self.conv_states[i]) is not None
        )
        several = tuple(
            x
            for i in range(self.number_of_states)
            if self.is_recurrent_states_initialized[i]
            and (x := self.recurrent_states[i]) is not None
        )
        return State(several if self.several else several[0], conv)

    def write(self, state: State) -> None:
        self.several = isinstance(state.recurrent, tuple)
        recurrent: Any = state.recurrent if self.several else (state.recurrent,)
        self.number_of_states = max(len(recurrent), len(state.conv))
        for i in range(self.number_of_states):
            self.conv_states[i] = state.conv[i] if i < len(state.conv) else None
            self.is_conv_states_initialized[i] = i < len(state.conv)
            self.recurrent_states[i] = recurrent[i] if i < len(recurrent) else None
            self.is_recurrent_states_initialized[i] = i < len(recurrent)
            self.has_previous_state[i] = True
        self.dtype: Any = recurrent[0].dtype
        self.device: Any = recurrent[0].device

    def _map(self, function) -> None:
        for states, ready in (
            (self.conv_states, self.is_conv_states_initialized),
            (self.recurrent_states, self.is_recurrent_states_initialized),
        ):
            for i in range(self.number_of_states):
                if ready.get(i):
                    states[i] = function(states[i])

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x.index_select(0, indices.to(x.device)))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "Cache.crop: a recurrent state cannot forget its last tokens; keep a copy of the "
                "cache from before them, or use a model without linear attention layers"
            )


class Cache(DynamicCache):
    """Keys and values of attention layers, states of recurrent layers, and the number of tokens
    seen.

    `Cache(config=model.config)` builds one layer per entry of `layer_types`; `Cache()` builds them
    when first written.

    Example:
        >>> cache = Cache()
        >>> cache.write_state(0, State(torch.zeros(1, 2, 4, 4)))
        >>> cache.advance(5)
        >>> cache.get_seq_length(), cache.read_state(0).recurrent.shape
        (5, torch.Size([1, 2, 4, 4]))
    """

    layers: list[Any]

    def __init__(self, config: Any | None = None, seen_tokens: int = 0):
        super().__init__(config=config)
        self.layers = [
            RecurrentLayer() if isinstance(x, LinearAttentionLayer) else x for x in self.layers
        ]
        self.seen_tokens = seen_tokens
        self.padded = False
        self.extras: dict[tuple[int, str], Tensor] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included."""
        return self.seen_tokens

    def advance(self, tokens: int, padded: bool = False) -> None:
        """Count the tokens of a forward pass, once per model; `padded` if some were padding."""
        self.seen_tokens += tokens
        self.padded |= padded

    def read_state(self, layer_idx: int) -> State | None:
        """The state of a recurrent layer; None before it was written."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        return layer.read() if isinstance(layer, RecurrentLayer) else None

    def write_state(self, layer_idx: int, state: State) -> None:
        """Replace the state of a recurrent layer."""
        while len(self.layers) <= layer_idx:
            self.layers.append(DynamicLayer())
        layer = self.layers[layer_idx]
        if not isinstance(layer, RecurrentLayer):
            if layer.is_initialized:
                raise ValueError(
                    f"Cache: layer {layer_idx} already holds keys and values, not a state"
                )
            layer = self.layers[layer_idx] = RecurrentLayer()
        layer.write(state)

    def read_extra(self, layer_idx: int, name: str) -> Tensor | None:
        """What a layer keeps beside its mixer's state; None before it was written."""
        return self.extras.get((layer_idx, name))

    def write_extra(self, layer_idx: int, name: str, value: Tensor) -> None:
        """Replace what a layer keeps beside its mixer's state, `[N, ...]`."""
        self.extras[layer_idx, name] = value

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.extras = {k: x.index_select(0, beam_idx.to(x.device)) for k, x in self.extras.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.extras = {k: x.repeat_interleave(repeats, 0) for k, x in self.extras.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.extras = {k: x[indices.to(x.device)] for k, x in self.extras.items()}

    def update_keys(
        self,
        keys: Tensor,
        values: Tensor,
        layer_idx: int,
        real: Tensor | None = None,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values `[B, H, T, D]` of an attention layer, of which `real` `[B, T]` are
        not padding; returns all that a query may look at. Padding is moved to the front of its row,
        so that the real keys of a row are its last ones and a window holds real keys only. A layer
        the config does not list (a second attention in a block) is made with its `window`.
        """
        while len(self.layers) <= layer_idx:
            self.layers.append(DynamicSlidingWindowLayer(window) if window else DynamicLayer())
        keys, values = self.update(keys, values, layer_idx)
        if real is None:
            return keys, values
        layer = self.layers[layer_idx]
        S = keys.shape[2]
        keep = torch.nn.functional.pad(real, (S - real.shape[1], 0), value=True)
        order = keep.byte().argsort(dim=1, stable=True)[:, None, :, None]
        keys, values = (x.gather(2, order.expand_as(x)) for x in (keys, values))
        window = getattr(layer, "sliding_window", None)
        kept = S if window is None else min(S, window - 1)
        layer.keys, layer.values = keys[:, :, S - kept :], values[:, :, S - kept :]
        return keys, values

    def reset(self) -> None:
        super().reset()
        self.seen_tokens, self.padded, self.extras = 0, False, {}

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens (a number <= 0, as in transformers); not with
        recurrent layers.
        """
        if tokens_to_remove and self.extras:
            raise ValueError(
                "Cache.crop: a token shift cannot forget its last tokens; keep a copy of the cache"
            )
        # recurrent layers first: they refuse before anything is cut
        for layer in sorted(self.layers, key=lambda x: not isinstance(x, RecurrentLayer)):
            layer.crop(tokens_to_remove)
        self.seen_tokens += tokens_to_remove

    def size_in_bytes(self) -> int:
        """Memory held by all states, keys and values."""
        total = sum(x.numel() * x.element_size() for x in self.extras.values())
        for layer in self.layers:
            if isinstance(layer, RecurrentLayer):
                tensors = [*layer.conv_states.values(), *layer.recurrent_states.values()]
            else:
                tensors = [layer.keys, layer.values] if layer.is_initialized else []
            total += sum(
                x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor)
            )
        return total
