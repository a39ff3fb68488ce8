# SPDX-License-Identifier: MIT
"""Comba, arXiv:2506.02475."""

from typing import ClassVar

from fla.layers import Comba
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class CombaConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.Comba`."""

    model_type = "comba"
    mixer: ClassVar = Comba

    attn_mode: str = "chunk"
    conv_size: int = 4
    head_dim: int = 256
    num_heads: int = 6
    num_v_heads: int | None = None
    expand_v: int | float = 2.0
    use_output_gate: bool = True
    use_short_conv: bool = True
    use_output_correction: bool = True
    use_inner_decay: bool = True
    correction_factor: float = 1.0
    normalize_feedback: bool = True
    num_hidden_layers: int = 21


class CombaModel(DecoderModel):
    config_class = CombaConfig


class CombaForCausalLM(DecoderForCausalLM):
    config_class = CombaConfig
    model_class = CombaModel


register(CombaConfig, CombaModel, CombaForCausalLM)
