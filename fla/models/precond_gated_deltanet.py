# SPDX-License-Identifier: MIT
"""The preconditioned gated delta rule, arXiv:2604.21100: see `fla.ops.precond_gated_delta_rule`."""

from typing import ClassVar

from fla.layers import PrecondGatedDeltaNet
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class PrecondGatedDeltaNetConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.PrecondGatedDeltaNet`."""

    model_type = "precond_gated_deltanet"
    mixer: ClassVar = PrecondGatedDeltaNet

    attn_mode: str = "chunk"
    expand_v: int | float = 2.0
    use_gate: bool = True
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    head_dim: int = 256
    num_heads: int = 6
    num_v_heads: int | None = None
    squash_x: float = 1.5
    squash_eps: float = 1e-6
    log_atk_scale_init: float = -0.2
    a_log_init_lower: int | float = 0
    num_hidden_layers: int = 21


class PrecondGatedDeltaNetModel(DecoderModel):
    config_class = PrecondGatedDeltaNetConfig


class PrecondGatedDeltaNetForCausalLM(DecoderForCausalLM):
    config_class = PrecondGatedDeltaNetConfig
    model_class = PrecondGatedDeltaNetModel


register(PrecondGatedDeltaNetConfig, PrecondGatedDeltaNetModel, PrecondGatedDeltaNetForCausalLM)
