# SPDX-License-Identifier: MIT
"""Comba: Hu et al. (2025), arXiv:2506.02475."""

import torch
import torch.nn as nn
from torch import Tensor

from fla.layers.gated_deltanet import GatedDeltaNet
from fla.layers.mixer import Context, State
from fla.modules.l2norm import l2norm
from fla.ops.comba import chunk_comba, fused_recurrent_comba
from fla.ops.engine.recurrence.gates import softplus_gate


class Comba(GatedDeltaNet):
    """Comba between projections, on `[B, T, hidden_size]`.

        q, k, v = silu(conv(W x))        p = sigmoid(decay) k        q <- q - D p
        beta = sigmoid(W_b x)            g = -exp(A_log) softplus(W_a x + dt_bias)
        o = W_o (rms_norm(comba(q/|q|, k/|k|, v, p/|p|, g, beta)) * sigmoid(W_g x))

    As in published code p is normalised too, so the rate sigmoid(decay) acts on q - D p alone.
    `normalize_feedback=False` is the paper's way: p/|k|, which keeps the rate.
    `use_inner_decay=False` leaves the rate out, `use_output_correction=False` the D, which starts
    at `correction_factor`.

    Example:
        >>> Comba(hidden_size=64, head_dim=16, num_heads=2)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_short_conv: bool = True,
        use_output_gate: bool = True,
        use_output_correction: bool = True,
        use_inner_decay: bool = True,
        correction_factor: float = 1.0,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        normalize_feedback: bool = True,
    ):
        super().__init__(
            hidden_size,
            expand_v,
            head_dim,
            num_heads,
            num_v_heads,
            mode,
            use_output_gate,
            use_short_conv,
            False,
            conv_size,
            conv_bias,
            layer_idx,
            norm_eps,
            output_gate_activation="sigmoid",
        )
        self.use_inner_decay, self.use_output_correction = use_inner_decay, use_output_correction
        self.correction_factor, self.normalize_feedback = correction_factor, normalize_feedback
        if use_inner_decay:
            self.decay = nn.Parameter(torch.ones(num_heads))
        if use_output_correction:
            self.D = nn.Parameter(torch.full((num_heads,), correction_factor))

    def initial_values(self) -> dict[str, Tensor]:
        values = super().initial_values()
        if getattr(self, "use_inner_decay", False):
            values["decay"] = torch.ones(self.num_heads)
        if getattr(self, "use_output_correction", False):
            values["D"] = torch.full((self.num_heads,), self.correction_factor)
        return values

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        q, k, v, conv = self.heads(x, context)
        rate = self.decay.sigmoid().unsqueeze(-1) if self.use_inner_decay else 1.0
        p = rate * k
        if self.use_output_correction:
            q = q - self.D.unsqueeze(-1) * p
        q, k = l2norm(q), l2norm(k)
        p = l2norm(p) if self.normalize_feedback else rate * k
        rule = fused_recurrent_comba if self.token_by_token(x) else chunk_comba
        o, state = rule(
            q=q.to(v.dtype),
            k=k,
            v=v,
            p=p.to(v.dtype),
            g=softplus_gate(self.a_proj(x), self.A_log, self.dt_bias),
            beta=self.b_proj(x).sigmoid(),
            **context.sequences,
        )
        return self.finish(o, x), context.after(state, conv)
