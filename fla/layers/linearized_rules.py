# SPDX-License-Identifier: MIT
"""The recurrences of `LinearizedAttention`, each with its gates: the rules of the layers of the
same names, on q, k, v of a softmax attention.

Gates start without depending on the input: `calibrate` sets them so that a head forgets half in a
given number of tokens, and writes with a given rate.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.core.precision import promote_to_fp32
from fla.layers.mixer import Context
from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
from fla.ops.engine.recurrence.gates import l2norm
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from fla.ops.gla import chunk_gla, fused_recurrent_gla
from fla.ops.gsa import chunk_gsa, fused_recurrent_gsa
from fla.ops.kda import chunk_kda, fused_recurrent_kda
from fla.ops.rwkv7 import chunk_rwkv7, fused_recurrent_rwkv7
from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

HALF_LIFE, RATE = 32.0, 0.5  # tokens; at the start
RANK = 32  # the rank of gates per channel


class Decay(nn.Module):
    """`g = -exp(A_log) softplus(W x + dt_bias)`, per head or per channel (W then of low rank)."""

    def __init__(self, hidden_size: int, heads: int, channels: int = 0):
        super().__init__()
        self.heads, self.channels = heads, channels
        outputs = heads * max(1, channels)
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.zeros(outputs))
        if channels:
            self.down = nn.Linear(hidden_size, min(RANK, hidden_size), bias=False)
        rank = self.down.out_features if channels else hidden_size
        self.proj = nn.Linear(rank, outputs, bias=False)

    def initial_values(self) -> dict[str, Tensor]:
        half = torch.full((self.heads,), HALF_LIFE)
        return {
            "A_log": torch.zeros(self.heads),
            "dt_bias": self.steps(half),
            "proj.weight": torch.zeros(self.proj.weight.shape),
        }

    def steps(self, half_life: Tensor) -> Tensor:
        """dt_bias with which heads forget half in `half_life` tokens; steps from 1e-3 to 5."""
        step = (math.log(2) / half_life).clamp(1e-3, 5.0)
        bias = step + torch.log(-torch.expm1(-step))
        return bias.repeat_interleave(max(1, self.channels))

    def calibrate(self, half_life: Tensor) -> None:
        self.dt_bias.data.copy_(self.steps(half_life.to(self.dt_bias)))

    def logits(self, x: Tensor) -> Tensor:
        """W x, in fp32: `[B, T, H]` or `[B, T, H * channels]`."""
        return promote_to_fp32(self.proj(self.down(x) if self.channels else x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(g, the softplus), in fp32: `[B, T, H]` or `[B, T, H, channels]`."""
        step, rate = F.softplus(self.logits(x) + self.dt_bias), promote_to_fp32(self.A_log).exp()
        if self.channels:
            step, rate = step.unflatten(-1, (self.heads, -1)), rate.unsqueeze(-1)
        return -rate * step, step


class ConstantDecay(Decay):
    """`Decay` of no input: W is 0."""

    def __init__(self, hidden_size: int, heads: int):
        super().__init__(hidden_size, heads)
        del self.proj

    def initial_values(self) -> dict[str, Tensor]:
        half = torch.full((self.heads,), HALF_LIFE)
        return {"A_log": torch.zeros(self.heads), "dt_bias": self.steps(half)}

    def logits(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:2], self.heads, dtype=torch.float32)


class Rule(nn.Module):
    """`(o, state)` of q, k, v `[B, T, H, d]` and the layer's input x. Subclasses define `run`; the
    decay is per head where `channels` is False.
    """

    channels: ClassVar[bool | None] = False  # None: no decay gate
    rates: ClassVar[bool] = False  # whether there is a beta

    def __init__(self, hidden_size: int, heads: int, head_dim: int, options: Any):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        if self.channels is not None:
            self.decay = Decay(hidden_size, heads, head_dim if self.channels else 0)
        if self.rates:
            self.b_proj = nn.Linear(hidden_size, heads, bias=options.gate_bias)

    def initial_values(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        if self.channels is not None:
            values |= {f"decay.{n}": x for n, x in self.decay.initial_values().items()}
        if self.rates:
            values["b_proj.weight"] = torch.zeros(self.b_proj.weight.shape)
            if self.b_proj.bias is not None:
                values["b_proj.bias"] = torch.zeros(self.heads)
        return values

    def calibrate(self, half_life: Tensor, rate: Tensor) -> None:
        """Set the half-life of every head in tokens, and beta, where the rule has them."""
        if self.channels is not None:
            self.decay.calibrate(half_life)
        if self.rates and self.b_proj.bias is not None:
            self.b_proj.bias.data.copy_(torch.logit(rate.to(self.b_proj.bias), eps=1e-4))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: Context
    ) -> tuple[Tensor, Any]:
        return self.run(q, k, v, x, x.shape[1] == 1, context.sequences)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, token: bool, sequences: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def beta(self, x: Tensor) -> Tensor:
        return promote_to_fp32(self.b_proj(x)).sigmoid()


class GatedDeltaNetRule(Rule):
    rates = True

    def run(self, q, k, v, x, token, sequences):
        form = fused_recurrent_gated_delta_rule if token else chunk_gated_delta_rule
        gates = dict(g=self.decay(x)[0], beta=self.beta(x))
        return form(q, k, v, **gates, use_qk_l2norm_in_kernel=True, **sequences)


