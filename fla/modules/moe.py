# SPDX-License-Identifier: MIT
r"""Mixture of experts: Shazeer et al. (2017), arXiv:1701.06538; shared expert and groups as in
DeepSeek-V3, arXiv:2412.19437.

    s = score(W_r x)        w_e = scale * s_e / sum_{kept} s        (undivided without renormalize)
    y = sum_{e kept} w_e mlp_e(x) + sigmoid(W_s x) mlp_shared(x)    (no sigmoid without shared_gate)

The top_k experts with the largest s + b are kept, b the correction bias of sigmoid scoring. With
groups, only experts of the top_groups groups whose two largest s + b sum highest can be.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import checked
from fla.core.precision import promote_to_fp32
from fla.modules.activations import swiglu_linear
from fla.modules.linear import is_plain
from fla.modules.mlp import GatedMLP

SCORES = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid}


@dataclass(frozen=True)
class Experts:
    """Sizes and routing of a `MixtureOfExperts`.

    Fields:
        num_experts, top_k: experts there are, and experts a token uses.
        intermediate_size: inner width of an expert.
        shared_size: inner width of the expert every token uses; None for none.
        shared_gate: whether a sigmoid gate multiplies the shared expert.
        scoring: "softmax" or "sigmoid".
        renormalize: whether the kept scores are made to sum to 1.
        scale: factor on the kept scores.
        num_groups, top_groups: groups of experts, and groups a token may use.
        balance_loss: weight of the load-balancing loss that joins a model's loss in training.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_size: int | None = None
    shared_gate: bool = False
    scoring: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    balance_loss: float = 0.0

    def __post_init__(self) -> None:
        size, rest = divmod(self.num_experts, self.num_groups)
        if self.scoring not in SCORES:
            problem = f"scoring is {self.scoring!r}; expected one of {', '.join(SCORES)}"
        elif rest:
            problem = (
                f"num_experts is {self.num_experts}; it must be a multiple of "
                f"num_groups={self.num_groups}"
            )
        elif not 1 <= self.top_groups <= self.num_groups:
            problem = f"top_groups is {self.top_groups}; expected 1 to num_groups={self.num_groups}"
        elif not 1 <= self.top_k <= size * self.top_groups:
            problem = f"top_k is {self.top_k}; expected 1 to {size * self.top_groups}"
        elif self.shared_gate and not self.shared_size:
            problem = "shared_gate is True without a shared expert; give shared_size"
        else:
            return
        raise ValueError(f"Experts: {problem}")

    @classmethod
    def of(cls, values: dict[str, Any]) -> Experts:
        """`Experts` from a dictionary; `ValueError` for unknown or missing fields."""
        names = [f.name for f in fields(cls)]
        unknown, missing = set(values) - set(names), set(names[:3]) - set(values)
        if unknown or missing:
            what = f"unknown fields {sorted(unknown)}" if unknown else f"no {sorted(missing)}"
            raise ValueError(f"Experts: {what}; the fields are {', '.join(names)}")
        return cls(**values)


@checked
def load_balance(p: Tensor, chosen: Tensor) -> Tensor:
    """`E sum_e (share of the choices that fell on e) (mean of p_e)`: 1 where all are used alike;
    p `[N, E]` sums to 1, chosen `[N, k]`. Fedus et al. (2021), arXiv:2101.03961.
    """
    share = torch.zeros_like(p).scatter(-1, chosen, 1.0).mean(0) / chosen.shape[-1]
    return p.shape[-1] * (share * p.mean(0)).sum()


