# SPDX-License-Identifier: MIT
"""ABC, arXiv:2110.02488."""

from typing import Any, ClassVar

from fla.layers import ABCAttention
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class ABCConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.ABCAttention`."""

    model_type = "abc"
    mixer: ClassVar = ABCAttention

    gate_low_rank_dim: int = 16
    clamp_min: float | None = -32
    clamp_max: float | None = 32
    num_heads: int = 4
    num_slots: int | None = 64
    use_short_conv: bool = False
    conv_size: int = 4
    expand_k: int | float = 0.5
    expand_v: int | float = 1
    elementwise_affine: bool = True
    use_rope: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        # published configs spell these two so
        self.expand_k = kwargs.pop("exapnd_k", self.expand_k)
        self.expand_v = kwargs.pop("exapnd_v", self.expand_v)
        super().__post_init__(**kwargs)


class ABCModel(DecoderModel):
    config_class = ABCConfig


class ABCForCausalLM(DecoderForCausalLM):
    config_class = ABCConfig
    model_class = ABCModel


register(ABCConfig, ABCModel, ABCForCausalLM)
