# SPDX-License-Identifier: MIT
"""Gated DeltaProduct, arXiv:2502.10297."""

from typing import ClassVar

from fla.layers import GatedDeltaProduct
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class GatedDeltaProductConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.GatedDeltaProduct`."""

    model_type = "gated_deltaproduct"
    mixer: ClassVar = GatedDeltaProduct

    attn_mode: str = "chunk"
    conv_size: int = 4
    head_dim: int = 256
    num_heads: int = 6
    num_v_heads: int | None = None
    expand_v: int | float = 2.0
    use_output_gate: bool = True
    use_short_conv: bool = True
    use_forget_gate: bool = False
    allow_neg_eigval: bool = False
    num_householder: int = 1
    num_hidden_layers: int = 21


class GatedDeltaProductModel(DecoderModel):
    config_class = GatedDeltaProductConfig


class GatedDeltaProductForCausalLM(DecoderForCausalLM):
    config_class = GatedDeltaProductConfig
    model_class = GatedDeltaProductModel


register(GatedDeltaProductConfig, GatedDeltaProductModel, GatedDeltaProductForCausalLM)
