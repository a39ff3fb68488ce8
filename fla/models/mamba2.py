# SPDX-License-Identifier: MIT
"""Mamba-2, arXiv:2405.21060."""

from typing import Any, ClassVar

from fla.layers import Mamba2
from fla.models.blocks import BackboneForCausalLM, BackboneModel, MixerBlock
from fla.models.config import DecoderConfig
from fla.models.decoder import register


class Mamba2Config(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.Mamba2`. There is no MLP."""

    model_type = "mamba2"
    unused: ClassVar[tuple[str, ...]] = ("rescale_prenorm_residual", "time_step_rank")
    activations: ClassVar = ("silu", "swish")
    mixer: ClassVar[Any] = Mamba2
    # transformers' names, so that its checkpoints load here as they are
    attribute_map: ClassVar[dict[str, str]] = {
        "layer_norm_epsilon": "norm_eps",
        "time_step_min": "dt_min",
        "time_step_max": "dt_max",
        "time_step_floor": "dt_init_floor",
        "time_step_limit": "dt_limit",
    }

    head_dim: int = 64
    state_size: int = 128
    num_heads: int | None = None
    num_hidden_layers: int = 48
    norm_eps: float = 1e-5
    pad_token_id: int | None = 0
    expand: int = 2
    conv_kernel: int = 4
    n_groups: int = 1
    use_bias: bool = False
    use_conv_bias: bool = True
    conv_init: float | None = None
    A_init_range: tuple[int | float, int | float] | list = (1, 16)
    D_has_hdim: bool = False
    hidden_act: str = "silu"
    residual_in_fp32: bool = True
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_limit: tuple[float, float] | list = (0.0, float("inf"))
    rmsnorm: bool = True
    norm_before_gate: bool = False
    chunk_size: int = 256


class Mamba2Model(BackboneModel):
    config_class = Mamba2Config
    block = MixerBlock


class Mamba2ForCausalLM(BackboneForCausalLM):
    config_class = Mamba2Config
    model_class = Mamba2Model


register(Mamba2Config, Mamba2Model, Mamba2ForCausalLM)
