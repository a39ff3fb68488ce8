# SPDX-License-Identifier: MIT
"""The cache: transformers' cache layers, with states for recurrent mixers and a count of tokens;
and the names under which layers written for the published package read and write it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import (
    CacheLayerMixin,
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


STATES = ("recurrent_state", "attn_state", "conv_state", "ffn_state")


def list_tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dictionaries and dataclasses.

    Example:
        >>> len(list_tensors({"a": (torch.zeros(1), None)}))
        1
    """
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x)
        return x

    map_tensors(keep, tree)
    return found


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`function` of every tensor in nested tuples, lists, dictionaries and dataclasses.

    Example:
        >>> map_tensors(lambda x: x + 1, {"a": (torch.zeros(1), None)})
        {'a': (tensor([1.]), None)}
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, x) for key, x in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(map_tensors(function, x) for x in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree) if field.init]
        return dataclasses.replace(
            tree, **{name: map_tensors(function, getattr(tree, name)) for name in names}
        )
    return tree


class FLALayer(CacheLayerMixin):
    """What a layer written for the published cache keeps: `state`, a dictionary of
    `recurrent_state`, `attn_state`, `conv_state` and `ffn_state`, each None until written. The
    batch is dimension 0 of every tensor.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Any] = dict.fromkeys(STATES)
        self.home: list[torch.device] = []  # devices of what is offloaded
        self.trimmed = False  # whether a window dropped tokens

    def write(self, window: int | None, attn_state: tuple[Tensor, ...] | None, **new: Any) -> None:
        """Replace the given states; tensors `[B, T, ...]` of attn_state are appended along time,
        and the last `window` tokens are kept.
        """
        self.state.update({name: x for name, x in new.items() if x is not None})
        if attn_state is not None:
            before = self.state["attn_state"]
            if before is not None:
                attn_state = tuple(torch.cat(x, 1) for x in zip(before, attn_state, strict=True))
            if window is not None:
                self.trimmed |= attn_state[0].shape[1] > window
                attn_state = tuple(x[:, -window:] for x in attn_state)
            self.state["attn_state"] = tuple(attn_state)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ValueError("Cache: this layer keeps states of the published protocol, no keys")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.lazy_initialization(key_states, value_states)

    def get_seq_length(self) -> int:
        attn = self.state["attn_state"]
        return 0 if attn is None else attn[0].shape[1]

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.state = map_tensors(function, self.state)

    def offload(self) -> None:
        self.home = [x.device for x in list_tensors(self.state)]
        self._map(lambda x: x.to("cpu"))

    def prefetch(self) -> None:
        if self.home:  # all states of a layer lie on one device
            self._map(lambda x: x.to(self.home[0]))
        self.home = []

    def reset(self) -> None:
        self.state, self.is_initialized, self.trimmed = dict.fromkeys(STATES), False, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def check_crop(self) -> None:
        """`ValueError` where last tokens cannot be dropped."""
        if any(self.state[name] is not None for name in STATES if name != "attn_state"):
            raise ValueError(
                "Cache.crop: a recurrent, convolution or ffn state cannot forget its last tokens; "
                "keep a copy of the cache from before them"
            )
        if self.trimmed:
            raise ValueError(
                "Cache.crop: the window has dropped tokens that would be seen again; keep a copy "
                "of the cache from before them"
            )

    def crop(self, tokens_to_remove: int) -> None:
        if not tokens_to_remove:
            return
        self.check_crop()
        if self.state["attn_state"] is not None:
            self._map(lambda x: x[:, :tokens_to_remove])


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
        self.alone: dict[int, int] = {}  # tokens of layers that were called outside a decoder
        self.padded = False
        self.extras: dict[tuple[int, str], Tensor] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that a layer has seen so far, padding included."""
        return self.seen_tokens + self.alone.get(layer_idx, 0)

    def advance(self, tokens: int, padded: bool = False, layer_idx: int | None = None) -> None:
        """Count the tokens of a forward pass: of a whole model, or of the one layer `layer_idx`
        that was called by itself; `padded` if some were padding.
        """
        if layer_idx is None:
            self.seen_tokens += tokens
        else:
            self.alone[layer_idx] = self.alone.get(layer_idx, 0) + tokens
        self.padded |= padded

    def update(
        self,
        key_states: Tensor | None = None,
        value_states: Tensor | None = None,
        layer_idx: int = 0,
        cache_kwargs: dict[str, Any] | None = None,
        *,
        recurrent_state: Any = None,
        attn_state: tuple[Tensor, ...] | None = None,
        conv_state: Any = None,
        ffn_state: Any = None,
        offset: int = 1,
    ) -> Any:
        """Two protocols. With key_states and value_states `[B, H, T, D]`: transformers' own, which
        returns all keys and values. With states by name, as layers for the published cache call it:
        the given states are replaced, tensors `[B, T, ...]` of attn_state appended (and trimmed to
        `cache_kwargs["window_size"]`), the tokens counted (attn_state's, else `offset`), and the
        layer's dictionary of states returned.

        Example:
            >>> cache = Cache()
            >>> k = v = torch.zeros(2, 3, 8)
            >>> state = cache.update(attn_state=(k, v), layer_idx=0)
            >>> cache.update(attn_state=(k, v), layer_idx=0)["attn_state"][0].shape
            torch.Size([2, 6, 8])
            >>> cache.get_seq_length(0)
            6
        """
        new = dict(recurrent_state=recurrent_state, conv_state=conv_state, ffn_state=ffn_state)
        if key_states is not None and value_states is not None:
            if attn_state is not None or any(x is not None for x in new.values()):
                raise ValueError(
                    "Cache.update: give key_states and value_states, or states by name, not both"
                )
            return super().update(key_states, value_states, layer_idx)
        if key_states is not None or value_states is not None:
            raise ValueError("Cache.update: give both key_states and value_states, or neither")
        layer = self._published(layer_idx)
        layer.write((cache_kwargs or {}).get("window_size"), attn_state, **new)
        self.advance(offset if attn_state is None else attn_state[0].shape[1], layer_idx=layer_idx)
        return layer.state

    def _published(self, layer_idx: int) -> FLALayer:
        """The layer at layer_idx as one that keeps states by name; a recurrent layer's state moves
        into it.
        """
        while len(self.layers) <= layer_idx:
            self.layers.append(DynamicLayer())
        layer = self.layers[layer_idx]
        if isinstance(layer, FLALayer):
            return layer
        recurrent = isinstance(layer, RecurrentLayer)
        if not recurrent and layer.is_initialized:
            raise ValueError(
                f"Cache.update: layer {layer_idx} already holds keys and values, not states by name"
            )
        published = self.layers[layer_idx] = FLALayer()
        if recurrent:
            published.state.update(_by_name(layer.read()))
            published.is_initialized = published.state["recurrent_state"] is not None
        return published

    def __getitem__(self, layer_idx: int) -> dict[str, Any]:
        """The states of a layer by their published names: `recurrent_state`, `attn_state` (keys and
        values `[B, T, H*D]`), `conv_state` and `ffn_state`; None where there is none.
        """
        if not 0 <= layer_idx < len(self.layers):
            raise KeyError(f"Cache: layer {layer_idx} of {len(self.layers)}")
        layer = self.layers[layer_idx]
        if isinstance(layer, FLALayer):
            return layer.state
        states = _by_name(layer.read() if isinstance(layer, RecurrentLayer) else None)
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            kept: Any = (layer.keys, layer.values)
            states["attn_state"] = tuple(x.transpose(1, 2).flatten(2) for x in kept)
        states["ffn_state"] = self.read_extra(layer_idx, "ffn")
        return states

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self.layers)))

    def to_legacy_cache(self) -> tuple[dict[str, Any], ...]:
        """The states of all layers by their published names."""
        return tuple(self)

    @classmethod
    def from_legacy_cache(
        cls, past_key_values: Cache | Iterable[dict[str, Any]] | None = None, seen_tokens: int = 0
    ) -> Cache:
        """A cache of states by name, one dictionary per layer, in which every layer has seen
        `seen_tokens` (attention: at least what it holds); a `Cache` is returned as it is.

        Example:
            >>> states = {"recurrent_state": torch.zeros(1, 2, 4, 4)}
            >>> Cache.from_legacy_cache([states], seen_tokens=5).get_seq_length()
            5
        """
        if isinstance(past_key_values, Cache):
            return past_key_values
        cache = cls()
        if not isinstance(past_key_values, Iterable | None):
            raise TypeError(
                f"Cache.from_legacy_cache: past_key_values is {type(past_key_values).__name__}; "
                "expected a Cache or a sequence of dictionaries, one per layer"
            )
        for i, states in enumerate(past_key_values or ()):
            if not isinstance(states, dict) or not set(states) <= set(STATES):
                raise TypeError(
                    f"Cache.from_legacy_cache: layer {i} is {type(states).__name__} "
                    f"{list(states) if isinstance(states, dict) else ''}; expected a dictionary of "
                    f"{', '.join(STATES)}"
                )
            layer = cache._published(i)
            layer.write(None, **{"attn_state": None, **states})
            cache.alone[i] = max(seen_tokens, layer.get_seq_length())
        return cache

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(keys that `query_length` new tokens of a layer may look at, 0): for a recurrent layer
        all tokens that it has seen.
        """
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if isinstance(layer, RecurrentLayer):
            return self.get_seq_length(layer_idx) + query_length, 0
        return super().get_mask_sizes(query_length, layer_idx)

    def get_max_length(self) -> int | None:  # type: ignore[override]  # as published
        """None: the cache grows with its tokens."""
        return None

    def read_state(self, layer_idx: int) -> State | None:
        """The state of a recurrent layer; None before it was written."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if isinstance(layer, FLALayer):
            recurrent, conv = layer.state["recurrent_state"], layer.state["conv_state"]
            conv = () if conv is None else conv if isinstance(conv, tuple | list) else (conv,)
            return None if recurrent is None else State(recurrent, tuple(conv))
        return layer.read() if isinstance(layer, RecurrentLayer) else None

    def write_state(self, layer_idx: int, state: State) -> None:
        """Replace the state of a recurrent layer."""
        while len(self.layers) <= layer_idx:
            self.layers.append(DynamicLayer())
        layer = self.layers[layer_idx]
        if isinstance(layer, FLALayer):
            layer.write(None, None, recurrent_state=state.recurrent, conv_state=state.conv or None)
            return
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
        self.seen_tokens, self.alone, self.padded, self.extras = 0, {}, False, {}

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens (a number <= 0, as in transformers); not with
        recurrent layers.
        """
        if tokens_to_remove and self.extras:
            raise ValueError(
                "Cache.crop: a token shift cannot forget its last tokens; keep a copy of the cache"
            )
        # layers that refuse do so before anything is cut
        for layer in self.layers:
            if tokens_to_remove and isinstance(layer, FLALayer):
                layer.check_crop()
        for layer in sorted(self.layers, key=lambda x: isinstance(x, DynamicLayer)):
            layer.crop(tokens_to_remove)
        self.seen_tokens += tokens_to_remove

    def size_in_bytes(self) -> int:
        """Memory held by all states, keys and values."""
        total = sum(x.numel() * x.element_size() for x in self.extras.values())
        for layer in self.layers:
            tensors: list[Any] = []
            if isinstance(layer, FLALayer):
                tensors = list_tensors(layer.state)
            elif isinstance(layer, RecurrentLayer):
                tensors = [*layer.conv_states.values(), *layer.recurrent_states.values()]
            else:
                tensors = [layer.keys, layer.values] if layer.is_initialized else []
            total += sum(
                x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor)
            )
        return total


def _by_name(state: State | None) -> dict[str, Any]:
    """A recurrent layer's state under the published names."""
    states: dict[str, Any] = dict.fromkeys(STATES)
    if state is not None:
        states.update(recurrent_state=state.recurrent, conv_state=state.conv or None)
    return states


class FLAGenerationMixin(GenerationMixin):
    """`generate` of a model that was written for the published cache: it starts from an empty
    `Cache`, which the model's layers fill.
    """

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.use_cache is not False and not model_kwargs.get("past_key_values"):
            model_kwargs["past_key_values"] = Cache()


# One cache and one way to generate stand behind all published names.
FLACache = LegacyFLACache = Cache
FLAUnsupportedCacheGenerationMixin = FLAGenerationMixin
