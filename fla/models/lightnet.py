# SPDX-License-Identifier: MIT
"""LightNet, arXiv:2405.21022."""

from typing import ClassVar

from fla.layers import LightNetAttention
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class LightNetConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.LightNetAttention`, whose norm runs with
    `o_norm_eps`, as in published code.
    """

    model_type = "lightnet"
    mixer: ClassVar = LightNetAttention

    attn_mode: str = "chunk"
    num_heads: int | None = None
    expand_ratio: int | None = 128
    use_short_conv: bool = False
    conv_size: int = 4
    gate_low_rank_dim: int = 128
    elementwise_affine: bool = True
    o_norm_eps: float = 1e-6


class LightNetModel(DecoderModel):
    config_class = LightNetConfig


class LightNetForCausalLM(DecoderForCausalLM):
    config_class = LightNetConfig
    model_class = LightNetModel


register(LightNetConfig, LightNetModel, LightNetForCausalLM)
