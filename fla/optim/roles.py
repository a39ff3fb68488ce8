# SPDX-License-Identifier: MIT
"""The role of every parameter: what it is, whether weight decay is for it, which maps lie in it.

Layers say what names cannot tell: `Mixer.gates` names projections whose outputs are gates, decays
and rates, `Mixer.fused` the rows of projections that hold several maps, and `initial_values` the
parameters that start at values of their own (decay rates, time steps), which nothing should pull to
zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fla.layers.mixer import Mixer
from fla.modules.convolution import ShortConvolution
from fla.modules.moe import ExpertMLPs, MixtureOfExperts

KINDS = {
    "matrix": "a linear map between vectors of the model; Muon's",
    "gate": "a linear map to gates, decays or rates",
    "embedding": "token embeddings and the head of the vocabulary",
    "convolution": "taps of a short convolution",
    "decay": "decay rates and time steps, which start at values of their own; no weight decay",
    "norm": "of a norm; no weight decay",
    "vector": "biases, mixing weights and whatever else is no matrix; no weight decay",
}
DECAYING = {"matrix", "gate", "embedding", "convolution"}


@dataclass(frozen=True)
class Role:
    """What a parameter is.

    Fields:
        kind: a key of `KINDS`.
        rows: sizes along the rows of the maps that lie in it one after the other; () for one map.
    """

    kind: str
    rows: tuple[int, ...] = ()

    @property
    def decays(self) -> bool:
        """Whether weight decay is for it."""
        return self.kind in DECAYING


def roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter by its name.

    Example:
        >>> from fla.layers import GatedDeltaNet
        >>> found = roles(GatedDeltaNet(hidden_size=32, num_heads=2, head_dim=8))
        >>> found["q_proj.weight"].kind, found["a_proj.weight"].kind, found["A_log"].decays
        ('matrix', 'gate', False)
    """
    telling = {n: m for n, m in model.named_modules() if isinstance(m, Mixer | MixtureOfExperts)}
    own = _own_values(telling)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = {}
    for home, module in model.named_modules():
        name, owner = _owner_of(home, telling)
        inner = home.removeprefix(name).strip(".")
        for part, p in module.named_parameters(recurse=False):
            full = f"{home}.{part}".strip(".")
            if full in own:
                found[full] = Role("decay")
            elif module is head and p.dim() == 2:
                found[full] = Role("embedding")
            else:
                found[full] = _role(module, part, p, owner, inner)
    return found


def _own_values(telling: dict[str, Any]) -> set[str]:
    """Parameters that mixers initialise themselves; drawing them leaves the generator as it is."""
    with torch.random.fork_rng(devices=[]):
        return {
            f"{name}.{parameter}".strip(".")
            for name, mixer in telling.items()
            if isinstance(mixer, Mixer)
            for parameter in mixer.initial_values()
        }


def _owner_of(home: str, telling: dict[str, Any]) -> tuple[str, Any]:
    """The innermost mixer or mixture of experts that a module lies in, and its name."""
    while True:
        if home in telling:
            return home, telling[home]
        if not home:
            return "", None
        home = home.rpartition(".")[0]


def _role(module: nn.Module, part: str, p: Tensor, owner: Any, inner: str) -> Role:
    if "Norm" in type(module).__name__:
        return Role("norm")
    if isinstance(module, nn.Embedding):
        return Role("embedding")
    if isinstance(module, ExpertMLPs):
        width = p.shape[1]
        return Role("matrix", (width // 2, width // 2) if part == "gate_up_proj" else ())
    if isinstance(module, ShortConvolution | nn.Conv1d) and part == "weight":
        return Role("convolution")
    if not (isinstance(module, nn.Linear) and part == "weight"):
        return Role("vector")
    if owner is not None and set(owner.gates) & set(inner.split(".")):
        return Role("gate")
    rows = owner.fused().get(inner, ()) if isinstance(owner, Mixer) else ()
    return Role("matrix", tuple(rows))


def groups(
    model: nn.Module, lr: float | None = None, weight_decay: float = 0.1
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer such as torch's AdamW: those that weight decay is for, and
    the others. Frozen parameters are left out.

    Example:
        >>> from fla.layers import GatedDeltaNet
        >>> layer = GatedDeltaNet(hidden_size=32, num_heads=2, head_dim=8)
        >>> [group["weight_decay"] for group in groups(layer)]
        [0.1, 0.0]
    """
    found, parameters = roles(model), dict(model.named_parameters())
    made = []
    for decays in (True, False):
        chosen = [p for n, p in parameters.items() if p.requires_grad and found[n].decays == decays]
        if chosen:
            group: dict[str, Any] = dict(
                params=chosen, weight_decay=weight_decay if decays else 0.0
            )
            made.append(group if lr is None else group | dict(lr=lr))
    return made
