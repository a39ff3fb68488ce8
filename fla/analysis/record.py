# SPDX-License-Identifier: MIT
"""Records what a model's recurrences are given, as tensors of the one equation:

    S_t = diag(exp(g_t)) S_{t-1} + a_t (b_t^T S_{t-1}) + k_t v_t^T          o_t = scale S_t^T q_t

Everything else in this package is computed of such a `Trace`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fla.core.precision import promote_to_fp32
from fla.ops.engine.recurrence import recurrence as engine
from fla.ops.engine.recurrence.gates import l2norm
from fla.ops.engine.recurrence.terms import Terms
from fla.ops.registry import OpCase


@dataclass(frozen=True)
class Trace:
    """One call of an operator, in fp32 or wider.

    Fields:
        layer: name of the module that called it; op: the operator.
        q, k: `[B, T, H, K]`; v: `[B, T, H, V]`; g: log decay `[B, T, H, K]` or `[B, T, H, 1]`;
            a, b: `[B, T, H, K]`, None where nothing is erased; bonus: `[H, K]`, of RWKV-6.
        scale: of the output; read_before: whether o_t reads S_{t-1}; state: S_0, zero where None.
        beta: strength of the write `[B, T, H]`, of delta rules.
    """

    layer: str
    op: str
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    bonus: Tensor | None = None
    scale: float = 1.0
    read_before: bool = False
    state: Tensor | None = None
    beta: Tensor | None = None

    @classmethod
    def of(cls, op: OpCase, inputs: dict[str, Tensor]) -> Trace:
        """The equation of an operator of `fla.ops.registry.OPS` on given inputs.

        Example:
            >>> from fla.ops.registry import OPS
            >>> Trace.of(OPS[0], OPS[0].inputs(1, 5, 2, 3, 4)).op
            'linear_attn'
        """
        if op.equation is None:
            raise ValueError(f"Trace.of: {op.name} is not a point of the one equation")
        found = dict(op.equation(op.without_groups(inputs)))
        if found.pop("steps", 1) != 1:
            raise ValueError(
                f"Trace.of: {op.name} takes several steps per token; pass its substeps to the "
                "gated delta rule"
            )
        rows = {n: x for n, x in found.items() if isinstance(x, Tensor)}
        scale = found.get("scale", op.fixed.get("scale", rows["q"].shape[-1] ** -0.5))
        return cls(op.name, op.name, **rows, scale=scale, read_before="bonus" in rows)

    def transitions(self) -> Tensor:
        """M_t = diag(exp(g_t)) + a_t b_t^T, `[B, T, H, K, K]`."""
        decay = torch.ones_like(self.k) if self.g is None else self.g.exp().expand_as(self.k)
        M = torch.diag_embed(decay)
        if self.a is None or self.b is None:  # they come together
            return M
        return M + self.a[..., :, None] * self.b[..., None, :]

    def states(self, v: Tensor | None = None) -> Iterator[Tensor]:
        """S_0, S_1, ... `[B, H, K, V]`, of other values where v `[B, T, H, V]` is given."""
        v = self.v if v is None else v
        B, T, H, K = self.k.shape
        S = self.k.new_zeros(B, H, K, v.shape[-1])
        S = S if self.state is None else S + self.state.to(S)
        yield S
        for t in range(T):
            new = S if self.g is None else self.g[:, t, :, :, None].exp() * S
            if self.a is not None and self.b is not None:
                read = torch.einsum("bhk,bhkv->bhv", self.b[:, t], S)
                new = new + self.a[:, t, :, :, None] * read[:, :, None]
            S = new + self.k[:, t, :, :, None] * v[:, t, :, None]
            yield S

    def only(self, row: int) -> Trace:
        """One row of the batch."""
        part = slice(row, row + 1)
        names = ("q", "k", "v", "g", "a", "b", "state", "beta")
        cut = {n: x[part] for n in names if (x := getattr(self, n)) is not None}
        return replace(self, **cut)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def _channels_as_heads(x: dict[str, Any]) -> dict[str, Any]:
    """Value channels with a decay or a beta of their own have a transition each: a head each."""
    V = x["v"].shape[3]
    own = {n: x[n].flatten(2) for n in ("gv", "beta") if x[n] is not None and x[n].dim() == 4}
    shared = [n for n in ("q", "k", "g", "gk", "a", "b", "beta") if n not in own]
    out = x | {n: x[n].repeat_interleave(V, 2) for n in shared if x[n] is not None} | own
    out["v"] = x["v"].flatten(2).unsqueeze(-1)
    if out["gv"] is not None:
        out["g"] = out["gv"] if out["g"] is None else out["g"] + out["gv"]
    if x["state"] is not None:
        out["state"] = x["state"].mT.flatten(1, 2).unsqueeze(-1)
    return out


def _trace(layer: str, op: str, options: engine.Options, x: dict[str, Any]) -> Trace:
    if options.reverse:
        raise ValueError(f"trace: {op} in {layer} runs in reverse; flip its inputs instead")
    x = Terms._field_defaults | x
    x = {n: y if y is None else y.detach() for n, y in x.items()}
    heads = x["v"].shape[2]
    x |= {n: _heads(x[n], heads) for n in ("q", "k")}
    if x["state"] is not None and options.state_v_first:
        x["state"] = x["state"].mT
    if x["gv"] is not None or (x["beta"] is not None and x["beta"].dim() == 4):
        x = _channels_as_heads(x)
    q, k = (promote_to_fp32(l2norm(y) if options.l2norm else y) for y in (x["q"], x["k"]))
    g = Terms(*(x[n] for n in ("q", "k", "v", "g", "gk"))).merged().g
    g = g if g is None else promote_to_fp32(g if g.dim() == 4 else g.unsqueeze(-1))
    beta = x["beta"]
    v = promote_to_fp32(x["v"])
    a, b = (y if y is None else promote_to_fp32(y) for y in (x["a"], x["b"]))
    if beta is not None:
        beta = promote_to_fp32(beta)
        v, a = beta[..., None] * v, -beta[..., None] * k
        b = b if b is not None else (k if g is None else g.exp() * k)
    return Trace(
        layer, op, q, k, v, g, a, b, None,
        k.shape[-1] ** -0.5 if options.scale is None else options.scale,
        options.read_before, x["state"], beta,
    )  # fmt: skip


@contextmanager
def trace(model: nn.Module, layers: str = "") -> Iterator[list[Trace]]:
    """Inside the block, the list grows by a `Trace` for every recurrence that runs in a module of
    `model` whose name holds `layers`. Any model whose layers call operators of this package works,
    transformers' own included. Value channels with a decay or a beta of their own (GSA, ABC, Oja,
    HGRN, Mamba, RWKV-4) are a head each, with V = 1. What a layer does beside the recurrence
    (convolutions, RWKV's bonus for the token itself, Mamba's D) is not in it; several sequences in
    a row (`cu_seqlens`) are refused.

    Example:
        >>> from fla.models import GLAConfig, GLAForCausalLM
        >>> config = GLAConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2, num_heads=2)
        >>> model = GLAForCausalLM(config)
        >>> with trace(model) as found:
        ...     _ = model(torch.randint(9, (1, 12)))
        >>> [x.layer for x in found], found[0].k.shape
        (['model.layers.0.attn', 'model.layers.1.attn'], torch.Size([1, 12, 2, 4]))
    """
    inside: list[str] = []
    found: list[Trace] = []

    def look(op: str, options: engine.Options, tensors: dict[str, Tensor | None]) -> None:
        if not inside or layers not in inside[-1]:
            return
        if tensors.pop("cu_seqlens") is not None:
            raise ValueError("trace: several sequences in a row; pass one, or rows of one length")
        with torch.no_grad():
            found.append(_trace(inside[-1], op, options, tensors))

    def enter(name: str) -> Any:
        return lambda *_: inside.append(name)

    def leave(*_: Any) -> None:
        inside.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(enter(name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    engine.trace_hooks.append(look)
    try:
        yield found
    finally:
        engine.trace_hooks.remove(look)
        for hook in hooks:
            hook.remove()
