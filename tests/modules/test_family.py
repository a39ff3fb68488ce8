# SPDX-License-Identifier: MIT
"""Feature maps, token shift, gated and grouped norms, activations, BitLinear, L2Wrap."""

import pytest
import torch
import torch.nn.functional as F

from fla.modules import FusedLinearCrossEntropyLoss, GroupNorm
from fla.modules import activations as A
from fla.modules import feature_map as M
from fla.modules.fused_bitlinear import BitLinear, FusedBitLinear, activation_quant, weight_quant
from fla.modules.l2warp import l2_warp
from fla.modules.layernorm import group_norm
from fla.modules.layernorm_gated import LayerNormGated, RMSNormGated
from fla.modules.token_shift import token_shift, token_shift_ref
from tests.helpers import assert_same, gradients


def rows(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_maps_whose_products_are_known():
    q, k = rows(2, 5, 6).unbind()
    dot = (q * k).sum(-1)
    taylor = M.TaylorFeatureMap(6)
    x = dot / 6**0.5
    assert_same((taylor(q) * taylor(k)).sum(-1), 1 + x + x**2 / 2, "taylor")
    square = M.RebasedFeatureMap(6, use_gamma=False, use_beta=False, normalize=False)
    assert_same((square(q) * square(k)).sum(-1), dot**2 / 6, "rebased")
    rebased = M.RebasedFeatureMap(6).double()
    assert_same(rebased(q, flatten=False), F.layer_norm(q, (6,)), "rebased, unflattened")


@pytest.mark.parametrize(
    ("build", "width"),
    [
        (lambda: M.HedgehogFeatureMap(6), 12),
        (lambda: M.T2RFeatureMap(6, dot_dim=4, bias=True), 4),
        (lambda: M.DPFPFeatureMap(6, nu=3), 36),
        (lambda: M.HadamardFeatureMap(6), 6),
        (lambda: M.LearnableOuterProductFeatureMap(6, 4), 10),
        (lambda: M.LearnablePolySketchNonNegativeFeatureMap(6, 4, degree=4), 10),
        (M.ReLUFeatureMap, 6),
        (M.SquaredReLUFeatureMap, 6),
        (M.GELUFeatureMap, 6),
        (M.SwishFeatureMap, 6),
        (M.SigmoidFeatureMap, 6),
    ],
)
def test_maps_have_their_width_and_a_gradient(build, width):
    module, x = build().double(), rows(2, 3, 6).requires_grad_()
    y = module(x)
    assert y.shape == (2, 3, width)
    grads = gradients([y], {"x": x, **dict(module.named_parameters())})
    assert all(g.isfinite().all() for g in grads.values())
    signed = (
        M.SwishFeatureMap,
        M.GELUFeatureMap,
        M.HadamardFeatureMap,
        M.LearnableOuterProductFeatureMap,
        M.LearnablePolySketchNonNegativeFeatureMap,
    )
    assert isinstance(module, signed) or (y >= 0).all()


def test_hedgehog_is_a_softmax_of_both_signs():
    x = rows(3, 6)
    assert_same(
        M.HedgehogFeatureMap(6).double()(x), torch.cat([2 * x, -2 * x], -1).softmax(-1), "hedgehog"
    )
    x = rows(3, 2)
    both = torch.cat([x.relu(), (-x).relu()], -1)
    assert_same(M.DPFPFeatureMap(2, nu=1)(x), both * both.roll(1, -1), "dpfp")
    with pytest.raises(ValueError, match="degree is 3"):
        M.LearnablePolySketchNonNegativeFeatureMap(6, degree=3)


def test_token_shift_keeps_to_its_sequence():
    x = rows(1, 7, 3).requires_grad_()
    bounds = torch.tensor([0, 2, 2, 7])
    assert_same(token_shift(x), token_shift_ref(x), "dense")
    assert_same(token_shift(x, bounds), token_shift_ref(x, bounds), "packed")
    first, last = token_shift(x[:, :3], output_cache=True)
    second = token_shift(x[:, 3:], cache=last)
    assert_same(torch.cat([first, second], 1), token_shift(x), "continued")
    empty = rows(3, 3)
    _, lasts = token_shift(x, bounds, empty, output_cache=True)
    assert_same(lasts[1], empty[1], "a sequence without tokens keeps its last one")
    with pytest.raises(ValueError, match="cache holds 2 states"):
        token_shift(x, bounds, empty[:2])


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("group_size", [None, 4])
def test_norms_gated_as_in_mamba2(before, group_size):
    x, z = rows(2, 2, 3, 8).unbind()
    for cls, plain in ((RMSNormGated, F.rms_norm), (LayerNormGated, F.layer_norm)):
        module = cls(8, 1e-5, group_size, before).double()
        torch.nn.init.normal_(module.weight)
        width = group_size or 8

        def norm(y, module=module, plain=plain, width=width):
            parts = y.unflatten(-1, (-1, width))
            return plain(parts, (width,), eps=1e-5).flatten(-2) * module.weight

        want = norm(x) * F.silu(z) if before else norm(x * F.silu(z))
        assert_same(module(x, z), want, cls.__name__)
        assert_same(module(x), norm(x), "without gate")
    with pytest.raises(ValueError, match="group_size is 3"):
        RMSNormGated(8, group_size=3)(x.float())


def test_group_norm_is_torchs():
    x = rows(5, 8)
    module = GroupNorm(2, 8, bias=True).double()
    torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(module.bias)
    assert_same(module(x), F.group_norm(x, 2, module.weight, module.bias, 1e-5), "group norm")
    y, total = group_norm(x, None, None, residual=x, prenorm=True, num_groups=4)
    assert_same(total, 2 * x, "residual")
    assert_same(y, F.group_norm(2 * x, 4, eps=1e-5), "normed sum")
    rms = GroupNorm(2, 8, is_rms_norm=True).double()(x)
    assert_same(rms, F.rms_norm(x.view(5, 2, 4), (4,), eps=1e-5).flatten(1), "rms")
    with pytest.raises(ValueError, match="num_groups is 3"):
        GroupNorm(3, 8)


def test_activations():
    x, y = rows(2, 3, 8).unbind()
    assert_same(A.sqrelu(x), x.relu() ** 2, "sqrelu")
    assert_same(A.sigmoidglu(x, y), x.sigmoid() * y, "sigmoidglu")
    assert_same(A.logsigmoid(x, 2.0), F.logsigmoid(x) / 2, "logsigmoid")
    W = rows(4, 8)
    assert_same(A.powglu_linear(x, y, W), A.powglu(x, y) @ W.T, "powglu_linear")
    assert_same(A.sigmoidglu_linear(x, y, W), (x.sigmoid() * y) @ W.T, "sigmoidglu_linear")
    assert_same(A.bias_gelu_impl(x, y), F.gelu(x + y, approximate="tanh"), "bias_gelu")
    assert set(A.ACT2FN) == {
        "relu", "sigmoid", "logsigmoid", "silu", "swish", "sqrelu", "gelu", "bias_gelu",
    }  # fmt: skip


def test_powglu_has_its_published_values_and_gradients():
    x = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    want = torch.tensor([2.0842, -0.26894, 0.18412], dtype=torch.float64)
    assert (A.powglu(x, torch.ones_like(x)) - want).abs().max() < 5e-5
    x, y = rows(2, 3, 8).unbind()
    x[0, 0], x[0, 1] = 0.0, 1e-300
    leaves = {"x": x.requires_grad_(), "y": y.requires_grad_()}
    power = x.clamp(min=0) ** (2 / (x.clamp(min=0).sqrt() + 1))
    o = A.powglu(x, y, 2.0)
    assert_same(o, torch.where(x > 0, power, x) * x.sigmoid() * y, "powglu")
    assert all(g.isfinite().all() for g in gradients([o], leaves).values())
    x, W = rows(4, 8), rows(3, 8)
    x = (x + 0.1 * x.sign()).requires_grad_()
    y = rows(4, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: A.powglu_linear(x, y, W, power=3.0), (x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_powglu_rounds_once(dtype):
    x, y = rows(2, 64, 8).to(dtype).unbind()
    assert torch.equal(A.powglu(x, y), A.powglu(x.float(), y.float()).to(dtype))


def test_bit_linear_rounds_and_passes_gradients_through():
    layer, x = BitLinear(8, 4).double(), rows(3, 8).requires_grad_()
    y = F.rms_norm(x, (8,), eps=1e-8)
    want = activation_quant(y) @ weight_quant(layer.weight).T
    assert_same(layer(x), want, "y")
    levels = (weight_quant(layer.weight) / layer.weight.abs().mean()).round(decimals=6)
    assert set(levels.unique().tolist()) <= {-1.0, 0.0, 1.0}
    steps = activation_quant(y) * 127 / y.abs().amax(-1, keepdim=True)
    assert (steps - steps.round()).abs().max() < 1e-9 and steps.abs().max() <= 128
    grads = gradients([layer(x)], {"x": x, "W": layer.weight})
    assert all(g.abs().max() > 0 for g in grads.values())
    assert FusedBitLinear(8, 4).state_dict().keys() == {"weight", "norm.weight"}


@pytest.mark.parametrize(
    "labels", [[1, 2, 3, 4], [1, -100, 3, -100], [-100] * 4, [5, 6, 7, -100]], ids=str
)
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_l2_warp_is_what_the_fused_loss_does(labels, num_chunks):
    x, W, target = rows(4, 8).requires_grad_(), rows(9, 8).requires_grad_(), torch.tensor(labels)
    logits, leaves = x @ W.T, {"x": x, "W": W}
    plain = F.cross_entropy(logits, target, reduction="sum") / max(1, int((target >= 0).sum()))
    loss = l2_warp(plain, logits, 1.0)
    want = gradients([loss], leaves)
    module = FusedLinearCrossEntropyLoss(
        use_l2warp=True, l2_penalty_factor=1.0, num_chunks=num_chunks
    )
    fused = module(x, target, W)
    assert_same(fused, loss, "loss")
    for name, grad in gradients([fused], leaves).items():
        assert_same(grad, want[name], f"d{name}")
    plain = F.cross_entropy(x @ W.T, target, reduction="sum")
    assert (want["W"] - gradients([plain], {"W": W})["W"]).abs().max() > 1e-3
