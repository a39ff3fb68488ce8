# SPDX-License-Identifier: MIT
"""Elementwise maps that several pages put before the recurrence: norms and gates, in fp32 or
wider.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fla._arguments import shaped
from fla.core.precision import promote_to_fp32
from fla.ops.engine.recurrence.terms import L2_EPS


@shaped(x="... D")
def l2norm(x: Tensor, eps: float = L2_EPS, output_dtype: torch.dtype | None = None) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last axis, in fp32 for lower dtypes.

    Example:
        >>> l2norm(torch.tensor([3.0, 4.0])).tolist()
        [0.6000000238418579, 0.800000011920929]
    """
    y = promote_to_fp32(x)
    y = y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)
    return y.to(output_dtype or x.dtype)


def softplus_gate(g: Tensor, A_log: Tensor, dt_bias: Tensor | None = None) -> Tensor:
    """`-exp(A_log) softplus(g + dt_bias)`: a log decay per head `[B, T, HV]` or per channel
    `[B, T, HV, K]` from its logits; A_log `[HV]`, dt_bias `[HV]` or `[HV K]`.
    """
    return -_per_head(A_log, g).exp() * F.softplus(_biased(g, dt_bias))


def sigmoid_gate(
    g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float
) -> Tensor:
    """`lower_bound sigmoid(exp(A_log) (g + dt_bias))`: a log decay in (lower_bound, 0)."""
    g = _biased(g, dt_bias)
    return lower_bound * (g if A_log is None else _per_head(A_log, g).exp() * g).sigmoid()


def _per_head(A_log: Tensor, g: Tensor) -> Tensor:
    A_log = promote_to_fp32(A_log).flatten()
    return A_log if g.dim() == 3 else A_log.unsqueeze(-1)


def _biased(g: Tensor, dt_bias: Tensor | None) -> Tensor:
    return (
        promote_to_fp32(g)
        if dt_bias is None
        else promote_to_fp32(g) + promote_to_fp32(dt_bias).view(g.shape[2:])
    )


def channel_gate(
    op: str,
    g: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    use_gate: bool,
    safe_gate: bool,
    lower_bound: float | None,
) -> Tensor:
    """The log decay per channel after its in-kernel transform; contradictory switches raise.
    Without `use_gate` it is g as it came: callers hand over the transform's parameters always.

    With `use_gate` it is `softplus_gate`, or with a `lower_bound` `sigmoid_gate`. `safe_gate`
    promises that decays are bounded, so with `use_gate` it needs the bound; any decay is safe here,
    and without `use_gate` the promise changes nothing.
    """
    if not use_gate:
        return g
    if safe_gate and lower_bound is None:
        raise ValueError(f"{op}: safe_gate needs lower_bound, the least log decay; pass it")
    for name, x, size in (
        ("A_log", A_log, g.shape[2]),
        ("dt_bias", dt_bias, g.shape[2:].numel()),
    ):
        if x is not None and x.numel() != size:
            raise ValueError(
                f"{op}: {name} has shape {list(x.shape)}; {size} values were expected from g "
                f"{list(g.shape)}"
            )
    if lower_bound is None:
        if A_log is None:
            raise ValueError(
                f"{op}: the gate needs A_log, the log of the rates; pass it, or a lower_bound"
            )
        return softplus_gate(g, A_log, dt_bias)
    if not lower_bound < 0:
        raise ValueError(f"{op}: lower_bound is {lower_bound}; a log decay below 0 was expected")
    return sigmoid_gate(g, A_log, dt_bias, lower_bound)
