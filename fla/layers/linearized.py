# SPDX-License-Identifier: MIT
"""Linear attention in the place of a softmax attention layer, around that layer's own projections.

    q, k, v = the teacher's: W x (+ bias), q/k norm, rotary positions; keys and values of a group
              repeated per head
    o = rule(q/|q|, k/|k|, v; gates of x)              `linearized_rules.py`
    y = W_o (m * norm(o) * act(W_z x + b_z) + (1 - m) * softmax attention within a window)

m is a sigmoid gate per head and token where there is a window, else 1. At the start act is 1 and
gates depend on no input, so the layer begins as the teacher's projections around the bare rule.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla.layers.attn import SoftmaxMixer
from fla.layers.linearized_rules import RULES
from fla.layers.mixer import Context, RecurrentMixer, State, multiple
from fla.modules import FusedRMSNormGated, RMSNorm, RotaryEmbedding, ShortConvolution

GATES = (None, "swish", "sigmoid")
OPEN = {"swish": 1.2784645, "sigmoid": 6.0}  # logits of a gate of 1 (0.998)


@dataclass(frozen=True)
class LinearOptions:
    """How a layer is made linear.

    Fields:
        rule: one of `linearized_rules.RULES`.
        rope, qk_norm: whether q and k keep the teacher's rotary positions, and its norms.
        gate: output gate: None, "swish" or "sigmoid".
        gate_bias: whether the gate and beta have biases; Qwen3.5's have none.
        out_norm: whether o is normed per head before the gate.
        conv_size: taps of a short convolution with silu on q, k and v, the identity at first; 0
            leaves it out.
        window: tokens of softmax attention beside the rule; 0 for none.
        slots: memory slots of `gsa`.
    """

    rule: str = "gated_deltanet"
    rope: bool = True
    qk_norm: bool = True
    gate: str | None = "swish"
    gate_bias: bool = True
    out_norm: bool = True
    conv_size: int = 0
    window: int = 0
    slots: int = 64

    @classmethod
    def of(cls, values: dict[str, Any]) -> LinearOptions:
        """The options of a config's dictionary; `ValueError` for unknown fields."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"linear: unknown fields {unknown}; expected some of {', '.join(known)}"
            )
        return cls(**values)

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"linear: rule is {self.rule!r}; expected one of {', '.join(RULES)}")
        if self.gate not in GATES:
            raise ValueError(f"linear: gate is {self.gate!r}; expected one of {GATES}")
        if self.gate is not None and not self.out_norm:
            raise ValueError("linear: a gate comes with out_norm; set it, or gate to None")
        if self.window < 0 or self.conv_size < 0:
            raise ValueError(
                f"linear: window={self.window} and conv_size={self.conv_size}; expected 0 or more"
            )


