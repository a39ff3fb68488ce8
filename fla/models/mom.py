# SPDX-License-Identifier: MIT
"""Mixture of memories, arXiv:2502.13685."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.layers import MomAttention
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register
from fla.modules.moe import load_balance


class MomConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.MomAttention`. `aux_loss_scale` weighs the
    load-balancing loss of the router, which joins the loss in training.
    """

    model_type = "mom"
    unused: ClassVar[tuple[str, ...]] = ("mom_backend", "use_layer_wise_balance")
    mixer: ClassVar = MomAttention

    attn_mode: str = "chunk"
    conv_size: int = 4
    num_heads: int = 4
    head_dim: int = 256
    expand_v: int | float = 1.0
    use_output_gate: bool = True
    use_short_conv: bool = True
    num_memories: int = 4
    topk: int = 2
    capacity: float = 1.0
    aux_loss_scale: float = 0.01
    shared_mem: bool = True
    single_kv_proj: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        backend = kwargs.get("mom_backend", "gated_deltanet")
        if backend != "gated_deltanet":
            raise ValueError(
                f"MomConfig: mom_backend is {backend!r}; only 'gated_deltanet' is implemented"
            )
        super().__post_init__(**kwargs)


class MomModel(DecoderModel):
    config_class = MomConfig

    def auxiliary_loss(self, given: dict[str, list[Tensor]]) -> Tensor | None:
        """`aux_loss_scale` times the mean over layers of how unevenly memories are used."""
        if not self.config.aux_loss_scale:
            return super().auxiliary_loss(given)
        p = [promote_to_fp32(logits.flatten(0, 1)).softmax(-1) for logits in given["router_logits"]]
        layers = [load_balance(x, x.topk(self.config.topk, -1).indices) for x in p]
        return self.config.aux_loss_scale * torch.stack(layers).mean()


class MomForCausalLM(DecoderForCausalLM):
    config_class = MomConfig
    model_class = MomModel


register(MomConfig, MomModel, MomForCausalLM)
