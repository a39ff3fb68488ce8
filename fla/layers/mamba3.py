# SPDX-License-Identifier: MIT
"""Mamba-3: Lahoti et al. (2026), arXiv:2603.15569."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.layers.mixer import Context, RecurrentMixer, State, multiple, register
from fla.modules import RMSNorm
from fla.modules.layernorm_gated import RMSNormGated
from fla.ops.mamba3 import chunk_mamba3, fused_recurrent_mamba3


class Mamba3(RecurrentMixer):
    """Mamba-3 between projections, on `[B, T, hidden_size]`; no convolution.

        z, x, B, C, dt, A, l, w = W_in x        B, C <- rms_norm(B), rms_norm(C), plus a bias
        A <- -max(softplus(A), A_floor)         w <- pi tanh(w)
        o = W_out (mamba3(x, softplus(dt + dt_bias), A, B, C, sigmoid(l), w, D) * silu(z))

    `rope_fraction` of the state's components turn. `is_outproj_norm` puts a gated RMSNorm before
    W_out. `chunk_size` is kept for published configs, as in `Mamba2`. With `is_mimo` x, z and what
    is read have M = `mimo_rank` scaled copies, and B and C M heads' worth of channels:

        x_m = x * mimo_x_m        y_m = mamba3(x, ...)_m * silu(z * mimo_z_m)
        o = W_out sum_m y_m * mimo_o_m        with is_outproj_norm norm_m instead of silu

    Example:
        >>> Mamba3(hidden_size=64, head_dim=32, state_size=16)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    mode = "chunk"
    dt_bias: Tensor
    B_bias: Tensor
    C_bias: Tensor
    D: Tensor
    mimo_x: Tensor
    mimo_z: Tensor
    mimo_o: Tensor

    def __init__(
        self,
        hidden_size: int = 2048,
        state_size: int = 128,
        expand: int = 2,
        head_dim: int = 64,
        n_groups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        chunk_size: int = 64,
        use_bias: bool = False,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.rank = mimo_rank if is_mimo else 1
        self.is_mimo = is_mimo
        if rope_fraction not in (0.5, 1.0):
            raise ValueError(f"Mamba3: rope_fraction is {rope_fraction}; expected 0.5 or 1.0")
        width = expand * hidden_size
        self.num_heads = multiple("Mamba3", "expand * hidden_size", width, "head_dim", head_dim)
        multiple("Mamba3", "num_heads", self.num_heads, "n_groups", n_groups)
        self.layer_idx, self.head_dim, self.n_groups = layer_idx, head_dim, n_groups
        self.state_size, self.A_floor = state_size, A_floor
        self.steps = (dt_min, dt_max, dt_init_floor)
        self.num_angles = int(state_size * rope_fraction) // 2
        states = n_groups * state_size * self.rank
        self.sizes = [width, width, states, states, *[self.num_heads] * 3, self.num_angles]
        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=use_bias)
        register(self)
        self.B_norm, self.C_norm = (RMSNorm(state_size, eps=norm_eps) for _ in range(2))
        self.norm = None
        if is_outproj_norm:
            self.norm = RMSNormGated(width, norm_eps, head_dim, norm_before_gate=True)
        self.out_proj = nn.Linear(width, hidden_size, bias=use_bias)
        self.to(device, dtype)

    def fused(self) -> dict[str, list[int]]:
        return {"in_proj": [n for n in self.sizes if n]}

    def initial_values(self) -> dict[str, Tensor]:
        """Steps log-uniform between dt_min and dt_max; biases and D are 1; MIMO starts as copies
        whose sum is one head.
        """
        low, high, floor = self.steps
        heads = self.num_heads
        dt = torch.empty(heads).uniform_(math.log(low), math.log(high)).exp().clamp_min(floor)
        values = {
            "dt_bias": dt + torch.log(-torch.expm1(-dt)),
            "B_bias": torch.ones(heads, self.rank, self.state_size),
            "C_bias": torch.ones(heads, self.rank, self.state_size),
            "D": torch.ones(heads),
        }
        if self.is_mimo:
            copies = torch.ones(heads, self.rank, self.head_dim)
            values |= {"mimo_x": copies / self.rank, "mimo_z": copies.clone()}
            values["mimo_o"] = copies / self.rank
        return values

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        z, u, B, C, dt, A, trap, angles = self.in_proj(x).split(self.sizes, -1)
        u, z = (y.unflatten(-1, (self.num_heads, self.head_dim)) for y in (u, z))
        B, C = (
            norm(y.unflatten(-1, (self.n_groups, self.rank, -1))).repeat_interleave(
                self.num_heads // self.n_groups, 2
            )
            + bias
            for y, norm, bias in ((B, self.B_norm, self.B_bias), (C, self.C_norm, self.C_bias))
        )
        if self.is_mimo:
            u, z = u.unsqueeze(3) * self.mimo_x, z.unsqueeze(3) * self.mimo_z
        else:
            B, C = B.squeeze(3), C.squeeze(3)
        turn = (
            (math.pi * promote_to_fp32(angles).tanh())
            .unsqueeze(2)
            .expand(-1, -1, self.num_heads, -1)
        )
        rule = fused_recurrent_mamba3 if x.shape[1] == 1 else chunk_mamba3
        y, state = rule(
            u,
            F.softplus(promote_to_fp32(dt) + promote_to_fp32(self.dt_bias)),
            -F.softplus(promote_to_fp32(A)).clamp_min(self.A_floor),
            B,
            C,
            trap.sigmoid(),
            turn,
            self.D,
            **context.sequences,
        )
        if self.norm is None:
            y = y * F.silu(z)
        elif self.is_mimo:
            y, z = (part.transpose(2, 3).flatten(-2) for part in (y, z))
            y = self.norm(y, z).unflatten(-1, (self.num_heads, -1)).transpose(2, 3)
        else:
            y = self.norm(y.flatten(-2), z.flatten(-2)).unflatten(-1, (self.num_heads, -1))
        y = (y * self.mimo_o).sum(3) if self.is_mimo else y
        return self.out_proj(y.flatten(-2)), context.after(state)
