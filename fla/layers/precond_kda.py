# SPDX-License-Identifier: MIT
"""Preconditioned Kimi delta attention as a layer: Tumma et al. (2026), arXiv:2604.21100; see
`fla.ops.precond_kda`.
"""

from typing import Any

import torch.nn as nn
from torch import Tensor

from fla.layers.kda import ChannelGated
from fla.layers.mixer import Context, State, repeat_heads
from fla.layers.precond_gated_deltanet import preconditioner_values
from fla.ops.engine.recurrence.gates import softplus_gate
from fla.ops.precond_kda import chunk_precond_kda, fused_recurrent_precond_kda


class PrecondKDA(ChannelGated):
    """KDA writing with a preconditioned key, on `[B, T, hidden_size]`: beside what
    `KimiDeltaAttention` has,

        beta' = sigmoid(W_b' x)        h = -exp(A_log_atk) softplus(W_a x + dt_bias_atk)

    for the running second moment of the keys; `squash_x`, `squash_eps` and the learnt
    `log_atk_scale` are the operator's x, eps and c.

    Example:
        >>> import torch
        >>> layer = PrecondKDA(hidden_size=64, head_dim=16, num_heads=2)
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    A_log_atk: Tensor
    dt_bias_atk: Tensor
    log_atk_scale: Tensor

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        safe_gate: bool = False,
        lower_bound: float | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        squash_x: float = 1.5,
        squash_eps: float = 1e-6,
        log_atk_scale_init: float = -0.2,
        a_log_init_lower: float = 1,
    ):
        self.log_atk_scale_init, self.a_log_init_lower = log_atk_scale_init, a_log_init_lower
        super().__init__(
            hidden_size,
            expand_v,
            head_dim,
            num_heads,
            num_v_heads,
            mode,
            use_short_conv,
            allow_neg_eigval,
            conv_size,
            conv_bias,
            layer_idx,
            norm_eps,
        )
        if safe_gate and lower_bound is None:
            raise ValueError("PrecondKDA: safe_gate needs lower_bound; pass it")
        self.lower_bound = lower_bound
        self.squash: dict[str, Any] = dict(x=squash_x, eps=squash_eps)
        self.a_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.b_atk_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)

    def initial_values(self) -> dict[str, Tensor]:
        return super().initial_values() | preconditioner_values(
            self.num_v_heads, self.log_atk_scale_init, self.a_log_init_lower
        )

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        q, k, v, g, conv = self.heads(x, context)
        S, A = (None, None) if context.recurrent is None else context.recurrent
        beta = self.b_proj(x).sigmoid() * (2 if self.allow_neg_eigval else 1)  # of key heads
        (beta,) = repeat_heads(self.num_v_heads, self.num_heads, beta)
        rule = fused_recurrent_precond_kda if self.token_by_token(x) else chunk_precond_kda
        o, *states = rule(
            q,
            k,
            v,
            g,
            softplus_gate(self.a_proj(x), self.A_log_atk, self.dt_bias_atk),
            self.b_atk_proj(x).sigmoid(),
            beta,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            use_gate_in_kernel=True,
            lower_bound=self.lower_bound,
            log_atk_scale=self.log_atk_scale,
            initial_A_state=A,
            **self.squash,
            **context.sequences | {"initial_state": S},
        )
        return self.finish(o, x), context.after(tuple(states), conv)
