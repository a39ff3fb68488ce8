# SPDX-License-Identifier: MIT
"""The preconditioned gated delta rule as a layer: Tumma et al. (2026), arXiv:2604.21100; see
`fla.ops.precond_gated_delta_rule`.
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fla.layers.gated_deltanet import GatedDeltaNet
from fla.layers.mixer import Context, State, gate_steps
from fla.ops.engine.recurrence.gates import softplus_gate
from fla.ops.precond_gated_delta_rule import (
    chunk_precond_gated_delta_rule,
    fused_recurrent_precond_gated_delta_rule,
)


def preconditioner_values(heads: int, log_atk_scale: float, lower: float) -> dict[str, Tensor]:
    """Fresh A_log_atk with rates in [lower, 16], dt_bias_atk and log_atk_scale, `[heads]`."""
    return {
        "A_log_atk": torch.empty(heads).uniform_(max(lower, 1e-3), 16).log(),
        "dt_bias_atk": gate_steps(heads),
        "log_atk_scale": torch.full((heads,), log_atk_scale),
    }


class PrecondGatedDeltaNet(GatedDeltaNet):
    """Gated DeltaNet writing with a preconditioned key, on `[B, T, hidden_size]`: beside what
    `GatedDeltaNet` has,

        beta' = sigmoid(W_b' x)        h = -exp(A_log_atk) softplus(W_a' x + dt_bias_atk)

    for the running second moment of the keys; `squash_x`, `squash_eps` and the learnt
    `log_atk_scale` are the operator's x, eps and c.

    Example:
        >>> layer = PrecondGatedDeltaNet(hidden_size=64, head_dim=16, num_heads=2)
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    A_log_atk: Tensor
    dt_bias_atk: Tensor
    log_atk_scale: Tensor

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        squash_x: float = 1.5,
        squash_eps: float = 1e-6,
        log_atk_scale_init: float = -0.2,
        a_log_init_lower: float = 0,
    ):
        self.log_atk_scale_init, self.a_log_init_lower = log_atk_scale_init, a_log_init_lower
        super().__init__(
            hidden_size,
            expand_v,
            head_dim,
            num_heads,
            num_v_heads,
            mode,
            use_gate,
            use_short_conv,
            allow_neg_eigval,
            conv_size,
            conv_bias,
            layer_idx,
            norm_eps,
        )
        self.squash: dict[str, Any] = dict(x=squash_x, eps=squash_eps)
        # keys are preconditioned, so what does it is of key heads
        self.a_atk_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.b_atk_proj = nn.Linear(hidden_size, num_heads, bias=False)

    def initial_values(self) -> dict[str, Tensor]:
        return super().initial_values() | preconditioner_values(
            self.num_heads, self.log_atk_scale_init, self.a_log_init_lower
        )

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        q, k, v, conv = self.heads(x, context)
        S, A = (None, None) if context.recurrent is None else context.recurrent
        token = self.token_by_token(x)
        rule = fused_recurrent_precond_gated_delta_rule if token else chunk_precond_gated_delta_rule
        o, *states = rule(
            q=q,
            k=k,
            v=v,
            g=softplus_gate(self.a_proj(x), self.A_log, self.dt_bias),
            beta=self.beta(self.b_proj(x)),
            g_atk=softplus_gate(self.a_atk_proj(x), self.A_log_atk, self.dt_bias_atk),
            beta_atk=self.b_atk_proj(x).sigmoid(),
            log_atk_scale=self.log_atk_scale,
            initial_A_state=A,
            **self.squash,
            **context.sequences | {"initial_state": S},
        )
        return self.finish(o, x), context.after(tuple(states), conv)
