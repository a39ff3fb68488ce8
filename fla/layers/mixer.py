# SPDX-License-Identifier: MIT
"""What every token mixer shares: the forward protocol, padding and boundaries, and its place in the
cache.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from fla._arguments import check_width, checked
from fla.core.layout import SequenceLayout
from fla.modules.activations import ACT2FN
from fla.modules.feature_map import T2RFeatureMap


@dataclass
class State:
    """What a recurrent mixer carries from one call to the next: inputs of its convolutions and the
    recurrence.
    """

    recurrent: Tensor | tuple[Tensor, ...]
    conv: tuple[Tensor, ...] = ()


@dataclass
class Context:
    """What a recurrent mixer needs to know beside its input.

    Fields:
        layout: padding and boundaries of the tokens.
        state: where the sequences stand; None at their start.
        keep: whether the new state is wanted.
        handed: what the layer takes from others, and room for what it gives them, by name.
    """

    layout: SequenceLayout
    state: State | None
    keep: bool
    handed: dict[str, Any]

    @property
    def cu_seqlens(self) -> Tensor | None:
        return self.layout.cu_seqlens

    @property
    def recurrent(self) -> Any:
        """The state of the recurrence, or None."""
        return None if self.state is None else self.state.recurrent

    @property
    def sequences(self) -> dict[str, Any]:
        """The arguments of it that every operator takes."""
        return dict(
            initial_state=self.recurrent,
            output_final_state=self.keep,
            cu_seqlens=self.cu_seqlens,
        )

    def convolve(self, conv: Any, x: Tensor, index: int = 0) -> tuple[Tensor, Tensor]:
        """x through a `ShortConvolution` whose state is the index-th kept: (y, new state)."""
        cache = None if self.state is None else self.state.conv[index]
        return conv(x, cache=cache, output_final_state=self.keep, cu_seqlens=self.cu_seqlens)

    def after(self, recurrent: Any, conv: tuple[Tensor, ...] = ()) -> State | None:
        """The new state, or None where it is not wanted."""
        return State(recurrent, conv) if self.keep else None


class StateCache(Protocol):
    """The cache as mixers see it; `fla.models.utils.Cache` is one."""

    def get_seq_length(self, layer_idx: int = 0) -> int: ...
    def advance(self, tokens: int, padded: bool, layer_idx: int | None) -> None: ...
    def read_state(self, layer_idx: int) -> State | None: ...
    def write_state(self, layer_idx: int, state: State) -> None: ...
    def update_keys(
        self,
        keys: Tensor,
        values: Tensor,
        layer_idx: int,
        real: Tensor | None,
        window: int | None,
    ) -> tuple[Tensor, Tensor]: ...


def _keeping_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that checks its arguments, and after which every one that it did not store is
    an attribute of its name.
    """
    init = checked(init)
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        for name, value in list(bound.arguments.items())[1:]:
            if not hasattr(self, name) and not isinstance(value, nn.Module | Tensor):
                setattr(self, name, value)

    return wrapped


