# SPDX-License-Identifier: MIT
"""MesaNet, arXiv:2506.05233."""

from typing import ClassVar

from fla.layers import MesaNet
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class MesaNetConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.MesaNet`."""

    model_type = "mesa_net"
    mixer: ClassVar = MesaNet

    attn_mode: str = "chunk"
    use_output_gate: bool = False
    use_short_conv: bool = True
    conv_size: int = 4
    num_heads: int = 16
    head_dim: int = 128
    lambda_lower_bound: float = 0.25
    max_cg_step_training: int = 30
    max_cg_step_decoding: int = 30


class MesaNetModel(DecoderModel):
    config_class = MesaNetConfig


class MesaNetForCausalLM(DecoderForCausalLM):
    config_class = MesaNetConfig
    model_class = MesaNetModel


register(MesaNetConfig, MesaNetModel, MesaNetForCausalLM)
