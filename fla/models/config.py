# SPDX-License-Identifier: MIT
"""`DecoderConfig`: the fields every architecture shares, and which kind of layer sits where."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from fla.layers.attn import Attention

LAYER_TYPES = ("linear_attention", "full_attention", "sliding_attention")
ATTENTION_FIELDS = (
    "num_heads",
    "num_kv_heads",
    "qkv_bias",
    "qk_norm",
    "qk_norm_eps",
    "window_size",
    "rope_theta",
    "head_dim",
    "partial_rotary_factor",
    "output_gate",
)


class DecoderConfig(PretrainedConfig):
    """Config of a decoder-only language model.

    `layer_types[i]` is "linear_attention" (the architecture's own mixer), "full_attention" or
    "sliding_attention". `attn` describes the attention layers: a dictionary with the arguments of
    `fla.layers.Attention`, num_heads first; the older form also names its `layers` (and may be a
    list of such dictionaries), and is translated into `layer_types`. `fuse_norm` is accepted so
    that published configs load.
    """

    mixer: ClassVar[Any] = None
    attention: ClassVar[Any] = Attention
    default_layer_type: ClassVar[str] = "linear_attention"
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

    def __post_init__(self, **kwargs: Any) -> None:
        for theirs, ours in self.attribute_map.items():
            if theirs in kwargs:
                setattr(self, ours, kwargs.pop(theirs))
        self.layer_types = self._resolve_layer_types()
        windows = {
            self.attention_spec(i)["window_size"]
            for i, kind in enumerate(self.layer_types)
            if kind == "sliding_attention"
        }
        if len(windows) > 1:
            raise ValueError(
                f"{type(self).__name__}: one window size per model, got {sorted(windows)}"
            )
        self.sliding_window = next(iter(windows), None)
        super().__post_init__(**kwargs)

    def _specs(self) -> list[dict]:
        """`attn` as a list of dictionaries, checked."""
        name, specs = type(self).__name__, self.attn if isinstance(self.attn, list) else [self.attn]
        specs = [spec for spec in specs if spec is not None]
        for spec in specs:
            unknown = set(spec) - {"layers", *ATTENTION_FIELDS}
            if unknown:
                raise ValueError(
                    f"{name}: attn has unknown fields {sorted(unknown)}; expected layers, "
                    f"{', '.join(ATTENTION_FIELDS)}"
                )
        return specs

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
        taken: set[int] = set()
        for spec in self._specs():
            if "layers" not in spec:
                raise ValueError(
                    f"{name}: attn names no layers; give attn['layers'] or layer_types"
                )
            for i in spec["layers"]:
                if not 0 <= i < n or i in taken:
                    raise ValueError(
                        f"{name}: attn['layers'] holds {i}, which is "
                        + ("named twice" if i in taken else f"outside 0..{n - 1}")
                    )
                taken.add(i)
                kinds[i] = "sliding_attention" if spec.get("window_size") else "full_attention"
        return kinds

    def attention_spec(self, layer_idx: int) -> dict[str, Any]:
        """The arguments of the `Attention` at a layer: from the `attn` entry that names it, else
        the only entry, else the config's own fields.
        """
        specs = self._specs()
        named = [spec for spec in specs if layer_idx in spec.get("layers", ())]
        spec = (named or [spec for spec in specs if "layers" not in spec] or [{}])[0]
        defaults = {
            "num_heads": getattr(self, "num_heads", None),
            "num_kv_heads": None,
            "qkv_bias": False,
            "qk_norm": False,
            "qk_norm_eps": 1e-5,
            "window_size": None,
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
            "output_gate": False,
        }
        if self.default_layer_type != "linear_attention" or any("head_dim" in s for s in specs):
            defaults["head_dim"] = None  # elsewhere a head_dim is the mixer's
        if not specs and self.default_layer_type != "linear_attention":
            defaults |= {key: getattr(self, key) for key in defaults}
        spec = defaults | {key: value for key, value in spec.items() if key != "layers"}
        if spec.get("head_dim") is None and self.hidden_size % spec["num_heads"]:
            raise ValueError(
                f"{type(self).__name__}: attention layer {layer_idx} has "
                f"num_heads={spec['num_heads']}, which does not "
                f"divide hidden_size={self.hidden_size}; give attn={{'num_heads': ...}}"
            )
        if self.layer_types[layer_idx] == "sliding_attention" and not spec["window_size"]:
            raise ValueError(
                f"{type(self).__name__}: layer {layer_idx} is sliding_attention without a window; "
                "give attn={'window_size': ...}"
            )
        if self.layer_types[layer_idx] == "full_attention":
            spec["window_size"] = None
        return spec
