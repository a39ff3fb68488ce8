# SPDX-License-Identifier: MIT
"""The `attn` field of configs, which puts softmax attention in the place of some layers' mixers:
one dictionary, or a list of them for different kinds.

    attn = {"layers": [1, 3], "num_heads": 16}
    attn = [{"layers": [1], "num_heads": 16}, {"layers": [3], "num_heads": 8, "window_size": 512}]
"""

from __future__ import annotations

import math
from typing import Any, TypedDict, cast


class _Required(TypedDict):
    layers: list[int]
    num_heads: int


class AttentionSpec(_Required, total=False):
    """One kind of attention and the layers that have it."""

    num_kv_heads: int
    qkv_bias: bool
    window_size: int | None
    rope_theta: float


AttentionConfig = AttentionSpec | list[AttentionSpec] | None


def parse_attention_config(attn: Any, *, num_hidden_layers: int) -> AttentionConfig:
    """`attn` checked and filled with defaults: num_kv_heads as many as num_heads, no qkv_bias, no
    window_size, rope_theta 10000. What is given is copied; fields of other names are kept.

    Raises `ValueError` for a missing or wrong field, and for a layer that is not there or is named
    twice.

    Example:
        >>> parse_attention_config({"layers": [1], "num_heads": 4}, num_hidden_layers=2)
        ... # doctest: +NORMALIZE_WHITESPACE
        {'layers': [1], 'num_heads': 4, 'num_kv_heads': 4, 'qkv_bias': False,
         'window_size': None, 'rope_theta': 10000.0}
    """
    if attn is None:
        return None
    if not _is_int(num_hidden_layers) or num_hidden_layers < 0:
        raise ValueError(
            f"num_hidden_layers is {num_hidden_layers!r}; expected an integer of at least 0"
        )
    if not isinstance(attn, dict | list):
        raise ValueError(f"attn is {attn!r}; expected None, a dictionary or a list of dictionaries")
    specs = attn if isinstance(attn, list) else [attn]
    for i, spec in enumerate(specs):
        if not isinstance(spec, dict):
            raise ValueError(f"attn[{i}] is {spec!r}; expected a dictionary")
        for field in ("layers", "num_heads"):
            if field not in spec:
                raise ValueError(f"attn names no {field}; give attn[{field!r}]")
    check_layers([spec["layers"] for spec in specs], num_hidden_layers)
    filled = [fill_spec(spec) for spec in specs]
    return cast(AttentionConfig, filled if isinstance(attn, list) else filled[0])


def get_attention_spec(attn: AttentionConfig, *, layer_idx: int) -> AttentionSpec | None:
    """The dictionary of a parsed `attn` that names a layer; None where the layer keeps its mixer.

    Example:
        >>> get_attention_spec({"layers": [1], "num_heads": 4}, layer_idx=0) is None
        True
    """
    specs = attn if isinstance(attn, list) else [] if attn is None else [attn]
    return next((spec for spec in specs if layer_idx in spec["layers"]), None)


def check_layers(groups: list[Any], num_hidden_layers: int) -> None:
    """`ValueError` unless every `attn['layers']` is a list of layers that no other one names."""
    taken: set[int] = set()
    for layers in groups:
        if not isinstance(layers, list | tuple):
            raise ValueError(f"attn['layers'] is {layers!r}; expected a list of layer numbers")
        for i in layers:
            if not _is_int(i):
                raise ValueError(f"attn['layers'] holds {i!r}; expected integers")
            if not 0 <= i < num_hidden_layers:
                raise ValueError(
                    f"attn['layers'] holds {i}, which is outside 0..{num_hidden_layers - 1}"
                )
            if i in taken:
                raise ValueError(f"attn['layers'] holds {i}, which is named twice")
            taken.add(i)


def fill_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """A copy of one dictionary of `attn` with defaults, its values checked."""
    filled = dict(spec)
    if isinstance(spec.get("layers"), tuple):
        filled["layers"] = list(spec["layers"])
    filled.setdefault("num_kv_heads", None)
    if filled["num_kv_heads"] is None:
        filled["num_kv_heads"] = filled["num_heads"]
    for field, default in (("qkv_bias", False), ("window_size", None), ("rope_theta", 10000.0)):
        filled.setdefault(field, default)
    for field in ("num_heads", "num_kv_heads", "window_size"):
        value = filled[field]
        if field == "window_size" and value is None:
            continue
        if not _is_int(value) or value < 1:
            either = " or None" if field == "window_size" else ""
            raise ValueError(f"attn[{field!r}] is {value!r}; expected a positive integer{either}")
    if not isinstance(filled["qkv_bias"], bool):
        raise ValueError(f"attn['qkv_bias'] is {filled['qkv_bias']!r}; expected True or False")
    theta = filled["rope_theta"]
    number = isinstance(theta, int | float) and not isinstance(theta, bool)
    if not number or not 0 < theta < math.inf:
        raise ValueError(f"attn['rope_theta'] is {theta!r}; expected a positive finite number")
    return filled


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
