# SPDX-License-Identifier: MIT
"""Gated DeltaNet, arXiv:2412.06464."""

from typing import ClassVar

from fla.layers import GatedDeltaNet
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class GatedDeltaNetConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.GatedDeltaNet`."""

    model_type = "gated_deltanet"
    mixer: ClassVar = GatedDeltaNet

    attn_mode: str = "chunk"
    expand_v: int | float = 2.0
    use_gate: bool = True
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    head_dim: int = 256
    num_heads: int = 6
    num_v_heads: int | None = None
    o_norm_eps: float | None = None
    num_hidden_layers: int = 21
    output_gate_activation: str = "swish"


class GatedDeltaNetModel(DecoderModel):
    config_class = GatedDeltaNetConfig


class GatedDeltaNetForCausalLM(DecoderForCausalLM):
    config_class = GatedDeltaNetConfig
    model_class = GatedDeltaNetModel


register(GatedDeltaNetConfig, GatedDeltaNetModel, GatedDeltaNetForCausalLM)
