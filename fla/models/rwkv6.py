# SPDX-License-Identifier: MIT
"""RWKV-6, arXiv:2404.05892."""

from typing import ClassVar

from fla.layers import RWKV6Attention
from fla.models.blocks import RWKV6Block, layer_norm_last
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class RWKV6Config(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.RWKV6Attention`; `norm_first` norms the
    embeddings, `hidden_act` is the channel mixing's.
    """

    model_type = "rwkv6"
    mixer: ClassVar = RWKV6Attention

    attn_mode: str = "chunk"
    expand_k: int | float = 0.5
    expand_v: int | float = 1.0
    hidden_ratio: int | float | None = 3.5
    num_heads: int = 4
    proj_low_rank_dim: int = 32
    gate_low_rank_dim: int = 64
    hidden_act: str = "sqrelu"
    norm_first: bool = True
    norm_bias: bool = True
    norm_eps: float = 1e-5


class RWKV6Model(DecoderModel):
    config_class = RWKV6Config
    block = RWKV6Block
    last_norm = staticmethod(layer_norm_last)


class RWKV6ForCausalLM(DecoderForCausalLM):
    config_class = RWKV6Config
    model_class = RWKV6Model


register(RWKV6Config, RWKV6Model, RWKV6ForCausalLM)
