# SPDX-License-Identifier: MIT
"""The GRPO losses against their equations, token by token in fp64, with gradients."""

import math

import pytest
import torch

from fla.modules import grpo
from fla.modules.grpo import fused_grpo_loss, grpo_loss_torch, grpo_loss_with_old_logps
from tests.helpers import assert_same, assert_within_budget, gradients

B, P, L, V = 3, 2, 5, 11


def problem():
    ref = -torch.rand(B, L, dtype=torch.float64) * 4
    return {
        "logits": torch.randn(B, L + 1, V, dtype=torch.float64, requires_grad=True),
        "ref_logp": ref,
        "input_ids": torch.randint(V, (B, P + L)),
        "advantages": torch.randn(B, dtype=torch.float64),
    }


def literal(x, beta, mask):
    losses, kls = [], []
    for b in range(B):
        for t in range(L):
            z = x["logits"][b, t]
            logp = z[x["input_ids"][b, P + t]] - z.exp().sum().log()
            d = x["ref_logp"][b, t] - logp
            kl = d.exp() - d - 1
            loss = beta * kl - x["advantages"][b] * (logp - logp.detach()).exp()
            kept = 1 if mask is None else mask[b, t]
            losses.append(loss * kept)
            kls.append(kl * kept)
    return torch.stack(losses).view(B, L), torch.stack(kls).view(B, L)


@pytest.mark.parametrize("form", [fused_grpo_loss, grpo_loss_torch])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [1, 2 * V, 2 * L * V, 1 << 25])
def test_equals_the_equation(form, masked, block, monkeypatch):
    monkeypatch.setattr(grpo, "CHUNK_NUMBERS", block)
    x, mask = problem(), (torch.rand(B, L) > 0.4).long() if masked else None
    got = form(**x, beta=0.3, completion_mask=mask, save_kl=True)
    want = literal(x, 0.3, mask)
    for y, expected in zip(got, want, strict=True):
        assert_same(y, expected, "value")
    leaf = {"logits": x["logits"]}
    (dx,), (dwant,) = gradients(list(got), leaf).values(), gradients(list(want), leaf).values()
    assert_same(dx, dwant, "dlogits")
    assert not dx[:, -1].any()
    loss = form(**x, beta=0.3, completion_mask=mask)
    assert_same(loss, want[0], "loss alone")


def test_the_value_and_gradient_known_by_hand():
    logits = torch.zeros(1, 2, 4, dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[math.log(0.5)]], dtype=torch.float64)  # d = log 2
    loss = fused_grpo_loss(logits, ref, torch.tensor([[3, 1]]), torch.tensor([2.0]).double(), 0.1)
    assert_same(loss, torch.tensor([[0.1 * (1 - math.log(2)) - 2]], dtype=torch.float64), "loss")
    loss.sum().backward()
    slope = 0.1 * (1 - 2) - 2
    assert_same(logits.grad[0, 0], slope * torch.tensor([-0.25, 0.75, -0.25, -0.25]).double(), "d")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_place_writes_over_the_logits(dtype):
    x = problem()
    x["logits"] = x["logits"].detach().to(dtype).requires_grad_()
    expected = torch.autograd.grad(fused_grpo_loss(**x).sum(), x["logits"])[0]
    memory = x["logits"].data_ptr()
    (grad,) = torch.autograd.grad(fused_grpo_loss(**x, inplace=True).sum(), x["logits"])
    assert grad.data_ptr() == memory and torch.equal(grad, expected)


def test_half_precision_is_computed_in_fp32():
    x = problem()
    half = x | {"logits": x["logits"].detach().bfloat16().requires_grad_()}
    exact = x | {"logits": half["logits"].detach().double().requires_grad_()}
    single = x | {"logits": half["logits"].detach().float().requires_grad_()}
    loss, want = fused_grpo_loss(**half), fused_grpo_loss(**exact)
    assert loss.dtype == torch.float32
    plain = grpo_loss_torch(**single)
    assert_within_budget(loss, plain, want, "loss")
    (dx,) = torch.autograd.grad(loss.sum(), half["logits"])
    (plain,) = torch.autograd.grad(plain.sum(), single["logits"])
    (exact,) = torch.autograd.grad(want.sum(), exact["logits"])
    assert_within_budget(dx, plain.bfloat16(), exact, "dlogits")


def test_of_a_policy_that_moved():
    shape = (4, 6)
    logps, ref, old = (-torch.rand(shape, dtype=torch.float64) for _ in range(3))
    logps.requires_grad_()
    mask, rewards = torch.rand(shape) > 0.3, torch.randn(4, dtype=torch.float64)
    advantage = (rewards - rewards.sum() / 4) / (
        (((rewards - rewards.sum() / 4) ** 2).sum() / 3) ** 0.5 + 1e-8
    )
    total, count = 0, 0
    for b in range(4):
        for t in range(6):
            if mask[b, t]:
                r, d = (logps[b, t] - old[b, t]).exp(), ref[b, t] - logps[b, t]
                gain = min(advantage[b] * r, advantage[b] * r.clamp(0.9, 1.1))
                total, count = total - gain + 0.3 * (d.exp() - d - 1), count + 1
    got = grpo_loss_with_old_logps(logps, ref, old, mask, 6, rewards, beta=0.3, epsilon=0.1)
    assert_same(got, total / count, "loss")
    expected = gradients([total / count], {"logps": logps})["logps"]
    assert_same(gradients([got], {"logps": logps})["logps"], expected, "dlogps")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logits": torch.zeros(B, L, V)},
            "logits have 5 rows but ref_logp 5; expected one row more",
        ),
        (
            {"input_ids": torch.zeros(B, 2).long()},
            "input_ids has 2 tokens; expected at least the 5",
        ),
        ({"advantages": torch.zeros(1)}, "advantages has shape .*B is 3 in ref_logp"),
        ({"ref_logp": torch.zeros(B, L, requires_grad=True)}, "ref_logp requires a gradient"),
        ({"completion_mask": torch.zeros(B, L + 1)}, "completion_mask has shape"),
    ],
)
def test_bad_input(change, message):
    for form in (fused_grpo_loss, grpo_loss_torch):
        with pytest.raises(ValueError, match=message):
            form(**problem() | change)


def test_bad_groups():
    x = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="there is 1 completion; expected a group of 2"):
        grpo_loss_with_old_logps(x, x, x, x, 3, torch.zeros(1))
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="logits_to_keep is 2 but logps have 3 tokens"):
        grpo_loss_with_old_logps(x, x, x, x, 2, torch.zeros(2))
