# SPDX-License-Identifier: MIT
"""Figures of a `Trace`: the attention it implies, its states, decays, gates, eigenvalues, and how
long a token can be read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fla.analysis.record import Trace


def attention(trace: Trace) -> Tensor:
    """A `[B, H, T, T]` with `o_t = sum_s A[t, s] v_s`: what a linear mixer would be as attention,
    signs included; exact, and of any operator of the family. Rows need not sum to 1.

    `A[t, s] = scale q_t^T M_t ... M_{s+1} k_s`: the output for values that are unit vectors.

    Example:
        >>> from fla.ops.registry import OPS
        >>> x = OPS[0].inputs(1, 5, 2, 3, 4)
        >>> A = attention(Trace.of(OPS[0], x))
        >>> torch.allclose(A, 3**-0.5 * torch.einsum("bthk,bshk->bhts", x["q"], x["k"]).tril())
        True
    """
    q, rows = trace.q, []
    states = trace.states(_unit_values(trace))
    S = next(states)
    for t, after in enumerate(states):
        S, read = after, (S if trace.read_before else after)
        rows.append(torch.einsum("bhk,bhks->bhs", q[:, t], read))
    A = torch.stack(rows, 2) * trace.scale
    if trace.bonus is not None:
        own = (q * trace.bonus * trace.k).sum(-1) * trace.scale  # [B, T, H]
        A = A + torch.diag_embed(own.transpose(1, 2))
    return A


def _unit_values(trace: Trace) -> Tensor:
    """Values that tell tokens apart; the first state is what came before any of them."""
    if trace.state is not None and trace.state.any():
        raise ValueError(
            f"{trace.layer}: the trace begins with a state, whose tokens are not in it; trace the "
            "whole sequence without a cache"
        )
    B, T, H, _ = trace.k.shape
    return torch.eye(T, dtype=trace.k.dtype, device=trace.k.device)[:, None].expand(B, T, H, T)


def memory(trace: Trace) -> Tensor:
    """How much of a token's value its own key still reads d tokens later, `[H, T]`, the mean over
    batch and tokens: `k_s^T M_t ... M_{s+1} k_s / |k_s|^2` at d = t - s, 1 at d = 0.

    Example:
        >>> from fla.ops.registry import OPS
        >>> memory(Trace.of(OPS[0], OPS[0].inputs(1, 5, 2, 3, 4))).shape  # nothing is forgotten
        torch.Size([2, 5])
    """
    states = trace.states(_unit_values(trace))
    next(states)
    size = trace.k.square().sum(-1).transpose(1, 2)  # [B, H, T]
    T = trace.k.shape[1]
    total, count = trace.k.new_zeros(trace.k.shape[2], T), trace.k.new_zeros(T)
    for t, S in enumerate(states):
        kept = torch.einsum("bshk,bhks->bhs", trace.k, S) / size.clamp(min=1e-12)
        total[:, : t + 1] += kept[:, :, : t + 1].mean(0).flip(-1)
        count[: t + 1] += 1
    return total / count


def state_sizes(trace: Trace, every: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """The size of the state after every `every` tokens: the tokens' numbers `[n]`, and the state's
    Frobenius norm and effective rank, both `[n, B, H]`. The effective rank is the exponential of
    the entropy of the singular values, from 1 to min(K, V) (Roy, Vetterli, 2007).
    """
    at, norms, ranks = [], [], []
    for t, S in enumerate(trace.states()):
        if t and t % every == 0:
            values = torch.linalg.svdvals(S)
            share = values / values.sum(-1, keepdim=True).clamp(min=1e-30)
            at.append(t)
            norms.append(values.square().sum(-1).sqrt())
            ranks.append(torch.special.entr(share).sum(-1).exp())
    if not at:
        raise ValueError(f"state_sizes: every={every} is longer than the {trace.k.shape[1]} tokens")
    return torch.tensor(at), torch.stack(norms), torch.stack(ranks)


def half_lives(trace: Trace) -> Tensor:
    """Tokens after which decay alone halves the state, `[H, channels]` (one channel where a head
    has one decay): ln 2 over the mean of -g; infinite without decay.
    """
    if trace.g is None:
        return torch.full((trace.k.shape[2], 1), math.inf)
    return math.log(2) / -trace.g.mean((0, 1)).clamp(max=-1e-12)


def gates(trace: Trace) -> dict[str, Tensor]:
    """`decay`: exp(g) `[B, T, H, channels]`; and of delta rules `beta` `[B, T, H]`, and `erase`,
    beta |k|^2: the share of what the key reads that is taken out (above 1 it turns sign).
    """
    found = {} if trace.g is None else {"decay": trace.g.exp()}
    if trace.beta is not None:
        found |= {"beta": trace.beta, "erase": trace.beta * trace.k.square().sum(-1)}
    return found


def eigenvalues(trace: Trace, tokens: int = 16) -> Tensor:
    """Eigenvalues of the transitions M_t, complex `[B, tokens, H, K]`, at `tokens` tokens spread
    evenly over the row.
    """
    T = trace.k.shape[1]
    at = torch.linspace(0, T - 1, min(tokens, T)).round().long().to(trace.k.device)
    return torch.linalg.eigvals(trace.transitions()[:, at])
