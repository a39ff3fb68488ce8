# SPDX-License-Identifier: MIT
"""Mixture of memories, arXiv:2502.13685."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from fla.layers import MomAttention
from fla.models.config import DecoderConfig
from fla.models.decoder import DecoderForCausalLM, DecoderModel, register


class MomConfig(DecoderConfig):
    """`DecoderConfig` with the arguments of `fla.layers.MomAttention`. `aux_loss_scale` weighs the
    load-balancing loss of the router, which joins the loss in training.
    """

    model_type = "mom"
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


class MomModel(DecoderModel):
    config_class = MomConfig

    def auxiliary_loss(self, shared: dict[str, Any]) -> Tensor | None:
        """`aux_loss_scale * M sum_m (share of choices that fell on m) (mean probability of m)`,
        1 where all memories are used alike; mean over layers. Fedus et al. (2021),
        arXiv:2101.03961.
        """
        layers = []
        for logits in shared.get("router_logits", []):
            p = logits.flatten(0, 1).float().softmax(-1)
            chosen = torch.zeros_like(p).scatter(-1, p.topk(self.config.topk, -1).indices, 1.0)
            layers.append((chosen.mean(0) * p.mean(0)).sum() / self.config.topk)
        if not layers or not self.config.aux_loss_scale:
            return None
        scale = self.config.aux_loss_scale * self.config.num_memories
        return scale * torch.stack(layers).mean()


class MomForCausalLM(DecoderForCausalLM):
    config_class = MomConfig
    model_class = MomModel


register(MomConfig, MomModel, MomForCausalLM)
