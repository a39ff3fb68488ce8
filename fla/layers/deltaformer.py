# SPDX-License-Identifier: MIT
"""DeltaFormer: Zhong et al. (2025), arXiv:2505.19488."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fla.layers.mixer import Context, RecurrentMixer, State, multiple, repeat_heads
from fla.modules import RMSNorm, RotaryEmbedding
from fla.ops.deltaformer import deltaformer_attn


class DeltaFormerAttention(RecurrentMixer):
    """DeltaFormer between projections, on `[B, T, hidden_size]`.

        q, k = rotary(W x)        v = W_v x        beta = W_b x + c
        o = W_o deltaformer(q, k, v, beta)

    beta is not bounded, as in published code. The state is the keys and u of all tokens so far, the
    tokens of a row at its end, and their number per row.

    Example:
        >>> DeltaFormerAttention(hidden_size=64, num_heads=2)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    mode = "chunk"

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 32,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        rope_theta: float = 10000.0,
        max_position_embeddings: int | None = None,
        layer_idx: int | None = None,
    ):
        super().__init__()
        name = "DeltaFormerAttention"
        self.layer_idx, self.num_heads = layer_idx, num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = multiple(name, "hidden_size", hidden_size, "num_heads", num_heads)
        multiple(name, "num_heads", num_heads, "num_kv_heads", self.num_kv_heads)
        self.max_position_embeddings = max_position_embeddings
        kv_dim = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_dim, bias=qkv_bias)
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=True)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        self.rotary = RotaryEmbedding(self.head_dim, base=rope_theta)

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotary(q, k, positions=context.layout.positions(x.device))
        k, v = repeat_heads(self.num_heads, self.num_kv_heads, k, v)
        beta = self.b_proj(x)
        if not context.keep and context.state is None:
            o: Any = deltaformer_attn(q, k, v, beta, cu_seqlens=context.cu_seqlens)
            return self.o_proj(o.flatten(-2)), None
        o, state = self._continue(q, k, v, beta, context)
        return self.o_proj(o.flatten(-2)), context.after(state)

    def _continue(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, context: Context
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """(o, state) from the state's tokens; rows of different lengths go one by one."""
        lengths = context.layout.lengths()
        N = len(lengths)
        old = context.recurrent
        past = [0] * N if old is None else old[2].tolist()
        if context.cu_seqlens is None and len(set(past)) == 1:
            state = None if old is None or not past[0] else (old[0], old[1])
            o, (keys, us) = deltaformer_attn(
                q, k, v, beta, initial_state=state, output_final_state=True
            )
            return o, (keys, us, torch.full((N,), keys.shape[1], device=q.device))
        if context.cu_seqlens is None:
            rows: Any = [[y[i : i + 1] for y in (q, k, v, beta)] for i in range(N)]
        else:
            parts = zip(*(y.split(lengths, 1) for y in (q, k, v, beta)), strict=True)
            rows = [list(part) for part in parts]
        outs, finals = [], []
        for i, (q_i, k_i, v_i, beta_i) in enumerate(rows):
            state = None
            if past[i]:
                state = tuple(y[i : i + 1, y.shape[1] - past[i] :] for y in old[:2])
            o, final = deltaformer_attn(
                q_i, k_i, v_i, beta_i, initial_state=state, output_final_state=True
            )
            outs.append(o)
            finals.append(final)
        longest = max(keys.shape[1] for keys, _ in finals)
        pad = nn.functional.pad
        keys, us = (
            torch.cat([pad(y, (0, 0, 0, 0, longest - y.shape[1], 0)) for y in column])
            for column in zip(*finals, strict=True)
        )
        total = torch.tensor([y.shape[1] for y, _ in finals], device=q.device)
        return torch.cat(outs, 0 if context.cu_seqlens is None else 1), (keys, us, total)
