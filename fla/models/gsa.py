# SPDX-License-Identifier: MIT
"""Gated slot attention, arXiv:2409.07146."""

from typing import Any, ClassVar

from fla.layers import GatedSlotAttention
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class GSAConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.GatedSlotAttention`, whose norm runs with
    `o_norm_eps`, as in published code.
    """

    model_type = "gsa"
    unused: ClassVar[tuple[str, ...]] = ("clamp_min", "clamp_max")
    mixer: ClassVar = GatedSlotAttention

    gate_logit_normalizer: int = 8
    num_heads: int = 4
    num_kv_heads: int | None = None
    num_slots: int | None = 64
    use_short_conv: bool = False
    conv_size: int = 4
    expand_k: int | float = 1
    expand_v: int | float = 1
    feature_map: str = "swish"
    use_output_gate: bool = False
    use_norm: bool = True
    elementwise_affine: bool = True
    o_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        # published configs spell these two so
        self.expand_k = kwargs.pop("exapnd_k", self.expand_k)
        self.expand_v = kwargs.pop("exapnd_v", self.expand_v)
        super().__post_init__(**kwargs)


class GSAModel(DecoderModel):
    config_class = GSAConfig


class GSAForCausalLM(DecoderForCausalLM):
    config_class = GSAConfig
    model_class = GSAModel


register(GSAConfig, GSAModel, GSAForCausalLM)