class ExpertMLPs(nn.Module):
    """SwiGLU MLPs with stacked weights."""

    @checked
    def __init__(self, hidden_size: int, options: Experts):
        super().__init__()
        E, width = options.num_experts, options.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(E, hidden_size, width))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal, as linear layers of a model start."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=std)

    @checked
    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """`sum_i weights_i mlp_{chosen_i}(x)` for x `[N, D]`, chosen and weights `[N, k]`."""
        if torch.compiler.is_exporting():
            return self._dense(x, chosen, weights)
        order = chosen.flatten().argsort(stable=True)
        token = order.div(chosen.shape[1], rounding_mode="floor")
        counts = torch.bincount(chosen.flatten(), minlength=len(self.down_proj)).tolist()
        rows = x[token]
        # unbind: indexing expert by expert would give each a gradient as large as all of them
        maps = zip(
            rows.split(counts), self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True
        )
        parts = []
        for part, up, down in maps:
            if len(part):
                gate, value = F.linear(part, up).chunk(2, -1)
                parts.append(swiglu_linear(gate, value, down))
        y = torch.cat(parts or [rows]) * weights.flatten()[order].unsqueeze(1).to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, y)

    def _dense(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The same by every expert on every token: an exported graph knows no counts of them."""
        y = torch.zeros_like(x)
        for e, (up, down) in enumerate(
            zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
        ):
            share = (weights * (chosen == e)).sum(-1, keepdim=True)
            gate, value = F.linear(x, up).chunk(2, -1)
            y = y + share.to(x.dtype) * swiglu_linear(gate, value, down)
        return y


class MixtureOfExperts(nn.Module):
    """The module's equation on `[..., hidden_size]`; scores are computed in fp32.

    `correction_bias` is a buffer: checkpoints bring it, nothing here trains it.

    Example:
        >>> layer = MixtureOfExperts(8, Experts(num_experts=4, top_k=2, intermediate_size=16))
        >>> layer(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    gates: ClassVar[tuple[str, ...]] = ("gate", "shared_expert_gate")
    correction_bias: Tensor

    @checked
    def __init__(self, hidden_size: int, options: Experts):
        super().__init__()
        self.options = options
        self.gate = nn.Linear(hidden_size, options.num_experts, bias=False)
        if options.scoring == "sigmoid":
            self.register_buffer("correction_bias", torch.zeros(options.num_experts))
        self.experts = ExpertMLPs(hidden_size, options)
        if options.shared_size:
            self.shared_expert = GatedMLP(hidden_size, intermediate_size=options.shared_size)
        if options.shared_gate:
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(scores `[N, E]`, chosen `[N, k]`, weights `[N, k]`) of x `[N, D]`."""
        options = self.options
        if is_plain(self.gate):
            logits = F.linear(promote_to_fp32(x), promote_to_fp32(self.gate.weight))
        else:
            logits = promote_to_fp32(self.gate(x))
        scores = SCORES[options.scoring](logits)
        rank = scores.detach()
        if options.scoring == "sigmoid":
            rank = rank + self.correction_bias
        if options.top_groups < options.num_groups:
            groups = rank.unflatten(-1, (options.num_groups, -1))
            best = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
            kept = torch.zeros_like(best, dtype=torch.bool)
            kept = kept.scatter(-1, best.topk(options.top_groups, -1).indices, True)
            rank = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
        chosen = rank.topk(options.top_k, -1).indices
        weights = scores.gather(-1, chosen)
        if options.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return scores, chosen, weights * options.scale

    @checked
    def forward(self, x: Tensor, with_loss: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        """y, or (y, the weighted load-balancing loss; None outside training and without one)."""
        rows = x.flatten(0, -2)
        scores, chosen, weights = self.route(rows)
        loss = None
        if with_loss and self.training and self.options.balance_loss:
            p = scores / scores.sum(-1, keepdim=True)
            loss = self.options.balance_loss * load_balance(p, chosen)
        y = self.experts(rows, chosen, weights)
        if self.options.shared_size:
            common = self.shared_expert(rows)
            if self.options.shared_gate:
                common = self.shared_expert_gate(rows).sigmoid() * common
            y = y + common
        y = y.view_as(x)
        return (y, loss) if with_loss else y
