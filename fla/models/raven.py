# SPDX-License-Identifier: MIT
"""Raven, arXiv:2607.25357: gated slots chosen by a router."""

from typing import ClassVar

from fla.layers import Raven
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class RavenConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.Raven`."""

    model_type = "raven"
    mixer: ClassVar = Raven

    attn_mode: str = "chunk"
    gate_logit_normalizer: int = 8
    num_heads: int = 4
    num_kv_heads: int | None = None
    num_slots: int | None = 64
    expand_k: int | float = 1
    expand_v: int | float = 1
    feature_map: str = "swish"
    use_output_gate: bool = False
    decay_type: str = "Mamba2"
    topk: int = 32
    bias_rmm: bool = False
    add_gumbel_noise: bool = True
    router_score: str = "sigmoid"
    router_type: str = "lin"
    use_rope: bool = False
    rope_theta: float = 10000.0
    elementwise_affine: bool = True


class RavenModel(DecoderModel):
    config_class = RavenConfig


class RavenForCausalLM(DecoderForCausalLM):
    config_class = RavenConfig
    model_class = RavenModel


register(RavenConfig, RavenModel, RavenForCausalLM)
