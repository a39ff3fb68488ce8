# SPDX-License-Identifier: MIT
"""Mamba-2: Dao, Gu (2024), arXiv:2405.21060."""

import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.layers.mixer import (
    Context,
    RecurrentMixer,
    State,
    check_convolution,
    multiple,
    register,
)
from fla.modules import ShortConvolution
from fla.modules.layernorm_gated import RMSNormGated
from fla.ops.mamba2 import NO_LIMIT, chunk_mamba2, fused_recurrent_mamba2


class Mamba2(RecurrentMixer):
    """SSD between projections, on `[B, T, hidden_size]`.

        z, xBC, dt = W_in x        x, B, C = silu(conv(xBC))
        o = W_out rms_norm(mamba2(x, softplus(dt + dt_bias), -exp(A_log), B, C, D), z)

    The norm gates with silu(z), after or (`norm_before_gate`) before it; `rmsnorm=False` only
    gates. num_heads defaults to expand * hidden_size / head_dim. `chunk_size` is kept for published
    configs: the operator's own chunks are faster here, and the numbers are the same. `backend`
    names the published kernel of the convolution ("cuda" or "triton"); here the device chooses.

    Example:
        >>> Mamba2(hidden_size=64, head_dim=32, state_size=16)(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    mode = "chunk"
    A_log: Tensor
    dt_bias: Tensor
    D: Tensor

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
        use_conv_bias: bool = True,
        hidden_act: str = "silu",
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = NO_LIMIT,
        use_bias: bool = False,
        norm_eps: float = 1e-5,
        chunk_size: int = 256,
        layer_idx: int | None = None,
        backend: str = "cuda",
    ):
        super().__init__()
        name, width = type(self).__name__, expand * hidden_size
        check_convolution(name, backend)
        if hidden_act not in ("silu", "swish"):
            raise ValueError(f"{name}: hidden_act is {hidden_act!r}; expected 'silu'")
        heads = multiple(name, "expand * hidden_size", width, "head_dim", head_dim)
        heads = heads if num_heads is None else num_heads
        multiple(name, "num_heads", heads, "n_groups", n_groups)
        self.layer_idx, self.num_heads, self.head_dim = layer_idx, heads, head_dim
        self.state_size, self.n_groups = state_size, n_groups
        self.dt_limit, self.D_has_hdim = (float(dt_limit[0]), float(dt_limit[1])), D_has_hdim
        self.ranges = (A_init_range, (dt_min, dt_max, dt_init_floor), conv_init)
        self.sizes = [width, width + 2 * n_groups * state_size, heads, *self.extra_sizes()]
        self.check_width()
        self.conv1d = ShortConvolution(self.sizes[1], conv_kernel, bias=use_conv_bias)
        self.in_proj = nn.Linear(hidden_size, sum(self.sizes), bias=use_bias)
        register(self)
        self.norm = None
        if rmsnorm:
            self.norm = RMSNormGated(
                width, norm_eps, width // n_groups, norm_before_gate=norm_before_gate
            )
        self.out_proj = nn.Linear(width, hidden_size, bias=use_bias)

    def check_width(self) -> None:
        """`ValueError` unless the heads fill the width."""
        heads = self.sizes[0] // self.head_dim
        if self.num_heads != heads:
            raise ValueError(
                f"{type(self).__name__}: num_heads is {self.num_heads}; expand * hidden_size / "
                f"head_dim = {heads} was expected"
            )

    def extra_sizes(self) -> list[int]:
        """Widths that the projection has beyond Mamba-2's."""
        return []

    def fused(self) -> dict[str, list[int]]:
        """z, u, B, C, and what is per head."""
        states = (self.sizes[1] - self.sizes[0]) // 2
        return {"in_proj": [self.sizes[0], self.sizes[0], states, states, *self.sizes[2:]]}

    def initial_values(self) -> dict[str, Tensor]:
        """A uniform in A_init_range, steps log-uniform between dt_min and dt_max, and with
        `conv_init` the convolution's taps uniform between its negative and it.
        """
        A, (low, high, floor), spread = self.ranges
        heads = self.num_heads
        dt = torch.empty(heads).uniform_(math.log(low), math.log(high)).exp().clamp_min(floor)
        values = {
            "A_log": torch.empty(heads).uniform_(*A).log(),
            "dt_bias": dt + torch.log(-torch.expm1(-dt)),
            "D": torch.ones(heads, self.head_dim) if self.D_has_hdim else torch.ones(heads),
        }
        if spread is not None:
            taps = torch.empty(self.conv1d.weight.shape)
            values["conv1d.weight"] = taps.uniform_(-spread, spread)
        return values

    def split(self, x: Tensor, context: Context) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """([z, x, B, C, dt, ...], new conv states): x `[B, T, H, V]`, B, C `[B, T, G, K]`."""
        z, xBC, *rest = self.in_proj(x).split(self.sizes, -1)
        xBC, conv = context.convolve(self.conv1d, xBC)
        states = self.n_groups * self.state_size
        u, B, C = xBC.split([self.sizes[0], states, states], -1)
        u = u.unflatten(-1, (self.num_heads, self.head_dim))
        B, C = (y.unflatten(-1, (self.n_groups, self.state_size)) for y in (B, C))
        return [z, u, B, C, *rest], (conv,)

    def finish(self, y: Tensor, z: Tensor) -> Tensor:
        """Gated norm and output projection."""
        y = y.flatten(-2)
        y = y * nn.functional.silu(z) if self.norm is None else self.norm(y, z)
        return self.out_proj(y)

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        (z, u, B, C, dt), conv = self.split(x, context)
        token = x.shape[1] == 1
        rule: Any = fused_recurrent_mamba2 if token else chunk_mamba2
        y, state = rule(
            u,
            dt,
            -promote_to_fp32(self.A_log).exp(),
            B,
            C,
            self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            **context.sequences,
        )
        return self.finish(y, z), context.after(state, conv)
