# SPDX-License-Identifier: MIT
"""Gates and scales of linear layers from the teacher's own attention, in one pass and no training.

With a_tj the attention of head h at token t, and y its output before W_o:

    d_h = mean_t sum_j a_tj (t - j)          how far it looks back; j = 0 left out, where attention
                                             that has nothing to do goes
    c_h = 1 - mean_t entropy(a_t) / log t    how sharply it looks
    half-life of the decay = d_h             rate of writing (beta) = 0.3 + 0.4 c_h

The scale of y goes where a norm per head cannot undo it: the norm's weight becomes the shape of y
over channels, each head's size multiplies its columns of W_o. Without a norm the least-squares
factor multiplies its rows of W_v. After Zhou et al. (2026), arXiv:2606.16429.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fla.layers.attn import Attention
from fla.layers.linearized import LinearizedAttention
from fla.layers.mixer import Context
from fla.linearize.data import on
from fla.linearize.surgery import attention_of

SHORTEST = 16  # tokens of a sequence that says something


@dataclass
class Statistics:
    """What is measured in one layer, per head: the mean look-back without and with the first token,
    the focus, and the root mean square of every channel of y `[H, d]`.
    """

    look_back: Tensor
    look_back_all: Tensor
    focus: Tensor
    size: Tensor


class _Watch:
    """Sums over what a layer's attention does, and the last batch it did it on."""

    def __init__(self, attention: Attention):
        self.attention = attention
        heads, device = attention.num_heads, attention.o_proj.weight.device
        self.back, self.back_all, self.focus = torch.zeros(3, heads, device=device).unbind()
        self.squares = torch.zeros(heads, attention.head_dim, device=device)
        self.rows = self.tokens = 0
        self.hooks = (
            attention.register_forward_hook(self.look, with_kwargs=True),
            attention.o_proj.register_forward_pre_hook(self.keep),
        )

    def keep(self, module: Any, args: tuple) -> None:
        self.y = args[0].float().unflatten(-1, (self.attention.num_heads, -1))
        self.squares += self.y.square().sum((0, 1))
        self.tokens += self.y.shape[0] * self.y.shape[1]

    def look(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self.x, self.layout = args[0], kwargs["layout"]
        queries, keys, _, _ = self.attention.heads(self.x, self.layout)
        keys = keys.repeat_interleave(queries.shape[2] // keys.shape[2], 2)
        lengths = self.layout.lengths()
        rows = (y.float().split(lengths, 1) for y in (queries, keys))
        for q, k in zip(*rows, strict=True):
            if q.shape[1] >= SHORTEST:
                q, k = (y[0].transpose(0, 1) for y in (q, k))
                self.add(attention_maps(self.attention, q, k))

    def add(self, a: Tensor) -> None:
        """Maps `[H, T, T]`; rows from the second on."""
        steps = torch.arange(a.shape[1], device=a.device)
        distance = (steps[:, None] - steps).clamp(min=0).to(a.dtype)
        a = a[:, 1:]
        self.back_all += (a * distance[1:]).sum((1, 2))
        rest = a[:, :, 1:]
        mass = rest.sum(-1).clamp(min=1e-6)
        self.back += ((rest * distance[1:, 1:]).sum(-1) / mass).sum(-1)
        entropy = torch.special.entr(a).sum(-1) / steps[1:].add(1).log()
        self.focus += (1 - entropy).sum(-1)
        self.rows += a.shape[1]

    def means(self) -> Statistics:
        n, size = max(1, self.rows), (self.squares / max(1, self.tokens)).sqrt()
        return Statistics(self.back / n, self.back_all / n, self.focus / n, size)


def attention_maps(attention: Attention, q: Tensor, k: Tensor) -> Tensor:
    """`[H, T, T]` of q, k `[H, T, d]`."""
    T = q.shape[1]
    scale = q.shape[-1] ** -0.5 if attention.scale is None else attention.scale
    visible = attention._visible(T, T, q.device)
    return (q @ k.mT * scale).masked_fill(~visible, -math.inf).softmax(-1)


@torch.no_grad()
def calibrate(
    teacher: Any, bank: dict[int, LinearizedAttention], batches: list[dict[str, Tensor]]
) -> dict[int, Statistics]:
    """Set the gates and scales of every layer in the bank; what they were set from, by layer."""
    watches = {i: _Watch(attention_of(teacher, i)) for i in bank}
    try:
        for batch in batches:
            batch = on(teacher.device, batch)
            teacher.model(batch["input_ids"], cu_seqlens=batch["cu_seqlens"], use_cache=False)
    finally:
        for watch in watches.values():
            for hook in watch.hooks:
                hook.remove()
    found = {i: watch.means() for i, watch in watches.items()}
    for i, layer in bank.items():
        _set(layer, found[i], watches[i])
    return found


def _set(layer: LinearizedAttention, found: Statistics, watch: _Watch) -> None:
    layer.rule.calibrate(found.look_back.clamp(min=0.5), 0.3 + 0.4 * found.focus.clamp(0, 1))
    out: Any = layer.o_proj
    value: Any = layer.v_proj
    if layer.options.out_norm:
        norm: Any = layer.o_norm
        size = found.size.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
        norm.weight.copy_((found.size / size).square().mean(0).sqrt())
        by_head = out.weight.unflatten(1, (layer.num_heads, -1))
        out.weight.copy_((by_head * size).flatten(1))
        return
    x, context = watch.x.float(), Context(watch.layout, None, False, {})
    (q, k, v), _ = layer.heads(x, context)
    o, _ = layer.rule(q, k, v, x, context)
    factor = (watch.y * o).sum((0, 1, 3)) / o.square().sum((0, 1, 3)).clamp(min=1e-12)
    factor = factor.clamp(0.1, 10.0).repeat_interleave(layer.head_dim)
    value.weight.mul_(factor[:, None])
    if value.bias is not None:
        value.bias.mul_(factor)
