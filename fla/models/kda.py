# SPDX-License-Identifier: MIT
"""Kimi delta attention, arXiv:2510.26692."""

from typing import ClassVar

from fla.layers import KimiDeltaAttention
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class KDAConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.KimiDeltaAttention`."""

    model_type = "kda"
    mixer: ClassVar = KimiDeltaAttention

    attn_mode: str = "chunk"
    expand_v: int | float = 1.0
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    safe_gate: bool = False
    lower_bound: float | None = None
    conv_size: int = 4
    head_dim: int = 128
    num_heads: int = 16
    num_v_heads: int | None = None


class KDAModel(DecoderModel):
    config_class = KDAConfig


class KDAForCausalLM(DecoderForCausalLM):
    config_class = KDAConfig
    model_class = KDAModel


register(KDAConfig, KDAModel, KDAForCausalLM)
