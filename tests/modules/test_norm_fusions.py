# SPDX-License-Identifier: MIT
"""Norms before a linear layer, gated LayerNorm and the references, against torch's own in fp64."""

import pytest
import torch
import torch.nn.functional as F

from fla.modules import fused_norm_gate as G
from fla.modules import layernorm as N
from tests.helpers import assert_same, gradients


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def inputs():
    return {
        "x": leaf(2, 3, 8),
        "residual": leaf(2, 3, 8),
        "g": leaf(2, 3, 8),
        "norm_weight": leaf(8),
        "norm_bias": leaf(8),
        "linear_weight": leaf(5, 8),
        "linear_bias": leaf(5),
    }


def literal(x, rms, groups=1, eps=1e-5):
    """The norm with its sums written out."""
    total = x["x"] + x["residual"]
    parts = total.reshape(2, 3, groups, -1)
    mean = 0 if rms else parts.sum(-1, keepdim=True) / parts.shape[-1]
    square = ((parts - mean) ** 2).sum(-1, keepdim=True) / parts.shape[-1]
    y = ((parts - mean) * (square + eps) ** -0.5).reshape(total.shape)
    return y * x["norm_weight"] + x["norm_bias"], total


def agree(outputs, wanted, x):
    for got, want in zip(outputs, wanted, strict=True):
        assert_same(got, want, "value")
    expected = gradients(list(wanted), x)
    for name, grad in gradients(list(outputs), x).items():
        assert_same(grad, expected[name], f"d{name}")


LINEAR = {
    "layer": (N.layer_norm_linear, {}, False, 1),
    "rms": (N.rms_norm_linear, {}, True, 1),
    "group": (N.group_norm_linear, {"num_groups": 2}, False, 2),
    "group rms": (N.group_norm_linear, {"num_groups": 4, "is_rms_norm": True}, True, 4),
    "layer in groups": (N.layer_norm_linear, {"num_groups": 2}, False, 2),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_norm_then_linear(kind):
    form, options, rms, groups = LINEAR[kind]
    x = {name: value for name, value in inputs().items() if name != "g"}
    y, total = literal(x, rms, groups)
    want = F.linear(y, x["linear_weight"], x["linear_bias"])
    agree(form(**x, prenorm=True, **options), (want, total), x)
    assert_same(form(**x, **options), want, "without prenorm")


@pytest.mark.parametrize(
    ("module", "rms", "groups"),
    [
        (N.LayerNormLinear(8, bias=True), False, 1),
        (N.RMSNormLinear(8, bias=True), True, 1),
        (N.GroupNormLinear(2, 8, bias=True), False, 2),
    ],
)
def test_modules_take_the_linear_layer(module, rms, groups):
    x = inputs()
    module.double().load_state_dict({"weight": x["norm_weight"], "bias": x["norm_bias"]})
    want = F.linear(literal(x, rms, groups)[0], x["linear_weight"], x["linear_bias"])
    linear = (x["linear_weight"], x["linear_bias"])
    assert_same(module(x["x"], *linear, residual=x["residual"]), want, "y")
    with pytest.raises(ValueError, match=r"linear_weight has shape \[5, 7\]; expected \[out, 8\]"):
        module(x["x"], torch.zeros(5, 7))


def test_linear_is_in_its_own_dtype():
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    y, total = N.rms_norm_linear(torch.randn(2, 8), None, None, weight, None, prenorm=True)
    assert y.dtype == torch.bfloat16 and total.dtype == torch.float32


@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
@pytest.mark.parametrize("rms", [False, True])
def test_gated_norm(rms, activation):
    x = inputs()
    y, total = literal(x, rms, eps=1e-6)
    gate = x["g"].sigmoid() * (1 if activation == "sigmoid" else x["g"])
    form = G.rms_norm_gated if rms else G.layer_norm_gated
    names = ("x", "g", "norm_weight", "norm_bias", "residual")
    call = {name.removeprefix("norm_"): x[name] for name in names}
    got = form(**call, activation=activation, prenorm=True)
    agree(got, (y * gate, total), {name: x[name] for name in names})


@pytest.mark.parametrize("rms", [False, True])
def test_gated_norm_then_linear_has_every_gradient(rms):
    x = inputs()
    y, total = literal(x, rms, eps=1e-6)
    want = F.linear(y * F.silu(x["g"]), x["linear_weight"], x["linear_bias"])
    form = G.rms_norm_swish_gate_linear if rms else G.layer_norm_swish_gate_linear
    agree(form(**x, prenorm=True), (want, total), x)


def test_gated_modules():
    x, g = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    weight = torch.randn(5, 8, dtype=torch.float64)
    normed = F.layer_norm(x, (8,), eps=1e-5)
    for module in (G.FusedLayerNormSwishGate(8, bias=True), G.FusedLayerNormGated(8)):
        assert_same(module.double()(x, g), normed * F.silu(g), "gated")
    gated = G.FusedLayerNormGated(8, activation="sigmoid").double()
    assert_same(gated(x, g), normed * g.sigmoid(), "sigmoid")
    linear = G.FusedLayerNormSwishGateLinear(8).double()
    assert_same(linear(x, g, weight), (normed * F.silu(g)) @ weight.mT, "linear")
    linear = G.FusedRMSNormSwishGateLinear(8).double()
    want = (F.rms_norm(x, (8,), eps=1e-5) * F.silu(g)) @ weight.mT
    assert_same(linear(x, g, weight), want, "rms linear")
    assert list(linear.state_dict()) == ["weight"]
    for build in (G.FusedLayerNormGated, G.FusedRMSNormGated):
        with pytest.raises(ValueError, match=f"{build.__name__}: activation is 'relu'; expected"):
            build(8, activation="relu")


def test_references():
    x = inputs()
    call = {name: x[f"norm_{name}"] for name in ("weight", "bias")}
    call |= {"x": x["x"], "residual": x["residual"]}
    assert_same(N.layer_norm_ref(**call), literal(x, False)[0], "layer")
    assert_same(N.rms_norm_ref(**call), literal(x, True)[0], "rms")
    y, total = N.group_norm_ref(**call, num_groups=2, prenorm=True)
    assert_same(y, literal(x, False, 2)[0], "group")
    assert_same(total, x["x"] + x["residual"], "sum")
    module, other = N.GroupNormRef(2, 8, bias=True), N.GroupNorm(2, 8, bias=True)
    half = torch.randn(3, 8).half()
    torch.testing.assert_close(module(half), other(half))
    with pytest.raises(ValueError, match="num_groups is 3, which does not divide the 8 channels"):
        N.group_norm_ref(half, None, None, 3)
