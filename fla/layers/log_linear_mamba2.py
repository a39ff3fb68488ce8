# SPDX-License-Identifier: MIT
"""Log-linear Mamba-2: Guo et al. (2025), arXiv:2506.04761."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.layers.mamba2 import Mamba2
from fla.layers.mixer import Context, State
from fla.ops.log_linear_attn import (
    LogLinearAttentionState,
    chunk_log_linear_attn,
    fused_recurrent_log_linear_attn,
)
from fla.ops.mamba2 import step_sizes

LEVELS = 15  # as in published models: sequences of up to 2^14 tokens


class LogLinearMamba2(Mamba2):
    """Mamba-2 with a weight for every power of two of the distance, on `[B, T, hidden_size]`:
    beside what `Mamba2` projects, dl of 15 levels per head, and

        lambda = softplus(L * dl)        o = W_out rms_norm(log_linear(C, B, dt x, dt A, lambda), z)

    Longer than 2^14 tokens there are no levels, and the operator says so.

    Example:
        >>> layer = LogLinearMamba2(hidden_size=64, head_dim=32, state_size=16)
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    L: Tensor

    def extra_sizes(self) -> list[int]:
        return [self.num_heads * LEVELS]

    def initial_values(self) -> dict[str, Tensor]:
        return super().initial_values() | {"L": torch.ones(self.num_heads, LEVELS)}

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        (z, u, B, C, dt, dl), conv = self.split(x, context)
        dt = step_sizes(dt, self.dt_bias, True, self.dt_limit)
        scales = F.softplus(
            promote_to_fp32(self.L) * promote_to_fp32(dl).unflatten(-1, (self.num_heads, LEVELS))
        )
        states = context.recurrent
        token = x.shape[1] == 1
        rule = fused_recurrent_log_linear_attn if token else chunk_log_linear_attn
        y, state = rule(
            promote_to_fp32(C),
            promote_to_fp32(B),
            dt.unsqueeze(-1) * promote_to_fp32(u),
            -dt * promote_to_fp32(self.A_log).exp(),
            scales,
            initial_state=None if states is None else LogLinearAttentionState(*states),
            output_final_state=context.keep,
            cu_seqlens=context.cu_seqlens,
        )
        D = self.D if self.D_has_hdim else self.D.unsqueeze(-1)
        y = (y + D * promote_to_fp32(u)).to(u.dtype)
        return self.finish(y, z), context.after(state, conv)
