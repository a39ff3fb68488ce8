# SPDX-License-Identifier: MIT
"""Transformer with multi-head latent attention, arXiv:2405.04434."""

from typing import ClassVar

from fla.layers import MultiheadLatentAttention
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class MLAConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.MultiheadLatentAttention`; `window_size`
    makes every layer a sliding one.
    """

    model_type = "mla"
    unused: ClassVar[tuple[str, ...]] = ("elementwise_affine",)
    attention: ClassVar = MultiheadLatentAttention
    default_layer_type: ClassVar[str] = "full_attention"

    num_heads: int = 16
    q_lora_rank: int | None = 64
    qk_rope_head_dim: int = 64
    kv_lora_rank: int = 512
    v_head_dim: int = 128
    qk_nope_head_dim: int = 128
    qk_head_dim: int = 192
    window_size: int | None = None
    rope_theta: float | None = 10000.0
    rope_scaling: dict | None = None
    latent_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        if self.window_size and self.layer_types is None:
            self.layer_types = ["sliding_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)


class MLAModel(DecoderModel):
    config_class = MLAConfig


class MLAForCausalLM(DecoderForCausalLM):
    config_class = MLAConfig
    model_class = MLAModel


register(MLAConfig, MLAModel, MLAForCausalLM)
