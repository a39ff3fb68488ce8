# SPDX-License-Identifier: MIT
"""Linear attention, arXiv:2006.16236."""

from typing import ClassVar

from fla.layers import LinearAttention
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class LinearAttentionConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.LinearAttention`."""

    model_type = "linear_attn"
    mixer: ClassVar = LinearAttention

    attn_mode: str = "fused_chunk"
    expand_k: int | float = 1.0
    expand_v: int | float = 1.0
    num_heads: int = 4
    num_kv_heads: int | None = None
    feature_map: str = "elementwise_product"
    tie_feature_map_qk: bool = False
    norm_q: bool = False
    norm_k: bool = False
    norm_feature_map: bool = False
    elementwise_affine: bool = True

    @property
    def do_feature_map_norm(self) -> bool:
        return self.norm_feature_map


class LinearAttentionModel(DecoderModel):
    config_class = LinearAttentionConfig


class LinearAttentionForCausalLM(DecoderForCausalLM):
    config_class = LinearAttentionConfig
    model_class = LinearAttentionModel


register(LinearAttentionConfig, LinearAttentionModel, LinearAttentionForCausalLM)
