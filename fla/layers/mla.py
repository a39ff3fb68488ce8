# SPDX-License-Identifier: MIT
"""Multi-head latent attention: DeepSeek-AI (2024), *DeepSeek-V2*, arXiv:2405.04434.

    c_t = rms_norm(W_c x_t)        k_t = [W_uk c_t, rope(W_r x_t)]        v_t = W_uv c_t

per head, where the turned part of a key is the same for all heads. q_t has the same two parts.
"""

import torch
import torch.nn as nn
from torch import Tensor

from fla.core.layout import SequenceLayout
from fla.layers.attn import SoftmaxMixer, Where
from fla.modules import RMSNorm, RotaryEmbedding
from fla.modules.linear import weight_of


class MultiheadLatentAttention(SoftmaxMixer):
    """Softmax attention on `[B, T, hidden_size]` whose keys and values are maps of one latent.

    The cache holds the latent and the rotated key, `kv_lora_rank + qk_rope_head_dim` numbers per
    token for all heads. Where the past is longer than what is new, W_uk goes to the query and W_uv
    to the output, and the latents are never expanded. `q_lora_rank=None` projects queries at once,
    `rope_theta=None` rotates nothing. `rope_scaling` is not supported.

    Example:
        >>> layer = MultiheadLatentAttention(
        ...     64, num_heads=2, q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8,
        ...     qk_nope_head_dim=16, qk_head_dim=24, v_head_dim=16)
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 16,
        q_lora_rank: int | None = 1536,
        qk_rope_head_dim: int = 64,
        kv_lora_rank: int = 512,
        v_head_dim: int = 128,
        qk_nope_head_dim: int = 128,
        qk_head_dim: int | None = 192,
        window_size: int | None = None,
        rope_theta: float | None = 10000.0,
        max_position_embeddings: int | None = None,
        rope_scaling: dict | None = None,
        layer_idx: int | None = None,
        latent_norm_eps: float = 1e-5,
    ):
        super().__init__()
        name = "MultiheadLatentAttention"
        if qk_head_dim is None:
            qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
        if qk_head_dim != qk_nope_head_dim + qk_rope_head_dim:
            raise ValueError(
                f"{name}: qk_head_dim is {qk_head_dim}; expected qk_nope_head_dim + "
                f"qk_rope_head_dim = {qk_nope_head_dim + qk_rope_head_dim}"
            )
        if rope_scaling is not None:
            raise ValueError(f"{name}: rope_scaling is not supported; leave it None")
        self.num_heads, self.window_size, self.layer_idx = num_heads, window_size, layer_idx
        self.max_position_embeddings = max_position_embeddings
        self.parts = [qk_nope_head_dim, qk_rope_head_dim]
        self.kv_lora_rank, self.v_head_dim = kv_lora_rank, v_head_dim
        self.scale = qk_head_dim**-0.5
        width = num_heads * qk_head_dim
        self.q_proj: nn.Module = nn.Linear(hidden_size, q_lora_rank or width, bias=False)
        if q_lora_rank is not None:
            norm = RMSNorm(q_lora_rank, eps=latent_norm_eps)
            self.q_proj = nn.Sequential(
                self.q_proj, norm, nn.Linear(q_lora_rank, width, bias=False)
            )
        self.k_rope = nn.Linear(hidden_size, qk_rope_head_dim, bias=False)
        self.kv_proj = nn.Sequential(
            nn.Linear(hidden_size, kv_lora_rank, bias=False),
            RMSNorm(kv_lora_rank, eps=latent_norm_eps),
            nn.Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False),
        )
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=False)
        self.rotary = None if rope_theta is None else RotaryEmbedding(qk_rope_head_dim, rope_theta)

    def fused(self) -> dict[str, list[int]]:
        """Each head's key and value."""
        return {"kv_proj.2": [self.parts[0], self.v_head_dim] * self.num_heads}

    def mix(self, x: Tensor, layout: SequenceLayout, cache, handed) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1))
        latent = self.kv_proj[1](self.kv_proj[0](x)).unsqueeze(-2)
        turned = self.k_rope(x).unsqueeze(-2)
        if self.rotary is not None:
            plain, q = q.split(self.parts, -1)
            q, turned = self.rotary(q, turned, positions=layout.positions(x.device))
            q = torch.cat([plain, q], -1)
        latent = torch.cat([latent, turned], -1)
        if cache is None:
            o = self._sequences(*self._expanded(q, latent), layout)[..., : self.v_head_dim]
            return self.o_proj(o.flatten(-2))
        q = layout.unpack(q)
        latent, _, where = self._remember(latent, latent[..., :0], layout, cache)
        if q.shape[1] == latent.shape[1]:
            o = self._look(*self._expanded(q, latent), where)[..., : self.v_head_dim]
        else:
            o = self._absorbed(q, latent, where)
        return self.o_proj(layout.pack(o).flatten(-2))

    def _expanded(self, q: Tensor, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[B, T, H, qk_head_dim]`; v is filled up with zeros, since fused attention wants
        one width.
        """
        latent, turned = latent.split([self.kv_lora_rank, self.parts[1]], -1)
        kv = self.kv_proj[2](latent.squeeze(-2)).unflatten(-1, (self.num_heads, -1))
        k, v = kv.split([self.parts[0], self.v_head_dim], -1)
        k = torch.cat([k, turned.expand(-1, -1, self.num_heads, -1)], -1)
        return q, k, nn.functional.pad(v, (0, max(0, q.shape[-1] - v.shape[-1])))

    def _absorbed(self, q: Tensor, latent: Tensor, where: Where | None) -> Tensor:
        """o `[B, T, H, v_head_dim]` without a key or value per head."""
        weight = weight_of(self.kv_proj[2], self.kv_lora_rank, latent)
        weight = weight.unflatten(0, (self.num_heads, -1))
        up_k, up_v = weight.split([self.parts[0], self.v_head_dim], 1)
        plain, turned = q.split(self.parts, -1)
        q = torch.cat([torch.einsum("bthn,hnc->bthc", plain, up_k), turned], -1)
        o = self._look(q, latent, latent, where)[..., : self.kv_lora_rank]
        return torch.einsum("bthc,hvc->bthv", o, up_v)
