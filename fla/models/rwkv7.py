# SPDX-License-Identifier: MIT
"""RWKV-7, arXiv:2503.14456."""

from typing import ClassVar

from fla.layers import RWKV7Attention
from fla.models.blocks import RWKV7Block, layer_norm_last
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class RWKV7Config(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.RWKV7Attention`; `norm_first` norms the
    embeddings, `hidden_act` is the channel mixing's.
    """

    model_type = "rwkv7"
    mixer: ClassVar = RWKV7Attention

    attn_mode: str = "chunk"
    head_dim: int | None = 64
    num_heads: int | None = None
    decay_low_rank_dim: int | None = 64
    gate_low_rank_dim: int | None = 128
    a_low_rank_dim: int | None = 64
    v_low_rank_dim: int | None = 16
    value_dim: int | list[int] | None = None
    use_l2warp: bool = True
    hidden_act: str = "sqrelu"
    norm_first: bool = True
    norm_bias: bool = True
    norm_eps: float = 1e-5


class RWKV7Model(DecoderModel):
    config_class = RWKV7Config
    block = RWKV7Block
    last_norm = staticmethod(layer_norm_last)


class RWKV7ForCausalLM(DecoderForCausalLM):
    config_class = RWKV7Config
    model_class = RWKV7Model


register(RWKV7Config, RWKV7Model, RWKV7ForCausalLM)
