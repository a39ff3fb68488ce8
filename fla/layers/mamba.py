# SPDX-License-Identifier: MIT
"""Mamba: Gu, Dao (2023), arXiv:2312.00752."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.layers.mixer import Context, RecurrentMixer, State, check_convolution
from fla.modules import ShortConvolution
from fla.modules.linear import is_plain
from fla.ops.mamba import chunk_mamba, fused_recurrent_mamba


class Mamba(RecurrentMixer):
    """The selective scan between projections, on `[B, T, hidden_size]`.

        u, z = W_in x        u <- silu(conv(u))        dt, B, C = W_x u
        o = W_out (mamba(u, softplus(W_dt dt + c), -exp(A_log), B, C, D) * silu(z))

    `dt_rank` "auto" is hidden_size / 16, rounded up. `backend` names the published kernel of the
    convolution ("cuda" or "triton") and changes nothing: the device chooses.

    Example:
        >>> Mamba(hidden_size=64, intermediate_size=128)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    mode = "chunk"
    A_log: Tensor
    D: Tensor

    def __init__(
        self,
        hidden_size: int = 2048,
        state_size: int = 16,
        conv_kernel: int = 4,
        use_conv_bias: bool = True,
        intermediate_size: int = 2048,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        use_bias: bool = False,
        hidden_act: str = "silu",
        layer_idx: int | None = None,
        backend: str = "cuda",
    ):
        super().__init__()
        check_convolution("Mamba", backend)
        if hidden_act not in ("silu", "swish"):
            raise ValueError(f"Mamba: hidden_act is {hidden_act!r}; expected 'silu'")
        if dt_init not in ("random", "constant"):
            raise ValueError(f"Mamba: dt_init is {dt_init!r}; expected 'random' or 'constant'")
        if isinstance(dt_rank, str) and dt_rank != "auto":
            raise ValueError(f"Mamba: dt_rank is {dt_rank!r}; expected a whole number or 'auto'")
        rank = math.ceil(hidden_size / 16) if dt_rank == "auto" else int(dt_rank)
        self.layer_idx, self.state_size, self.rank = layer_idx, state_size, rank
        self.dt = (dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        width = intermediate_size
        self.conv1d = ShortConvolution(width, conv_kernel, bias=use_conv_bias)
        self.in_proj = nn.Linear(hidden_size, 2 * width, bias=use_bias)
        self.x_proj = nn.Linear(width, rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(rank, width, bias=True)
        self.out_proj = nn.Linear(width, hidden_size, bias=use_bias)
        self.A_log = nn.Parameter(torch.empty(width, state_size))
        self.D = nn.Parameter(torch.empty(width))
        with torch.no_grad():
            for name, value in self.initial_values().items():
                self.get_parameter(name).copy_(value)

    def fused(self) -> dict[str, list[int]]:
        """The convolved half, and its gate."""
        width = self.conv1d.hidden_size
        return {"in_proj": [width, width]}

    def initial_values(self) -> dict[str, Tensor]:
        """A = -1 .. -N in every channel; steps log-uniform between dt_min and dt_max."""
        width, N = self.conv1d.hidden_size, self.state_size
        low, high, how, scale, floor = self.dt
        dt = torch.empty(width).uniform_(math.log(low), math.log(high)).exp().clamp_min(floor)
        bound = self.rank**-0.5 * scale
        weight = torch.empty(width, self.rank)
        weight = weight.uniform_(-bound, bound) if how == "random" else weight.fill_(bound)
        return {
            "A_log": torch.arange(1.0, N + 1).log().repeat(width, 1),
            "D": torch.ones(width),
            "dt_proj.bias": dt + torch.log(-torch.expm1(-dt)),
            "dt_proj.weight": weight,
        }

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        u, z = self.in_proj(x).chunk(2, -1)
        u, conv = context.convolve(self.conv1d, u)
        dt, B, C = self.x_proj(u).split([self.rank, self.state_size, self.state_size], -1)
        rule = fused_recurrent_mamba if x.shape[1] == 1 else chunk_mamba
        plain = is_plain(self.dt_proj)  # the scan then adds the bias, in fp32
        y, state = rule(
            u,
            F.linear(dt, self.dt_proj.weight) if plain else self.dt_proj(dt),
            -promote_to_fp32(self.A_log).exp(),
            B,
            C,
            self.D,
            dt_bias=self.dt_proj.bias if plain else None,
            dt_softplus=True,
            **context.sequences,
        )
        return self.out_proj(y * F.silu(z)), context.after(state, (conv,))
