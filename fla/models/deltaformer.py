# SPDX-License-Identifier: MIT
"""DeltaFormer, arXiv:2505.19488."""

from typing import ClassVar

from fla.layers import DeltaFormerAttention
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class DeltaFormerConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.DeltaFormerAttention`."""

    model_type = "deltaformer"
    unused: ClassVar[tuple[str, ...]] = (
        "attn_mode",
        "elementwise_affine",
        "rope_max_position_embeddings",
    )
    mixer: ClassVar = DeltaFormerAttention

    num_heads: int = 8
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10000.0


class DeltaFormerModel(DecoderModel):
    config_class = DeltaFormerConfig


class DeltaFormerForCausalLM(DecoderForCausalLM):
    config_class = DeltaFormerConfig
    model_class = DeltaFormerModel


register(DeltaFormerConfig, DeltaFormerModel, DeltaFormerForCausalLM)
