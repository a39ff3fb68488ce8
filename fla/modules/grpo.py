# SPDX-License-Identifier: MIT
"""The loss of group relative policy optimisation; Shao et al. (2024), arXiv:2402.03300.

    logp_t = log softmax(logits_t)[id_{t+1}]        d_t = ref_logp_t - logp_t
    KL_t = exp(d_t) - d_t - 1
    loss_t = beta KL_t - A exp(logp_t - stop(logp_t))

so the loss is `beta KL - A`, and its gradient `beta (1 - exp(d)) - A` times that of logp. A is the
advantage of the whole completion. Gradients reach the logits alone.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fla._arguments import checked
from fla.core.checks import check_shapes
from fla.core.precision import promote_to_fp32

CHUNK_NUMBERS = 1 << 25  # logits that are in fp32 at a time


def _check(
    op: str,
    logits: Tensor,
    ref_logp: Tensor,
    input_ids: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
) -> None:
    sizes = check_shapes(
        op,
        ref_logp=(ref_logp, "B L"),
        advantages=(advantages, "B"),
        input_ids=(input_ids, "B P+L"),
        completion_mask=(mask, "B L"),
        logits=(logits, "B L+1 V"),
    )
    L = sizes["L"]
    if sizes["L+1"] != L + 1:
        raise ValueError(
            f"{op}: logits have {sizes['L+1']} rows but ref_logp {L}; expected one row more: the "
            "token before the completion predicts its first, and the last row predicts nothing"
        )
    if sizes["P+L"] < L:
        raise ValueError(
            f"{op}: input_ids has {sizes['P+L']} tokens; expected at least the {L} "
            "of the completion"
        )
    for name, x in (("ref_logp", ref_logp), ("advantages", advantages)):
        if x.requires_grad:
            raise ValueError(f"{op}: {name} requires a gradient, which ends here; detach it")


def _blocks(B: int, L: int, V: int) -> Iterator[tuple[slice, slice]]:
    """Rows and tokens of blocks that hold at most `CHUNK_NUMBERS` logits, or one token."""
    tokens = max(1, min(L, CHUNK_NUMBERS // max(V, 1)))
    rows = max(1, CHUNK_NUMBERS // max(V, 1) // max(L, 1))
    for b in range(0, B, rows):
        for t in range(0, L, tokens):
            yield slice(b, b + rows), slice(t, min(t + tokens, L))


class _Fused(torch.autograd.Function):
    """Keeps the logits, and of every token its logp and log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ref_logp: Tensor,
        ids: Tensor,
        advantages: Tensor,
        beta: float,
        mask: Tensor | None,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        (B, L), V = ids.shape, logits.shape[-1]
        wide = promote_to_fp32(logits[:0]).dtype
        lse = torch.empty(B, L, dtype=wide, device=logits.device)
        logp = torch.empty_like(lse)
        for rows, tokens in _blocks(B, L, V):
            z = logits[rows, tokens].to(wide)
            lse[rows, tokens] = z.logsumexp(-1)
            logp[rows, tokens] = z.gather(-1, ids[rows, tokens, None])[..., 0]
        logp -= lse
        ctx.save_for_backward(logits, ids, lse)
        d, gain = ref_logp.to(wide) - logp, advantages.to(wide).unsqueeze(-1)
        kl, slope = d.exp() - d - 1, -torch.expm1(d)
        loss, dlogp = beta * kl - gain, beta * slope - gain
        if mask is not None:
            kept = mask != 0
            loss, dlogp, kl, slope = (torch.where(kept, x, 0) for x in (loss, dlogp, kl, slope))
        ctx.slopes, ctx.inplace = (dlogp, slope), inplace
        return loss, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor, dkl: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids, lse = ctx.saved_tensors
        dlogp = dloss * ctx.slopes[0] + dkl * ctx.slopes[1]
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        for rows, tokens in _blocks(ids.shape[0], ids.shape[1], logits.shape[-1]):
            weight = dlogp[rows, tokens, None]
            dz = logits[rows, tokens].to(lse.dtype) - lse[rows, tokens, None]
            dz = dz.exp_().mul_(-weight)
            dz.scatter_add_(-1, ids[rows, tokens, None], weight)
            out[rows, tokens] = dz.to(out.dtype)
        out[:, -1] = 0
        return out, None, None, None, None, None, None


