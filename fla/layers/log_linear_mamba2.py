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
from fla.ops.mamba2 import NO_LIMIT, step_sizes

LEVELS = 15  # as in published models: sequences of up to 2^14 tokens


class LogLinearMamba2(Mamba2):
    """Mamba-2 with a weight for every power of two of the distance, on `[B, T, hidden_size]`:
    beside what `Mamba2` projects, dl of 15 levels per head, and

        lambda = softplus(L * dl)        o = W_out rms_norm(log_linear(C, B, dt x, dt A, lambda), z)

    As in published code there is a bias in the projections and none in the convolution by default,
    and a number of heads that does not fill the width is refused when the layer is called.

    Longer than 2^14 tokens there are no levels, and the operator says so.

    Example:
        >>> layer = LogLinearMamba2(hidden_size=64, head_dim=32, state_size=16)
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    L: Tensor

    def __init__(
        self,
        num_heads: int | None = None,
        head_dim: int = 64,
        hidden_size: int = 2048,
        state_size: int = 128,
        expand: int = 2,
        n_groups: int = 1,
        conv_kernel: int = 4,
        conv_init: float | None = None,
        use_conv_bias: bool = False,
        hidden_act: str = "silu",
        rmsnorm: bool = True,
        D_has_hdim: bool = False,
        norm_before_gate: bool = False,
        chunk_size: int = 64,
        dt_limit: tuple[float, float] = NO_LIMIT,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        use_bias: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        backend: str = "cuda",
        A_init_range: tuple[float, float] = (1, 16),
    ):
        super().__init__(
            num_heads,
            head_dim,
            hidden_size,
            state_size,
            expand,
            n_groups,
            conv_kernel,
            conv_init,
            use_conv_bias,
            hidden_act,
            A_init_range,
            D_has_hdim,
            rmsnorm,
            norm_before_gate,
            dt_min,
            dt_max,
            dt_init_floor,
            dt_limit,
            use_bias,
            norm_eps,
            chunk_size,
            layer_idx,
            backend,
        )

    def check_width(self) -> None:
        """At a call, not here."""

    def extra_sizes(self) -> list[int]:
        return [self.num_heads * LEVELS]

    def initial_values(self) -> dict[str, Tensor]:
        return super().initial_values() | {"L": torch.ones(self.num_heads, LEVELS)}

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        super().check_width()
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
