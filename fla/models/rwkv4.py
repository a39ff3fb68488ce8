# SPDX-License-Identifier: MIT
"""RWKV-4, arXiv:2305.13048."""

from typing import ClassVar

from fla.layers import RWKV4Attention
from fla.models.blocks import RWKV4Block, layer_norm_last
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class RWKV4Config(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.RWKV4Attention`; `norm_first` norms the
    embeddings, `hidden_act` is the channel mixing's.
    """

    model_type = "rwkv4"
    mixer: ClassVar = RWKV4Attention

    attn_mode: str = "chunk"
    attention_size: int | None = None
    hidden_act: str = "sqrelu"
    norm_first: bool = True
    norm_bias: bool = True
    norm_eps: float = 1e-5


class RWKV4Model(DecoderModel):
    config_class = RWKV4Config
    block = RWKV4Block
    last_norm = staticmethod(layer_norm_last)


class RWKV4ForCausalLM(DecoderForCausalLM):
    config_class = RWKV4Config
    model_class = RWKV4Model


register(RWKV4Config, RWKV4Model, RWKV4ForCausalLM)
