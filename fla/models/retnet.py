# SPDX-License-Identifier: MIT
"""RetNet, arXiv:2307.08621."""

from typing import ClassVar

from fla.layers import MultiScaleRetention
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class RetNetConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.MultiScaleRetention`."""

    model_type = "retnet"
    mixer: ClassVar = MultiScaleRetention

    attn_mode: str = "chunk"
    expand_k: int | float = 1.0
    expand_v: int | float = 2.0
    hidden_ratio: int | float | None = 2
    num_heads: int = 8
    num_kv_heads: int | None = None
    feature_map: str | None = None
    use_short_conv: bool = False
    conv_size: int = 4
    use_output_gate: bool = True
    elementwise_affine: bool = True


class RetNetModel(DecoderModel):
    config_class = RetNetConfig


class RetNetForCausalLM(DecoderForCausalLM):
    config_class = RetNetConfig
    model_class = RetNetModel


register(RetNetConfig, RetNetModel, RetNetForCausalLM)
