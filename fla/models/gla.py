# SPDX-License-Identifier: MIT
"""Gated linear attention, arXiv:2312.06635."""

from typing import ClassVar

from fla.layers import GatedLinearAttention
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class GLAConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.GatedLinearAttention`."""

    model_type = "gla"
    unused: ClassVar[tuple[str, ...]] = ("use_gk", "use_gv")
    mixer: ClassVar = GatedLinearAttention

    attn_mode: str = "chunk"
    expand_k: int | float = 0.5
    expand_v: int | float = 1.0
    num_heads: int = 4
    num_kv_heads: int | None = None
    feature_map: str | None = None
    use_short_conv: bool = False
    conv_size: int = 4
    use_output_gate: bool = True
    clamp_min: float | None = None
    elementwise_affine: bool = True


class GLAModel(DecoderModel):
    config_class = GLAConfig


class GLAForCausalLM(DecoderForCausalLM):
    config_class = GLAConfig
    model_class = GLAModel


register(GLAConfig, GLAModel, GLAForCausalLM)
