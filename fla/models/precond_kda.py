# SPDX-License-Identifier: MIT
"""Preconditioned Kimi delta attention, arXiv:2604.21100: see `fla.ops.precond_kda`."""

from typing import ClassVar

from fla.layers import PrecondKDA
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class PrecondKDAConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.PrecondKDA`."""

    model_type = "precond_kda"
    mixer: ClassVar = PrecondKDA

    attn_mode: str = "chunk"
    expand_v: int | float = 1.0
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    safe_gate: bool = False
    lower_bound: float | None = None
    conv_size: int = 4
    head_dim: int = 128
    num_heads: int = 16
    num_v_heads: int | None = None
    squash_x: float = 1.5
    squash_eps: float = 1e-6
    log_atk_scale_init: float = -0.2
    a_log_init_lower: int | float = 1


class PrecondKDAModel(DecoderModel):
    config_class = PrecondKDAConfig


class PrecondKDAForCausalLM(DecoderForCausalLM):
    config_class = PrecondKDAConfig
    model_class = PrecondKDAModel


register(PrecondKDAConfig, PrecondKDAModel, PrecondKDAForCausalLM)
