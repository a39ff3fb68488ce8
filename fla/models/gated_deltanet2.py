# SPDX-License-Identifier: MIT
"""Gated DeltaNet 2, arXiv:2605.22791: see `fla.ops.gdn2`."""

from typing import ClassVar

from fla.layers import GatedDeltaNet2
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class GatedDeltaNet2Config(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.GatedDeltaNet2`."""

    model_type = "gated_deltanet2"
    mixer: ClassVar = GatedDeltaNet2

    attn_mode: str = "chunk"
    expand_v: int | float = 1.0
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    head_dim: int = 128
    num_heads: int = 16
    num_v_heads: int | None = None


class GatedDeltaNet2Model(DecoderModel):
    config_class = GatedDeltaNet2Config


class GatedDeltaNet2ForCausalLM(DecoderForCausalLM):
    config_class = GatedDeltaNet2Config
    model_class = GatedDeltaNet2Model


register(GatedDeltaNet2Config, GatedDeltaNet2Model, GatedDeltaNet2ForCausalLM)
