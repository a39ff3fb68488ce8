# SPDX-License-Identifier: MIT
"""Every architecture at a size of one's choice: what tasks, studies and benchmarks compare."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from fla.core.errors import UsageError
from fla.models.ablation import AblatedGatedDeltaNetConfig
from fla.models.config import DecoderConfig
from fla.training.run import architectures, parse_overrides

HEADS: dict[str, Any] = dict(num_heads="heads")
GDN = HEADS | dict(head_dim="head_dim")
VALUE = GDN | dict(expand_v=1.0)
SSM: dict[str, Any] = dict(head_dim="head_dim", state_size="head_dim")
SLOTS = HEADS | dict(num_slots="head_dim")

# Fields an architecture needs beside width and depth; a string names one of `small_config`'s sizes.
FIELDS: dict[str, dict[str, Any]] = {
    "transformer": HEADS,
    "linear_attn": HEADS,
    "retnet": HEADS,
    "gla": HEADS,
    "hgrn": {},
    "hgrn2": dict(expand_ratio="head_dim"),
    "lightnet": dict(expand_ratio="head_dim"),
    "gsa": SLOTS,
    "abc": SLOTS,
    "raven": SLOTS | dict(topk="quarter"),
    "rwkv4": {},
    "rwkv6": HEADS,
    "rwkv7": dict(head_dim="head_dim"),
    "rodimus": dict(ska_attn=dict(num_heads="heads", window_size="width")),
    "mamba": {},
    "mamba2": SSM,
    "mamba3": SSM,
    "log_linear_mamba2": SSM,
    "samba": dict(attn=dict(layers=[1, 3], num_heads="heads", window_size="width")),
    "delta_net": HEADS,
    "gated_deltanet": VALUE,
    "gated_deltanet_ablated": VALUE,
    "gated_deltanet2": GDN,
    "gated_deltaproduct": VALUE | dict(num_householder=2),
    "kda": GDN,
    "comba": VALUE,
    "precond_gated_deltanet": VALUE,
    "precond_kda": GDN,
    "mesa_net": GDN,
    "mom": GDN,
    "deltaformer": HEADS,
    "bitnet": HEADS,
    "longnet": HEADS,
    "mla": HEADS
    | dict(
        q_lora_rank=None,
        kv_lora_rank="head_dim",
        qk_rope_head_dim="half",
        qk_nope_head_dim="half",
        qk_head_dim="head_dim",
        v_head_dim="head_dim",
    ),
}


def small_config(
    model: str,
    hidden_size: int,
    layers: int,
    vocabulary: int,
    *,
    head_dim: int = 32,
    **fields: Any,
) -> DecoderConfig:
    """The configuration of `NAME` or `NAME:field=value:...` with heads (and states, slots) of
    `head_dim`, so that architectures compare at one width.

    Example:
        >>> small_config("gated_deltanet:allow_neg_eigval=true", 64, 2, 100).allow_neg_eigval
        True
    """
    name, *overrides = model.split(":")
    known = architectures() | {"gated_deltanet_ablated": AblatedGatedDeltaNetConfig}
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UsageError(f"model {name!r} is not known{hint} There are {', '.join(sorted(FIELDS))}")
    if hidden_size % head_dim:
        raise UsageError(f"hidden_size={hidden_size} is not a multiple of head_dim={head_dim}")
    sizes = {
        "heads": hidden_size // head_dim, "head_dim": head_dim, "half": head_dim // 2,
        "quarter": max(1, head_dim // 4), "width": hidden_size,
    }  # fmt: skip

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {n: filled(x) for n, x in value.items()}
        return sizes.get(value, value) if isinstance(value, str) else value

    # wide enough that scores of a narrow model differ from the first step on
    values = filled(FIELDS[name]) | dict(initializer_range=0.5 * hidden_size**-0.5)
    if "attn" in values:
        values["attn"]["layers"] = [i for i in values["attn"]["layers"] if i < layers]
    unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(known[name])})
    if unknown:
        raise UsageError(f"model {name!r} has no field {', '.join(unknown)}")
    values |= dict(pad_token_id=0, bos_token_id=None, eos_token_id=None)
    values |= fields | parse_overrides(overrides, known[name])
    values |= dict(hidden_size=hidden_size, num_hidden_layers=layers, vocab_size=vocabulary)
    try:
        return known[name](**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"model {model!r}: {error}") from error
