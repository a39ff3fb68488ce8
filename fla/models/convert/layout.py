# SPDX-License-Identifier: MIT
"""What describes one of transformers' architectures, and what several share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fla.modules.rotary import SCALINGS

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How one of transformers' architectures reads here.

    Fields:
        model_type: ours.
        names: parts of parameter names, (theirs, ours).
        fields: config fields, theirs to ours, where the names differ.
        same: config fields with one name.
        check: further config fields; raises `ValueError` for a config that has no counterpart.
        state: further changes to the parameters, before the names change (with back, too).
    """

    model_type: str
    names: tuple[tuple[str, str], ...] = ()
    fields: dict[str, str] = field(default_factory=dict)
    same: tuple[str, ...] = ()
    check: Callable[[Any], dict[str, Any]] = lambda config: {}
    state: Callable[[StateDict, Any, bool], StateDict] = lambda state, config, back: state


COMMON = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "initializer_range",
)
LLAMA_NAMES = (
    ("embed_tokens", "embeddings"),
    ("self_attn", "attn"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "mlp_norm"),
)
HYBRID_FIELDS = {"rms_norm_eps": "norm_eps", "linear_conv_kernel_dim": "conv_size"}


def rope_theta(config: Any) -> dict[str, Any]:
    """Rotary positions of a config; `ValueError` for a kind that is not here."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in SCALINGS:
        raise ValueError(f"convert: rope_type is {kind!r}; expected one of {', '.join(SCALINGS)}")
    scaling = {name: rope[name] for name in ("rope_type", *SCALINGS[kind]) if name in rope}
    return {
        "rope_scaling": None if kind == "default" else scaling,
        "rope_theta": rope.get("rope_theta", getattr(config, "rope_theta", 10000.0)),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
    }


def no_bias(config: Any, *names: str) -> None:
    """`ValueError` where a config switches on a bias that our layers lack."""
    for name in names:
        if getattr(config, name, False):
            raise ValueError(f"convert: {name} has no counterpart; drop it")


def linear_layers(config: Any, kind: str = "linear_attention") -> list[int]:
    """The layers of a kind."""
    return [i for i, name in enumerate(config.layer_types) if name == kind]


def map_layer(
    state: StateDict, prefix: str, target: str, function: Callable[[StateDict], StateDict]
) -> None:
    """Replace the parameters under `prefix` by `function` of them, under `target`."""
    own = {n.removeprefix(prefix): state.pop(n) for n in list(state) if n.startswith(prefix)}
    state.update({target + name: x for name, x in function(own).items()})


def rename(state: StateDict, names: dict[str, str], back: bool) -> StateDict:
    """Parameters under other names; with `back` the other way round."""
    pairs = {ours: theirs for theirs, ours in names.items()} if back else names
    return {pairs.get(name, name): x for name, x in state.items()}
