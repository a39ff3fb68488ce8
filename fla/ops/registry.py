# SPDX-License-Identifier: MIT
"""OPS: the one list that tests, benchmarks and docs are made from. A new operator is its page and a
line here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.ops import delta_rule, gated_delta_rule, linear_attn, simple_gla

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class OpCase:
    """One operator of the family, as its tests and benchmarks see it.

    Fields:
        name: the page, `fla/ops/<name>.py`.
        title: the operator in words; paper: its source.
        chunk, token, naive: the public functions (`naive` is the page's literal loop).
        gates: gates beside q, k, v by kind: "decay" (log, <= 0) or "beta" (in [0, 2]).
        fixed: keyword arguments that every call of chunk and token passes.
        on_equation: inputs to the arguments g, a, b, k, v of `engine/recurrence.py`.
    """

    name: str
    title: str
    paper: str
    chunk: Callable
    token: Callable
    naive: Callable
    gates: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    on_equation: Callable[[Inputs], dict[str, Tensor | None]] = lambda x: dict(k=x["k"], v=x["v"])

    def inputs(
        self,
        B: int,
        T: int,
        H: int,
        K: int,
        V: int,
        *,
        HV: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> Inputs:
        """Random arguments inside the operator's domain: unit keys, decays <= 0, beta in [0, 2]."""
        generator = torch.Generator().manual_seed(seed)
        HV = HV or H

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        values: Inputs = dict(
            q=normal(B, T, H, K), k=F.normalize(normal(B, T, H, K), dim=-1), v=normal(B, T, HV, V)
        )
        for gate, kind in self.gates.items():
            x = normal(B, T, HV)
            values[gate] = F.logsigmoid(x + 1) if kind == "decay" else 2 * x.sigmoid()
        return {name: x.to(device, dtype) for name, x in values.items()}


def _delta(x: Inputs) -> dict[str, Tensor | None]:
    beta = x["beta"][..., None]
    return dict(k=x["k"], v=beta * x["v"], a=-beta * x["k"], b=x["k"])


def _gated_delta(x: Inputs) -> dict[str, Tensor | None]:
    decay = x["g"][..., None]
    return {**_delta(x), "g": decay, "b": decay.exp() * x["k"]}


OPS = [
    OpCase(
        "linear_attn",
        "Linear attention",
        "arXiv:2006.16236",
        linear_attn.chunk_linear_attn,
        linear_attn.fused_recurrent_linear_attn,
        linear_attn.naive_recurrent_linear_attn,
        fixed=dict(normalize=False),
    ),
    OpCase(
        "simple_gla",
        "Simple GLA",
        "arXiv:2312.06635",
        simple_gla.chunk_simple_gla,
        simple_gla.fused_recurrent_simple_gla,
        simple_gla.naive_recurrent_simple_gla,
        gates=dict(g="decay"),
        on_equation=lambda x: dict(k=x["k"], v=x["v"], g=x["g"][..., None]),
    ),
    OpCase(
        "delta_rule",
        "Delta rule",
        "arXiv:2406.06484",
        delta_rule.chunk_delta_rule,
        delta_rule.fused_recurrent_delta_rule,
        delta_rule.naive_recurrent_delta_rule,
        gates=dict(beta="beta"),
        on_equation=_delta,
    ),
    OpCase(
        "gated_delta_rule",
        "Gated delta rule",
        "arXiv:2412.06464",
        gated_delta_rule.chunk_gated_delta_rule,
        gated_delta_rule.fused_recurrent_gated_delta_rule,
        gated_delta_rule.naive_recurrent_gated_delta_rule,
        gates=dict(g="decay", beta="beta"),
        on_equation=_gated_delta,
    ),
]
