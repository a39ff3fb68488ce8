# SPDX-License-Identifier: MIT
"""DeltaNet, arXiv:2406.06484."""

from typing import ClassVar

from fla.layers import DeltaNet
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class DeltaNetConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.DeltaNet`."""

    model_type = "delta_net"
    unused: ClassVar[tuple[str, ...]] = ("use_output_norm",)
    mixer: ClassVar = DeltaNet

    attn_mode: str = "chunk"
    expand_k: int | float = 1.0
    expand_v: int | float = 1.0
    use_gate: bool = False
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    use_beta: bool = True
    num_heads: int = 16
    qk_norm: str = "l2"
    qk_activation: str = "silu"
    num_hidden_layers: int = 24


class DeltaNetModel(DecoderModel):
    config_class = DeltaNetConfig


class DeltaNetForCausalLM(DecoderForCausalLM):
    config_class = DeltaNetConfig
    model_class = DeltaNetModel


register(DeltaNetConfig, DeltaNetModel, DeltaNetForCausalLM)