class KDARule(Rule):
    channels, rates = True, True

    def run(self, q, k, v, x, token, sequences):
        form = fused_recurrent_kda if token else chunk_kda
        gates = dict(g=self.decay(x)[0], beta=self.beta(x))
        return form(q, k, v, **gates, use_qk_l2norm_in_kernel=True, **sequences)


class DeltaNetRule(Rule):
    channels, rates = None, True

    def run(self, q, k, v, x, token, sequences):
        form = fused_recurrent_delta_rule if token else chunk_delta_rule
        return form(q, k, v, beta=self.beta(x), use_qk_l2norm_in_kernel=True, **sequences)


class GLARule(Rule):
    channels = True

    def run(self, q, k, v, x, token, sequences):
        form = fused_recurrent_gla if token else chunk_gla
        gate = {"gk" if token else "g": self.decay(x)[0]}
        return form(l2norm(q), l2norm(k), v, **gate, **sequences)


class RetNetRule(Rule):
    """The RetNet rule: one constant decay per head."""

    def run(self, q, k, v, x, token, sequences):
        form = fused_recurrent_simple_gla if token else chunk_simple_gla
        return form(l2norm(q), l2norm(k), v, g=self.decay(x)[0], **sequences)

    def __init__(self, hidden_size: int, heads: int, head_dim: int, options: Any):
        super().__init__(hidden_size, heads, head_dim, options)
        self.decay = ConstantDecay(hidden_size, heads)


class Mamba2Rule(Rule):
    """The Mamba-2 rule: one step size scales both the decay and the write."""

    def run(self, q, k, v, x, token, sequences):
        form = fused_recurrent_simple_gla if token else chunk_simple_gla
        g, step = self.decay(x)
        written = (promote_to_fp32(v) * step.unsqueeze(-1)).to(v.dtype)
        return form(l2norm(q), l2norm(k), written, g=g, **sequences)


class RWKV7Rule(Rule):
    """`S <- diag(w) S - kk (kk * a)^T S + k v^T` with kk = k/|k|, a learned rate per channel."""

    channels = True

    def __init__(self, hidden_size: int, heads: int, head_dim: int, options: Any):
        super().__init__(hidden_size, heads, head_dim, options)
        rank = min(RANK, hidden_size)
        self.a_down = nn.Linear(hidden_size, rank, bias=False)
        self.a_proj = nn.Linear(rank, heads * head_dim)

    def initial_values(self) -> dict[str, Tensor]:
        values = {n: torch.zeros(x.shape) for n, x in self.a_proj.named_parameters()}
        return super().initial_values() | {f"a_proj.{n}": x for n, x in values.items()}

    def calibrate(self, half_life: Tensor, rate: Tensor) -> None:
        super().calibrate(half_life, rate)
        logits = torch.logit(rate.to(self.a_proj.bias), eps=1e-4)
        self.a_proj.bias.data.copy_(logits.repeat_interleave(self.head_dim))

    def run(self, q, k, v, x, token, sequences):
        form = fused_recurrent_rwkv7 if token else chunk_rwkv7
        unit = l2norm(k)
        rate = (
            promote_to_fp32(self.a_proj(self.a_down(x))).sigmoid().unflatten(-1, (self.heads, -1))
        )
        b = (promote_to_fp32(unit) * rate).to(unit.dtype)
        return form(l2norm(q), self.decay(x)[0], b, v, -unit, b, scale=1.0, **sequences)


class GSARule(Rule):
    """The GSA rule: keys and values in slots, each with a forget gate."""

    channels = None

    def __init__(self, hidden_size: int, heads: int, head_dim: int, options: Any):
        super().__init__(hidden_size, heads, head_dim, options)
        self.slots = options.slots
        self.f_proj = nn.Linear(hidden_size, heads * self.slots)

    def initial_values(self) -> dict[str, Tensor]:
        """Half-lives of the slots from 2 to 512 tokens."""
        half = torch.logspace(1, 9, self.slots, base=2.0).repeat(self.heads)
        return {"f_proj.bias": torch.logit(torch.exp2(-1 / half))}

    def calibrate(self, half_life: Tensor, rate: Tensor) -> None:
        """Set the slots' half-lives, from an eighth of the head's to eight times it."""
        spread = torch.logspace(-3, 3, self.slots, base=2.0).to(half_life)
        half = (half_life.unsqueeze(-1) * spread).clamp(1.0, 4096.0).flatten()
        self.f_proj.bias.data.copy_(torch.logit(torch.exp2(-1 / half)))

    def run(self, q, k, v, x, token, sequences):
        form = fused_recurrent_gsa if token else chunk_gsa
        g = F.logsigmoid(promote_to_fp32(self.f_proj(x))).unflatten(-1, (self.heads, self.slots))
        s = (1 - g.exp()).to(v.dtype)
        return form(q, k, v, s, g, **sequences)


RULES: dict[str, type[Rule]] = {
    "gated_deltanet": GatedDeltaNetRule,
    "gla": GLARule,
    "kda": KDARule,
    "delta_net": DeltaNetRule,
    "retnet": RetNetRule,
    "mamba2": Mamba2Rule,
    "rwkv7": RWKV7Rule,
    "gsa": GSARule,
}
