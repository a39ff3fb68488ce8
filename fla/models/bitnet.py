# SPDX-License-Identifier: MIT
"""BitNet b1.58, arXiv:2402.17764: a transformer whose attention projects with ternary weights."""

from typing import ClassVar

from fla.layers import BitAttention
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register
from fla.models.transformer import TransformerConfig


class BitNetConfig(TransformerConfig):
    """`TransformerConfig` with `fla.layers.BitAttention`, which has no biases and norms."""

    model_type = "bitnet"
    attention: ClassVar = BitAttention

    def __post_init__(self, **kwargs):
        for name in ("qkv_bias", "qk_norm", "head_dim", "output_gate", "partial_rotary_factor"):
            if getattr(self, name) != getattr(TransformerConfig, name):
                raise ValueError(f"BitNetConfig: {name} is not part of BitAttention; drop it")
        super().__post_init__(**kwargs)


class BitNetModel(DecoderModel):
    config_class = BitNetConfig


class BitNetForCausalLM(DecoderForCausalLM):
    config_class = BitNetConfig
    model_class = BitNetModel


register(BitNetConfig, BitNetModel, BitNetForCausalLM)
