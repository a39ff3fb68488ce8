# SPDX-License-Identifier: MIT
"""Mamba-3, arXiv:2603.15569: see `fla.ops.mamba3`."""

from typing import ClassVar

from fla.layers import Mamba3
from fla.models.blocks import BackboneForCausalLM, BackboneModel, MixerBlock
from fla.models.config import DecoderConfig
from fla.models.decoder import register


class Mamba3Config(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.Mamba3`. There is no MLP."""

    model_type = "mamba3"
    unused: ClassVar[tuple[str, ...]] = ("rescale_prenorm_residual",)
    activations: ClassVar = ("silu", "swish")
    mixer: ClassVar = Mamba3

    head_dim: int = 64
    state_size: int = 128
    num_heads: int | None = None
    num_hidden_layers: int = 48
    norm_eps: float = 1e-5
    pad_token_id: int | None = 0
    expand: int = 2
    n_groups: int = 1
    use_bias: bool = False
    rope_fraction: float = 0.5
    A_floor: float = 1e-4
    is_outproj_norm: bool = False
    is_mimo: bool = False
    mimo_rank: int = 4
    hidden_act: str = "silu"
    residual_in_fp32: bool = True
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    chunk_size: int = 64


class Mamba3Model(BackboneModel):
    config_class = Mamba3Config
    block = MixerBlock


class Mamba3ForCausalLM(BackboneForCausalLM):
    config_class = Mamba3Config
    model_class = Mamba3Model


register(Mamba3Config, Mamba3Model, Mamba3ForCausalLM)
