# SPDX-License-Identifier: MIT
"""What the losses and their kernels are told: options, heads, a teacher's likeliest tokens."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "mse")
METRICS = ("divergence", "cross_entropy", "teacher_entropy", "student_entropy", "agreement")


class LogitShape(NamedTuple):
    """What makes a loss of logits; `fused_cross_entropy.py` has the equation."""

    logit_scale: float = 1.0
    logit_softcapping: float | None = None
    label_smoothing: float = 0.0
    lse_square_scale: float = 0.0
    ignore_index: int = -100


@dataclass(frozen=True)
class Divergence:
    """What is measured; `fused_linear_divergence.py` has the equations.

    Fields:
        kind: one of `DIVERGENCES`.
        temperature, beta: T and beta there.
        weight, ce_weight: of the divergence and of the cross entropy.
        logit_scale, logit_softcapping: of the student; teacher_*: of the teacher.
        chunk_bytes: memory of one chunk's logits and what is made of them.
    """

    kind: str = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    weight: float = 1.0
    ce_weight: float = 0.0
    logit_scale: float = 1.0
    logit_softcapping: float | None = None
    teacher_scale: float = 1.0
    teacher_softcapping: float | None = None
    chunk_bytes: int = 1 << 28

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise ValueError(
                f"Divergence: kind is {self.kind!r}; expected one of {', '.join(DIVERGENCES)}"
            )
        if not self.temperature > 0:
            raise ValueError(f"Divergence: temperature is {self.temperature}; expected above 0")
        if self.kind == "jsd" and not 0 < self.beta < 1:
            raise ValueError(
                f"Divergence: beta is {self.beta}; expected between 0 and 1 (at the ends jsd is "
                "0: use forward_kl or reverse_kl)"
            )


class TopK(NamedTuple):
    """A teacher's distribution by its most likely tokens: numbers and natural-log probabilities
    `[tokens, k]` at temperature 1. What is left is the mass of all other tokens together.
    """

    ids: Tensor
    log_probs: Tensor


class Head(NamedTuple):
    """A last linear layer: weight `[V, D]`, bias `[V]`."""

    weight: Tensor
    bias: Tensor | None = None
