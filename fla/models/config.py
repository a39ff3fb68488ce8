# SPDX-License-Identifier: MIT
"""`DecoderConfig`: the fields every architecture shares, and which kind of layer sits where."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Collection
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

from transformers import GenerationConfig, PretrainedConfig

from fla._arguments import check_fields
from fla.layers.attn import Attention
from fla.layers.block_sparse_attn import BlockSparseAttention
from fla.layers.dilated_attn import DilatedAttention
from fla.layers.mla import MultiheadLatentAttention
from fla.models.configuration_utils import check_layers, fill_spec
from fla.modules.activations import ACT2FN
from fla.modules.moe import Experts

LAYER_TYPES = ("linear_attention", "full_attention", "sliding_attention")
ATTENTIONS: dict[str, Any] = {
    "softmax": Attention,
    "mla": MultiheadLatentAttention,
    "dilated": DilatedAttention,
    "block_sparse": BlockSparseAttention,
}
# Names beside a config's own that pass: what transformers sets and saves, and what is derived here.
PASSED = {
    *("auto_map", "model_type", "name_or_path", "num_labels", "quantization_config", "torch_dtype"),
    *("attn_implementation", "experts_implementation", "output_attentions", "per_layer_config"),
    *("sliding_window", "attnres_block_size"),
}
ACTIVATIONS = {*ACT2FN, "powlu"}
QK_NORMS = (False, True, "all_heads", "l2", "sum")
OF_THE_MODEL = {"hidden_size", "max_position_embeddings", "layer_idx"}


def _after_checks(post_init: Callable[..., None]) -> Callable[..., None]:
    @wraps(post_init)
    def checked_first(self: Any, **kwargs: Any) -> None:
        check_fields(self)
        post_init(self, **kwargs)

    return checked_first


def attention_fields(attention: Any) -> dict[str, Any]:
    """The constructor arguments of an attention layer that describe it, with their defaults."""
    arguments = inspect.signature(attention).parameters.values()
    return {a.name: a.default for a in arguments if a.name not in OF_THE_MODEL}


class DecoderConfig(PretrainedConfig):
    """Config of a decoder-only language model.

    `layer_types[i]` is "linear_attention" (the architecture's own mixer), "full_attention" or
    "sliding_attention". `attn` describes the attention layers: a dictionary with the arguments of
    `fla.layers.Attention`, num_heads first, or with a `kind` ("mla", "dilated", "block_sparse")
    those of another in `ATTENTIONS`; the older form also names its `layers` (and may be a list of
    such dictionaries), and is translated into `layer_types`. Defaults are filled in when `attn` is
    given and when it is assigned (see `fla.models.configuration_utils`). `moe` describes mixtures
    of experts in the place of MLPs: a dictionary with the fields of `fla.modules.moe.Experts`, and
    `layers` where not all have one. Layers of the types in `norm_after` norm what their mixer and
    MLP return, not what they read. `fuse_norm` is accepted so that published configs load.
    """

    mixer: ClassVar[Any] = None
    attention: ClassVar[Any] = Attention
    default_layer_type: ClassVar[str] = "linear_attention"
    # further fields of published configs, which there change no logits of given weights
    unused: ClassVar[tuple[str, ...]] = ()
    activations: ClassVar[Collection[str]] = ACTIVATIONS  # what `hidden_act` may name
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 2048
    hidden_ratio: int | float | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    num_hidden_layers: int = 24
    max_position_embeddings: int | None = 2048
    norm_eps: float = 1e-6
    layer_types: list[str] | None = None
    attn: dict | list | None = None
    moe: dict | None = None
    norm_after: list[str] | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    fuse_norm: bool = True
    fuse_swiglu: bool = True
    fuse_cross_entropy: bool = True
    fuse_linear_cross_entropy: bool = False
    use_l2warp: bool = False

    def __init_subclass__(cls, *args: Any, **kwargs: Any) -> None:
        if "__post_init__" in vars(cls):  # which may compute with the fields
            cls.__post_init__ = _after_checks(cls.__post_init__)  # type: ignore[method-assign]
        super().__init_subclass__(*args, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        check_fields(self)
        for theirs, ours in self.attribute_map.items():
            if theirs in kwargs:
                setattr(self, ours, kwargs.pop(theirs))
        self._check_names(kwargs)
        if self.hidden_act not in self.activations:
            raise ValueError(
                f"{type(self).__name__}: hidden_act is {self.hidden_act!r}; expected one of "
                f"{', '.join(sorted(self.activations))}"
            )
        if getattr(self, "qk_norm", False) not in QK_NORMS:
            raise ValueError(
                f"{type(self).__name__}: qk_norm is {self.qk_norm!r}; expected one of {QK_NORMS}"
            )
        self._resolve_attention()
        self.experts(0)
        wrong = set(self.norm_after or ()) - set(LAYER_TYPES)
        if wrong:
            raise ValueError(
                f"{type(self).__name__}: norm_after holds {sorted(wrong)}; expected some of "
                f"{', '.join(LAYER_TYPES)}"
            )
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        before = dict(self.__dict__)
        super().__setattr__(name, value)
        if name == "attn" and "sliding_window" in before:  # the config is complete
            try:
                if any("layers" in spec for spec in self._specs()) or value is None:
                    self.layer_types = None
                self._resolve_attention()
            except ValueError:
                self.__dict__.update(before)
                raise

    def _resolve_attention(self) -> None:
        """Check and fill `attn`, and set `layer_types` and the window from it."""
        filled = [self._filled(spec) for spec in self._specs()]
        one = filled[0] if filled else None
        self.__dict__["attn"] = filled if isinstance(self.attn, list) else one
        self.layer_types = self._resolve_layer_types()
        windows = {
            self.attention_at(i)[1]["window_size"]
            for i, kind in enumerate(self.layer_types)
            if kind == "sliding_attention"
        }
        if len(windows) > 1:
            raise ValueError(
                f"{type(self).__name__}: one window size per model, got {sorted(windows)}"
            )
        self.sliding_window = next(iter(windows), None)

    def _filled(self, spec: dict[str, Any]) -> dict[str, Any]:
        """An entry of `attn` with the defaults of published configs; with a `kind` as it is."""
        if "kind" in spec or ("num_heads" not in spec and "layers" not in spec):
            return dict(spec)
        spec = {"num_heads": getattr(self, "num_heads", None), **spec}
        known = attention_fields(self._attention_of(spec))
        try:
            filled = fill_spec(spec)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from None
        return {name: x for name, x in filled.items() if name in spec or name in known}

    def _check_names(self, given: dict[str, Any]) -> None:
        """Raise `ValueError` for names that neither the config nor transformers knows."""
        name = type(self).__name__
        if given.get("attnres_block_size") is not None:
            raise ValueError(
                f"{name}: attnres_block_size is {given['attnres_block_size']}; attention residuals "
                "are not implemented: leave it None"
            )
        known = {f.name for f in fields(self)}
        passed = known | PASSED | {*self.unused, *GenerationConfig().to_dict()}
        for field in given:
            if field not in passed and not field.startswith("_"):
                near = difflib.get_close_matches(field, known, n=3)
                hint = f"did you mean {' or '.join(map(repr, near))}?"
                every = f"the fields are {', '.join(sorted(known))}"
                raise ValueError(f"{name}: there is no field {field!r}; {hint if near else every}")

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save the config, and a module that lets transformers find the package by itself
        (`trust_remote_code=True`) where it is installed but not imported.
        """
        home, name = type(self).__module__, type(self).__name__.removesuffix("Config")
        if home.startswith("fla.models."):
            classes = {"AutoConfig": "Config", "AutoModel": "Model"}
            classes["AutoModelForCausalLM"] = "ForCausalLM"
            self.auto_map = {auto: f"modeling_fla.{name}{kind}" for auto, kind in classes.items()}
            names = ", ".join(f"{name}{kind}" for kind in classes.values())
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            shim = f"from {home} import {names}\n\n__all__ = {[*names.split(', ')]}\n"
            Path(save_directory, "modeling_fla.py").write_text(shim)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: the saved module names the package, whose sources are not to be copied."""

    def layer_type(self, layer_idx: int) -> str:
        """The entry of `layer_types` for a layer."""
        assert self.layer_types is not None  # resolved when the config is made
        return self.layer_types[layer_idx]

    def _specs(self) -> list[dict[str, Any]]:
        """`attn` as a list of dictionaries, checked."""
        name, given = type(self).__name__, self.attn if isinstance(self.attn, list) else [self.attn]
        specs: list[dict[str, Any]] = [spec for spec in given if spec is not None]
        for spec in specs:
            if not isinstance(spec, dict):
                raise ValueError(f"{name}: attn holds {spec!r}; expected a dictionary")
            if "kind" in spec and spec["kind"] not in ATTENTIONS:
                raise ValueError(
                    f"{name}: attn['kind'] is {spec['kind']!r}; expected one of "
                    f"{', '.join(ATTENTIONS)}"
                )
            known = ["layers", "kind", *attention_fields(self._attention_of(spec))]
            unknown = set(spec) - set(known)
            if unknown:
                raise ValueError(
                    f"{name}: attn has unknown fields {sorted(unknown)}; expected "
                    f"{', '.join(known)}"
                )
        return specs

    def _attention_of(self, spec: dict[str, Any]) -> Any:
        """The layer an `attn` entry describes: the architecture's own without a `kind`."""
        return ATTENTIONS[spec["kind"]] if "kind" in spec else self.attention

    def _resolve_layer_types(self) -> list[str]:
        name, n = type(self).__name__, self.num_hidden_layers
        if self.layer_types is not None:
            wrong = [kind for kind in self.layer_types if kind not in LAYER_TYPES]
            if wrong or len(self.layer_types) != n:
                raise ValueError(
                    f"{name}: layer_types must hold num_hidden_layers={n} entries out of "
                    f"{', '.join(LAYER_TYPES)}; "
                    f"got {len(self.layer_types)} entries"
                    + (f" with {wrong[0]!r}" if wrong else "")
                )
            return list(self.layer_types)
        kinds = [self.default_layer_type] * n
        specs = self._specs()
        if any("layers" not in spec for spec in specs):
            raise ValueError(f"{name}: attn names no layers; give attn['layers'] or layer_types")
        try:
            check_layers([spec["layers"] for spec in specs], n)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for spec in specs:
            for i in spec["layers"]:
                kinds[i] = "sliding_attention" if spec.get("window_size") else "full_attention"
        return kinds

    def experts(self, layer_idx: int) -> Experts | None:
        """The mixture of experts at a layer; None where it has a plain MLP."""
        spec = dict(self.moe or {})
        layers = spec.pop("layers", range(self.num_hidden_layers))
        if not set(layers) <= set(range(self.num_hidden_layers)):
            raise ValueError(
                f"{type(self).__name__}: moe['layers'] is {list(layers)}; expected numbers from 0 "
                f"to {self.num_hidden_layers - 1}"
            )
        options = None if self.moe is None else Experts.of(spec)
        return options if layer_idx in layers else None

    def attention_at(self, layer_idx: int) -> tuple[Any, dict[str, Any]]:
        """The attention of a layer and its arguments: from the `attn` entry that names it, else
        the only entry, else the config's own fields.
        """
        specs = self._specs()
        named = [spec for spec in specs if layer_idx in spec.get("layers", ())]
        spec = dict((named or [spec for spec in specs if "layers" not in spec] or [{}])[0])
        attention = self._attention_of(spec)
        own = self.default_layer_type != "linear_attention"
        values = attention_fields(attention)
        if own and not specs:
            values = {name: getattr(self, name, default) for name, default in values.items()}
        else:
            of_config = {"num_heads", "norm_eps"} & set(values)
            values |= {name: getattr(self, name, None) for name in of_config}
        values |= {name: value for name, value in spec.items() if name not in ("layers", "kind")}
        self._check_attention(layer_idx, values)
        if self.layer_type(layer_idx) == "full_attention" and "window_size" in values:
            values["window_size"] = None
        return attention, values

    def _check_attention(self, layer_idx: int, values: dict[str, Any]) -> None:
        name, heads = type(self).__name__, values["num_heads"]
        split = "kv_lora_rank" not in values and values.get("head_dim") is None
        if heads is None or (split and self.hidden_size % heads):
            raise ValueError(
                f"{name}: attention layer {layer_idx} has num_heads={heads}, which does not "
                f"divide hidden_size={self.hidden_size}; give attn={{'num_heads': ...}}"
            )
        if self.layer_type(layer_idx) == "sliding_attention" and not values.get("window_size"):
            raise ValueError(
                f"{name}: layer {layer_idx} is sliding_attention without a window; "
                "give attn={'window_size': ...}"
            )