@checked
def fused_grpo_loss(
    logits: Tensor,
    ref_logp: Tensor,
    input_ids: Tensor,
    advantages: Tensor,
    beta: float = 0.1,
    completion_mask: Tensor | None = None,
    save_kl: bool = False,
    inplace: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The module's loss of every token `[B, L]`, in fp32 (fp64 for fp64 logits); with `save_kl` the
    pair (loss, KL). Beside the logits it keeps per token its id, its log-sum-exp and two slopes.

    logits `[B, L + 1, V]` begin at the token before the completion; ref_logp, completion_mask
    `[B, L]`; input_ids `[B, P + L]`, whose last L are the completion; advantages `[B]`. Where the
    mask is 0, loss, KL and gradient are. `inplace` lets the backward write the gradient over the
    logits, which nothing may read afterwards.

    Example:
        >>> logits, ids = torch.zeros(1, 3, 4, requires_grad=True), torch.tensor([[0, 1, 2]])
        >>> ref = torch.full((1, 2), 0.25).log()  # what the policy says, so there is no KL
        >>> fused_grpo_loss(logits, ref, ids, torch.ones(1)).tolist()
        [[-1.0, -1.0]]
    """
    op = "fused_grpo_loss"
    _check(op, logits, ref_logp, input_ids, advantages, completion_mask)
    ids = input_ids[:, input_ids.shape[1] - ref_logp.shape[1] :]
    loss, kl = _Fused.apply(logits, ref_logp, ids, advantages, beta, completion_mask, inplace)
    return (loss, kl) if save_kl else loss


@checked
def grpo_loss_torch(
    logits: Tensor,
    ref_logp: Tensor,
    input_ids: Tensor,
    advantages: Tensor,
    beta: float = 0.1,
    completion_mask: Tensor | None = None,
    save_kl: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fused_grpo_loss` line by line under plain autograd: it keeps the log-probabilities of the
    whole vocabulary.

    Example:
        >>> logits, ids = torch.zeros(1, 2, 4), torch.tensor([[0, 1]])
        >>> grpo_loss_torch(logits, torch.tensor([[0.25]]).log(), ids, torch.ones(1)).tolist()
        [[-1.0]]
    """
    _check("grpo_loss_torch", logits, ref_logp, input_ids, advantages, completion_mask)
    ids = input_ids[:, input_ids.shape[1] - ref_logp.shape[1] :]
    every = promote_to_fp32(logits[:, :-1]).log_softmax(-1)
    logp = every.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    d, gain = ref_logp.to(logp.dtype) - logp, advantages.to(logp.dtype).unsqueeze(-1)
    kl = d.exp() - d - 1
    loss = beta * kl - (logp - logp.detach()).exp() * gain
    if completion_mask is not None:
        kept = completion_mask != 0
        loss, kl = torch.where(kept, loss, 0), torch.where(kept, kl, 0)
    return (loss, kl) if save_kl else loss


@checked
def grpo_loss_with_old_logps(
    logps: Tensor,
    ref_logps: Tensor,
    old_logps: Tensor,
    pad_mask: Tensor,
    logits_to_keep: int,
    rewards: Tensor,
    beta: float = 0.2,
    epsilon: float = 0.2,
) -> Tensor:
    """The loss when the policy has moved since it sampled, `r = exp(logps - old_logps)`:

        mean over pad_mask of  beta KL - min(A r, A clip(r, 1 - epsilon, 1 + epsilon))

    with A the rewards `[B]` less their mean, over their sample deviation + 1e-8. The others are
    `[B, logits_to_keep]`; B is one group of completions, two at least.

    Example:
        >>> logps = torch.zeros(2, 3)
        >>> mask = torch.ones(2, 3, dtype=torch.bool)
        >>> grpo_loss_with_old_logps(logps, logps, logps, mask, 3, torch.tensor([0.0, 1.0])).item()
        0.0
    """
    op = "grpo_loss_with_old_logps"
    sizes = check_shapes(
        op,
        logps=(logps, "B L"),
        ref_logps=(ref_logps, "B L"),
        old_logps=(old_logps, "B L"),
        pad_mask=(pad_mask, "B L"),
        rewards=(rewards, "B"),
    )
    if sizes["B"] < 2:
        raise ValueError(
            f"{op}: there is {sizes['B']} completion; expected a group of 2 at least, as "
            "rewards are measured by their deviation"
        )
    if sizes["L"] != logits_to_keep:
        raise ValueError(
            f"{op}: logits_to_keep is {logits_to_keep} but logps have {sizes['L']} tokens; pass "
            "those of the completion alone"
        )
    rewards = promote_to_fp32(rewards)
    advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-8)).unsqueeze(-1)
    d, ratio = ref_logps - logps, (logps - old_logps).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    loss = beta * (d.exp() - d - 1) - torch.minimum(advantages * ratio, advantages * clipped)
    kept = pad_mask != 0
    return torch.where(kept, loss, 0).sum() / kept.sum()