class Mixer(nn.Module):
    """A token mixer `[B, T, D] -> [B, T, D]`. Subclasses define `mix` on tokens that are all real.
    Constructor arguments are attributes of the same names, as code around published layers reads
    them.

    A decoder resolves the layout once, packs the real tokens and hands `layout` down. A mixer used
    alone builds it from `attention_mask` or `cu_seqlens`, packs, unpacks its result, and counts its
    tokens in the cache.

    What one layer computes for others it returns behind the cache, in the order of `gives`; what it
    reads of others comes as keywords named in `takes`. Both are plain tensors, so that casts,
    offloading, checkpointing and compilation around a layer see them.
    """

    # projections to gates, decays and rates, by the names that published layers give them
    gates: ClassVar[tuple[str, ...]] = (
        "a_proj", "a_atk_proj", "b_proj", "b_atk_proj", "dt_proj", "f_proj", "gk_proj", "s_proj",
        "w_proj", "x_proj",
    )  # fmt: skip
    takes: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ()
    layer_idx: int | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _keeping_arguments(cls.__init__)  # type: ignore[method-assign]

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

    @checked
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        cu_seqlens: Tensor | None = None,
        layout: SequenceLayout | None = None,
        **taken: Tensor | None,
    ) -> tuple[Any, ...]:
        """Returns (o, None, past_key_values, *what `gives` names). attention_mask `[B, T]` (or
        `[B, past + T]` under a cache), 1 for real tokens on any side; cu_seqlens bounds packed
        sequences; `taken` is what `takes` names.
        """
        name = type(self).__name__
        for unknown in set(taken) - set(self.takes):
            raise TypeError(
                f"{name}: forward() has no argument {unknown!r}; beside hidden_states it takes "
                + ", ".join((*list(inspect.signature(Mixer.forward).parameters)[2:-1], *self.takes))
            )
        if output_attentions:
            raise ValueError(
                f"{name}: output_attentions is not supported: no attention matrix is formed"
            )
        if use_cache and past_key_values is None:
            raise ValueError(
                f"{name}: use_cache needs past_key_values; pass a fla.models.utils.Cache"
            )
        check_width(name, "hidden_states", hidden_states, getattr(self, "hidden_size", None), 3)
        if past_key_values is not None and not hasattr(past_key_values, "get_seq_length"):
            raise TypeError(
                f"{name}: past_key_values is a {type(past_key_values).__name__}; expected a "
                "fla.models.utils.Cache"
            )
        past = 0 if past_key_values is None else past_key_values.get_seq_length(self.cache_index())
        if layout is not None:
            if attention_mask is not None or cu_seqlens is not None:
                raise ValueError(
                    f"{name}: layout already holds padding and boundaries; drop attention_mask "
                    "and cu_seqlens"
                )
            o = self.mix(hidden_states, layout, past_key_values, taken)
            return o, None, past_key_values, *(taken[name] for name in self.gives)
        layout = SequenceLayout.resolve(
            *hidden_states.shape[:2],
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            past_length=past,
            device=hidden_states.device,
        )
        handed: dict[str, Any] = dict(taken)
        for name, value in taken.items():  # [B, T, ...] like the tokens; a row [D] is for all
            handed[name] = value if value is None or value.dim() < 3 else layout.pack(value)
        o = self.mix(layout.pack(hidden_states), layout, past_key_values, handed)
        if past_key_values is not None and layout.rows:
            # a decoder, which hands a layout down, counts for all of its layers
            past_key_values.advance(layout.length, layout.padded, self.cache_index())
        given = (layout.unpack(handed[name]) for name in self.gives)
        return layout.unpack(o), None, past_key_values, *given

    def mix(
        self, x: Tensor, layout: SequenceLayout, cache: StateCache | None, handed: dict[str, Any]
    ) -> Tensor:
        """x `[B, T, D]`, or `[1, total, D]` where `layout.packed`. `handed` holds what the layer
        takes, and after the call also what it gives.
        """
        raise NotImplementedError

    def cache_index(self) -> int:
        """The layer's place in a cache, or `ValueError`."""
        if self.layer_idx is None:
            raise ValueError(
                f"{type(self).__name__}: a cache needs layer_idx; pass layer_idx to the constructor"
            )
        return self.layer_idx

    def initial_values(self) -> dict[str, Tensor]:
        """Fresh values of the parameters that do not start like weights and norms."""
        return {}

    def fused(self) -> dict[str, list[int]]:
        """By name the projections that hold several maps, and the rows of each."""
        return {}


