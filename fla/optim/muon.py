# SPDX-License-Identifier: MIT
"""Muon for the matrices of a model, each map by itself, and AdamW for everything else.

Muon steps along the orthogonal factor of a matrix's momentum (Jordan et al., 2024). A projection
that holds several maps (Mamba-2's, a gated attention's queries, experts) has one factor for each of
them: one for all would let the largest map set the others' directions. `torch.optim.Muon` does the
step.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fla.optim.roles import Role, groups, roles


class _ByMap(torch.optim.Muon):
    """torch's Muon, which sees every map of a parameter as a matrix of its own."""

    def __init__(self, chosen: Sequence[tuple[Tensor, Role]], **options: Any):
        # torch's own constructor refuses stacked experts, whose maps are matrices too
        defaults = torch.optim.Muon([torch.zeros(1, 1)], **options).defaults
        self.rows = {p: role.rows for p, role in chosen}
        torch.optim.Optimizer.__init__(self, [p for p, _ in chosen], defaults)

    def _init_group(
        self,
        group: MutableMapping,
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        muon_momentum_bufs: list[Tensor],
    ) -> bool:
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            triple = (p, p.grad, state["momentum_buffer"])
            for w, g, b in zip(*(_maps(x, self.rows[p]) for x in triple), strict=True):
                params_with_grad.append(w)
                grads.append(g)
                muon_momentum_bufs.append(b)
        return False


def _maps(x: Tensor, rows: tuple[int, ...]) -> list[Tensor]:
    """The matrices of a parameter, as views: of each expert, and of each map along the rows."""
    stacked = x.unbind() if x.dim() == 3 else (x,)
    return [part for y in stacked for part in (y.split(rows) if rows else (y,))]


class Muon(torch.optim.Optimizer):
    """Muon for what `fla.optim.roles` calls a matrix, AdamW for the rest, as one optimizer: one
    learning rate serves both, since Muon's steps are scaled to AdamW's size.

    Args:
        model: the model; frozen parameters are left out.
        lr, weight_decay, momentum, betas, eps: of both, of Muon, and of AdamW.

    Example:
        >>> from fla.layers import GatedDeltaNet
        >>> layer = GatedDeltaNet(hidden_size=32, num_heads=2, head_dim=8)
        >>> optimizer = Muon(layer, lr=1e-3)
        >>> layer(torch.randn(1, 4, 32))[0].sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        found, parameters = roles(model), dict(model.named_parameters())
        chosen = [
            (p, found[n])
            for n, p in parameters.items()
            if p.requires_grad and found[n].kind == "matrix"
        ]
        if not chosen:
            raise ValueError("Muon: the model has no matrix to train; use torch.optim.AdamW")
        matrices = {p for p, _ in chosen}
        others = [
            group | dict(params=[p for p in group["params"] if p not in matrices])
            for group in groups(model, weight_decay=weight_decay)
        ]
        others = [group for group in others if group["params"]]
        self.muon = _ByMap(
            chosen, lr=lr, weight_decay=weight_decay, momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps) if others else None
        super().__init__([*self._inner_groups()], dict(lr=lr))
        self.param_groups = self._inner_groups()
        self._share()

    def _inner_groups(self) -> list[dict[str, Any]]:
        return [*self.muon.param_groups, *(self.adamw.param_groups if self.adamw else [])]

    def _share(self) -> None:
        """Both optimizers work on the groups and the state of this one."""
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.muon.state = self.param_groups[:count], self.state
        if self.adamw is not None:
            self.adamw.param_groups, self.adamw.state = self.param_groups[count:], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self.muon.step(closure)
        if self.adamw is not None:
            self.adamw.step()
        return loss
