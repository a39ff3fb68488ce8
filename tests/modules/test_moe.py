# SPDX-License-Identifier: MIT
"""Mixture of experts against its equation, one token and one expert at a time."""

import pytest
import torch
import torch.nn.functional as F

from fla.modules import Experts, MixtureOfExperts
from fla.modules.moe import load_balance

OPTIONS = {
    "softmax": Experts(5, 2, 6),
    "raw": Experts(5, 3, 6, renormalize=False, scale=1.7),
    "shared": Experts(4, 1, 6, shared_size=10, shared_gate=True),
    "groups": Experts(
        6, 3, 6, shared_size=10, scoring="sigmoid", scale=2.5, num_groups=3, top_groups=2
    ),
    "all": Experts(3, 3, 6),
}


def build(name):
    layer = MixtureOfExperts(8, OPTIONS[name]).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if hasattr(layer, "correction_bias"):
        layer.correction_bias.normal_(std=0.3)
    return layer


def mlp(x, gate, up, down):
    return down @ (F.silu(gate @ x) * (up @ x))


def naive(layer, x):
    """The equation of `fla.modules.moe` for one token."""
    options = layer.options
    logits = layer.gate.weight @ x
    if options.scoring == "softmax":
        score = rank = logits.exp() / logits.exp().sum()
    else:
        score = 1 / (1 + (-logits).exp())
        rank = score + layer.correction_bias
    size = options.num_experts // options.num_groups
    groups = [
        sorted(rank[i * size : (i + 1) * size].tolist())[-2:] for i in range(len(rank) // size)
    ]
    best = sorted(range(len(groups)), key=lambda i: -sum(groups[i]))[: options.top_groups]
    allowed = [e for e in range(options.num_experts) if e // size in best]
    kept = sorted(allowed, key=lambda e: -rank[e].item())[: options.top_k]
    total = sum(score[e] for e in kept) if options.renormalize else 1
    y = 0
    for e in kept:
        gate, up = layer.experts.gate_up_proj[e].chunk(2)
        y = y + options.scale * score[e] / total * mlp(x, gate, up, layer.experts.down_proj[e])
    if options.shared_size:
        shared = layer.shared_expert
        weights = (shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
        factor = (layer.shared_expert_gate.weight @ x).sigmoid() if options.shared_gate else 1
        y = y + factor * mlp(x, *weights)
    return y


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_its_equation_and_so_are_its_gradients(name):
    layer = build(name)
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 7, 8, dtype=torch.float64)
    results = []
    for y in (layer(x), torch.stack([naive(layer, row) for row in x.flatten(0, 1)]).view_as(x)):
        inputs = [x, *layer.parameters()]
        results.append((y, *torch.autograd.grad((y * weight).sum(), inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_it_would_notice_a_wrong_expert():
    layer, x = build("softmax"), torch.randn(5, 8, dtype=torch.float64)
    want = torch.stack([naive(layer, row) for row in x])
    layer.experts.down_proj.data = layer.experts.down_proj.data.roll(1, 0)
    assert (layer(x) - want).abs().max() > 0.1


def test_no_tokens():
    assert build("shared")(torch.empty(1, 0, 8, dtype=torch.float64)).shape == (1, 0, 8)


def test_the_balance_loss_is_one_where_all_are_used_alike():
    p = torch.full((4, 4), 0.25)
    chosen = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3]])
    assert load_balance(p, chosen).item() == 1
    skewed = torch.tensor([[1.0, 0, 0, 0]] * 4)
    assert load_balance(skewed, torch.zeros(4, 1, dtype=torch.long)).item() == 4


def test_the_balance_loss_is_collected_in_training_alone():
    layer = MixtureOfExperts(8, Experts(4, 2, 6, balance_loss=0.5))
    assert layer.eval()(torch.randn(3, 8), with_loss=True)[1] is None
    _, loss = layer.train()(torch.randn(3, 8), with_loss=True)
    loss.backward()
    assert layer.gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_experts=4, top_k=5), "top_k is 5; expected 1 to 4"),
        (dict(num_experts=4, top_k=3, num_groups=2), "top_k is 3; expected 1 to 2"),
        (dict(num_experts=4, top_k=1, scoring="relu"), "scoring is 'relu'"),
        (dict(num_experts=4, top_k=1, num_groups=3), "multiple of num_groups=3"),
        (dict(num_experts=4, top_k=1, num_groups=2, top_groups=3), "top_groups is 3"),
        (dict(num_experts=4, top_k=1, shared_gate=True), "without a shared expert"),
        (dict(num_experts=4, top_k=1, experts=2), r"unknown fields \['experts'\]"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        Experts.of(dict(intermediate_size=6) | arguments)