class LinearizedAttention(RecurrentMixer):
    """See the module's equations; `[B, T, hidden_size]`. All arguments but `linear`, a dictionary
    of `LinearOptions`, are those of the attention it replaces.

    Example:
        >>> layer = LinearizedAttention(hidden_size=64, num_heads=4)
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    gates = (*RecurrentMixer.gates, "m_proj", "decay", "a_down")

    mode = "chunk"

    def __init__(
        self,
        hidden_size: int = 2048,
        num_heads: int = 32,
        qkv_bias: bool = False,
        qk_norm: bool | str = False,
        qk_norm_eps: float = 1e-5,
        rope_theta: float | None = 10000.0,
        partial_rotary_factor: float = 1.0,
        head_dim: int | None = None,
        norm_eps: float = 1e-6,
        linear: dict[str, Any] | None = None,
        layer_idx: int | None = None,
        rope_scaling: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.options = o = LinearOptions.of(linear or {})
        qk_norm = qk_norm if o.qk_norm else False
        self.num_heads, self.layer_idx, self.qk_norm = num_heads, layer_idx, qk_norm
        own = head_dim or multiple(
            "LinearizedAttention", "hidden_size", hidden_size, "num_heads", num_heads
        )
        self.head_dim, width = own, num_heads * own
        for name in "qkv":
            self.add_module(f"{name}_proj", nn.Linear(hidden_size, width, bias=qkv_bias))
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        if qk_norm:
            size = width if qk_norm == "all_heads" else own
            self.q_norm, self.k_norm = (RMSNorm(size, eps=qk_norm_eps) for _ in range(2))
        turned = int(own * partial_rotary_factor)
        self.rotary = None
        if rope_theta is not None and o.rope:
            self.rotary = RotaryEmbedding(turned, base=rope_theta, scaling=rope_scaling)
        self.use_short_conv = o.conv_size > 0
        if self.use_short_conv:
            for name in "qkv":
                self.add_module(f"{name}_conv1d", ShortConvolution(width, o.conv_size))
        self.rule = RULES[o.rule](hidden_size, num_heads, own, o)
        if o.gate is not None:
            self.g_proj = nn.Linear(hidden_size, width, bias=o.gate_bias)
            self.o_norm: nn.Module = FusedRMSNormGated(own, eps=norm_eps, activation=o.gate)
        elif o.out_norm:
            self.o_norm = RMSNorm(own, eps=norm_eps)
        if o.window:
            self.m_proj = nn.Linear(hidden_size, num_heads)
            self.local = _Window(o.window)
        for name, value in self.initial_values().items():
            self.get_parameter(name).data.copy_(value)

    def initial_values(self) -> dict[str, Tensor]:
        """Gates that depend on nothing yet, convolutions that change nothing."""
        values = {f"rule.{n}": x for n, x in self.rule.initial_values().items()}
        if self.options.gate is not None and self.options.gate_bias:
            values["g_proj.weight"] = torch.zeros_like(self.g_proj.weight)
            values["g_proj.bias"] = torch.full_like(self.g_proj.bias, OPEN[self.options.gate])
        if self.options.window:
            values["m_proj.weight"] = torch.zeros_like(self.m_proj.weight)
            values["m_proj.bias"] = torch.zeros_like(self.m_proj.bias)
        if self.use_short_conv:
            tap = torch.zeros(self.o_proj.in_features, 1, self.options.conv_size)
            tap[..., -1] = 1
            values |= {f"{name}_conv1d.weight": tap for name in "qkv"}
        return values

    def heads(self, x: Tensor, context: Context) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """q, k, v `[B, T, H, d]` as the teacher forms them, and new states of convolutions."""
        states: tuple[Tensor, ...] = ()
        qkv = [getattr(self, f"{name}_proj")(x) for name in "qkv"]
        if self.qk_norm == "all_heads":
            qkv[:2] = self.q_norm(qkv[0]), self.k_norm(qkv[1])
        if self.use_short_conv:
            qkv, states = self.convolve(qkv, context)
        q, k, v = (y.unflatten(-1, (self.num_heads, self.head_dim)) for y in qkv)
        if self.qk_norm and self.qk_norm != "all_heads":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, k, positions=context.layout.positions(x.device))
        return [q, k, v], states

    def recur(self, x: Tensor, context: Context) -> tuple[Tensor, State | None]:
        (q, k, v), states = self.heads(x, context)
        o, recurrent = self.rule(q, k, v, x, context)
        if self.options.gate is not None:
            o = self.o_norm(o, self.g_proj(x).view_as(o))
        elif self.options.out_norm:
            o = self.o_norm(o)
        if self.options.window:
            past = None if context.state is None else context.state.conv[len(states) :]
            near, kept = self.local(q, k, v, context, past)
            states = (*states, *kept)
            share = self.m_proj(x).sigmoid().unsqueeze(-1).to(o.dtype)
            o = near + share * (o - near)
        return self.o_proj(o.flatten(-2)), context.after(recurrent, states)


class _Window(SoftmaxMixer):
    """Causal softmax attention over the last `window_size` tokens. It keeps the keys and values of
    those `[N, W, H, d]`, the newest last, and how many there are `[N]`.
    """

    def __init__(self, window_size: int):
        super().__init__()
        self.window_size: int = window_size

    def forward(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, past: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        layout, kept = context.layout, cast(tuple[Tensor, ...], ())
        o = q if past is not None else self._sequences(q, k, v, layout)
        if past is None and not context.keep:
            return o, ()
        lengths = layout.lengths() if layout.packed else [q.shape[1]]
        parts = list(zip(*(y.split(lengths, 1) for y in (q, k, v)), strict=True))
        olds: list[Any] = [past] * len(parts)
        if layout.packed and past is not None:
            olds = list(zip(*(y.split(1) for y in past), strict=True))
        results = [
            (q if past is None else self._after(q, k, v, *old), self._keep(k, v, old))
            for (q, k, v), old in zip(parts, olds, strict=True)
        ]
        if past is not None:
            o = torch.cat([y for y, _ in results], 1)
        if context.keep:
            kept = tuple(torch.cat(y) for y in zip(*(state for _, state in results), strict=True))
        return o, kept

    def _after(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, count: Tensor
    ) -> Tensor:
        """Tokens that follow others."""
        W, T = keys.shape[1], q.shape[1]
        visible = self._visible(T, W + T, q.device)
        slots = torch.arange(W + T, device=q.device)
        there = slots >= (W - count).view(-1, 1)
        mask = (visible & there[:, None]).unsqueeze(1)
        k, v = torch.cat([keys.to(k.dtype), k], 1), torch.cat([values.to(v.dtype), v], 1)
        return self._attend(q, k, v, attn_mask=mask)

    def _keep(
        self, k: Tensor, v: Tensor, old: tuple[Tensor, Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The new state of sequences of one length."""
        W, T = self.window_size, k.shape[1]
        if old is None:
            rows = [F.pad(y, (0, 0, 0, 0, max(0, W - T), 0)) for y in (k, v)]
            count = torch.full((len(k),), min(T, W), device=k.device)
        else:
            rows = [torch.cat([a.to(b.dtype), b], 1) for a, b in zip(old[:2], (k, v), strict=True)]
            count = (old[2] + T).clamp(max=W)
        k, v = (y[:, y.shape[1] - W :].contiguous() for y in rows)
        return k, v, count