class RecurrentMixer(Mixer):
    """A mixer with a `State`. Subclasses define `recur`."""

    mode: str
    use_short_conv: bool

    def mix(
        self, x: Tensor, layout: SequenceLayout, cache: StateCache | None, handed: dict[str, Any]
    ) -> Tensor:
        if cache is None:
            return self.recur(x, Context(layout, None, False, handed))[0]
        place = self.cache_index()
        o, state = self.recur(x, Context(layout, cache.read_state(place), True, handed))
        assert state is not None  # `Context.after` gives one where it is kept
        cache.write_state(place, state)
        return o

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        """Mix x from the context's state: (o, `context.after(...)`)."""
        raise NotImplementedError

    def convolve(
        self, inputs: list[Tensor], context: Context, names: str = "qkv"
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Inputs through their short convolutions `{name}_conv1d`: (outputs, new states)."""
        results = [
            context.convolve(getattr(self, f"{name}_conv1d"), x, i)
            for i, (name, x) in enumerate(zip(names, inputs, strict=True))
        ]
        return [y for y, _ in results], tuple(s for _, s in results)

    def project(
        self, x: Tensor, context: Context, names: str = "qkv"
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """`{name}_proj(x)` through its convolution where `use_short_conv`, as published layers
        name them; without convolution as projected.
        """
        inputs = [getattr(self, f"{name}_proj")(x) for name in names]
        return self.convolve(inputs, context, names) if self.use_short_conv else (inputs, ())

    def token_by_token(self, x: Tensor) -> bool:
        """Whether the token form runs: where the layer asks for it, and for one token."""
        return self.mode == "fused_recurrent" or x.shape[1] == 1


MODES = ("chunk", "fused_recurrent")


def check_mode(name: str, mode: str) -> str:
    """`mode` if it is one, else `ValueError`."""
    if mode not in MODES:
        raise ValueError(f"{name}: mode is {mode!r}; expected one of {', '.join(MODES)}")
    return mode


def gate_steps(heads: int) -> Tensor:
    """dt_bias `[heads]` whose softplus is log-uniform in [0.001, 0.1]."""
    dt = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
    return dt + torch.log(-torch.expm1(-dt))


def register(module: Mixer) -> None:
    """Register the parameters of `initial_values`; parameters of submodules exist and are set."""
    for name, value in module.initial_values().items():
        if "." in name:
            module.get_parameter(name).data.copy_(value)
        else:
            module.register_parameter(name, nn.Parameter(value))


def check_convolution(name: str, backend: str) -> None:
    """Raise `ValueError` unless `backend` is a published convolution kernel, which is a choice of
    speed; here the device chooses.
    """
    if backend not in ("cuda", "triton"):
        raise ValueError(f"{name}: backend is {backend!r}; expected 'cuda' or 'triton'")


def multiple(name: str, what: str, value: int, of: str, divisor: int) -> int:
    """`value // divisor`, or `ValueError` where that is not whole."""
    if value % divisor:
        raise ValueError(f"{name}: {what} is {value}; it must be a multiple of {of}={divisor}")
    return value // divisor


def feature_map(name: str, kind: str, head_dim: int) -> Callable[[Tensor], Tensor]:
    """The map of q and k that `kind` names: "t2r", a learnt one, or an activation."""
    if kind == "t2r":
        return T2RFeatureMap(head_dim, head_dim)
    if kind not in ACT2FN:
        raise ValueError(
            f"{name}: feature_map is {kind!r}; expected one of t2r, {', '.join(ACT2FN)}"
        )
    return ACT2FN[kind]


def low_rank(inputs: int, rank: int, outputs: int, bias: bool = False) -> nn.Sequential:
    """Two linear maps through `rank` channels."""
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))


def heads_and_ratio(
    name: str, hidden_size: int, num_heads: int | None, expand_ratio: int | None
) -> tuple[int, int]:
    """(heads, key channels per head): the one not given makes the key as wide as the input."""
    if num_heads is None:
        if expand_ratio is None:
            raise ValueError(f"{name}: give expand_ratio or num_heads")
        num_heads = multiple(name, "hidden_size", hidden_size, "expand_ratio", expand_ratio)
    width = multiple(name, "hidden_size", hidden_size, "num_heads", num_heads)
    return num_heads, width if expand_ratio is None else expand_ratio


def repeat_heads(heads: int, kv_heads: int, *tensors: Tensor) -> list[Tensor]:
    """`[B, T, kv_heads, .]` to `[B, T, heads, .]`."""
    groups = heads // kv_heads
    return [x if groups == 1 else x.repeat_interleave(groups, 2) for x in tensors]


def whole(name: str, what: str, value: float) -> int:
    """`value` as an int, or `ValueError` where it is not whole."""
    if not math.isclose(value, round(value)):  # 0.58 * 100 is 57.99999999999999
        raise ValueError(f"{name}: {what} is {value}; it must be a whole number")
    return round(value)
