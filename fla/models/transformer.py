# SPDX-License-Identifier: MIT
"""Transformer with rotary positions and a SwiGLU MLP, arXiv:2302.13971: the softmax baseline."""

from typing import ClassVar

from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class TransformerConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.Attention`; `window_size` makes every layer
    a sliding one.
    """

    model_type = "transformer"
    unused: ClassVar[tuple[str, ...]] = ("elementwise_affine",)
    default_layer_type: ClassVar[str] = "full_attention"

    num_heads: int = 32
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    qk_norm: bool | str = False
    qk_norm_eps: float = 1e-5
    window_size: int | None = None
    rope_theta: float | None = 10000.0
    head_dim: int | None = None
    partial_rotary_factor: float = 1.0
    output_gate: bool = False
    rope_scaling: dict | None = None
    num_hidden_layers: int = 24

    def __post_init__(self, **kwargs):
        if self.window_size and self.layer_types is None:
            self.layer_types = ["sliding_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)


class TransformerModel(DecoderModel):
    config_class = TransformerConfig


class TransformerForCausalLM(DecoderForCausalLM):
    config_class = TransformerConfig
    model_class = TransformerModel


register(TransformerConfig, TransformerModel, TransformerForCausalLM)
