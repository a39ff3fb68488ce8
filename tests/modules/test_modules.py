# SPDX-License-Identifier: MIT
"""Norms, rotary, MLP, l2norm against torch's own functions or their equations; errors by their message."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from fla.modules import (
    FusedRMSNormGated,
    GatedMLP,
    L2Norm,
    LayerNorm,
    RMSNorm,
    RotaryEmbedding,
)
from fla.modules.activations import logsigmoid, sigmoidglu, swiglu, swiglu_linear
from fla.modules.layernorm import layer_norm, rms_norm
from fla.modules.mlp import intermediate_width
from fla.modules.rotary import rotary_embedding, rotary_embedding_ref
from tests.helpers import assert_same, gradients

D = 12


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("ours", "torchs"), [(RMSNorm, nn.RMSNorm), (LayerNorm, nn.LayerNorm)])
def test_norms_equal_torch(ours, torchs):
    a, b = ours(D, bias=ours is LayerNorm).double(), torchs(D, eps=1e-5).double()
    nn.init.normal_(a.weight)
    b.load_state_dict(a.state_dict())
    x = leaf(3, 5, D)
    assert_same(a(x), b(x), "y")
    y, total = a(x, residual=2 * x, prenorm=True)
    assert_same(total, 3 * x, "residual")
    assert_same(y, b(3 * x), "y of the sum")


def test_norm_options():
    x, r = torch.randn(2, 3, D, dtype=torch.bfloat16), torch.randn(2, 3, D, dtype=torch.bfloat16)
    y, total = rms_norm(x, None, torch.ones(D), r, prenorm=True, residual_in_fp32=True)
    assert total.dtype == torch.float32 and y.dtype == torch.bfloat16
    assert_same(total, r.float() + x, "fp32 residual")
    assert layer_norm(x, None, None, prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32
    want = F.rms_norm((r.float() + x), (D,), eps=1e-5) + 1
    assert (y.float() - want).abs().max() < 0.02
    assert RMSNorm(D, elementwise_affine=False).weight is None
    assert "affine=True" in repr(RMSNorm(D))


@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
def test_gated_norm(activation):
    norm = FusedRMSNormGated(D, activation=activation).double()
    nn.init.normal_(norm.weight)
    x, g = leaf(2, 3, D), leaf(2, 3, D)
    act = torch.sigmoid if activation == "sigmoid" else F.silu
    assert_same(norm(x, g), F.rms_norm(x, (D,), norm.weight, 1e-5) * act(g), "y")
    y, total = norm(x, g, residual=x, prenorm=True)
    assert_same(total, 2 * x, "residual")
    assert_same(y, norm(2 * x, g), "y of the sum")
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        FusedRMSNormGated(D, activation="gelu")


def test_l2norm_divides_by_the_norm_and_survives_zero():
    x = leaf(4, D)
    assert_same(L2Norm(eps=0.0)(x), F.normalize(x, dim=-1), "unit")
    zero = torch.zeros(2, D, requires_grad=True)
    y = L2Norm(output_dtype=torch.float64)(zero)
    assert y.dtype == torch.float64
    assert torch.autograd.grad(y.sum(), zero)[0].isfinite().all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_a_rotation_by_position(interleaved):
    """Scores depend on distances alone, and channel pairs turn by t * base^(-2i/R)."""
    rope = RotaryEmbedding(8, interleaved=interleaved)
    q, k = torch.randn(2, 1, 1, 1, D, dtype=torch.float64).expand(2, 1, 9, 1, D)
    q_r, k_r = rope(q, k)
    scores = torch.einsum("bihd,bjhd->ij", q_r, k_r)
    for i in range(1, 8):
        assert scores.diagonal(i).std() < 1e-6 and scores.diagonal(-i).std() < 1e-6
    assert_same(q_r[..., 8:], q[..., 8:], "channels beyond dim")
    angle = torch.tensor(3.0) * 10000.0 ** (-2 * 1 / 8)
    a, b = (2, 3) if interleaved else (1, 5)
    want = q[0, 3, 0, a] * angle.cos() - q[0, 3, 0, b] * angle.sin()
    assert abs(q_r[0, 3, 0, a] - want) < 1e-6


def test_rotary_offsets_boundaries_and_scale():
    rope = RotaryEmbedding(D)
    q, k = torch.randn(2, 1, 9, 2, D)
    whole, _ = rope(q, k)
    later, _ = rope(q[:, 4:], k[:, 4:], seqlen_offset=4)
    torch.testing.assert_close(later, whole[:, 4:])
    packed, _ = rope(q, k, cu_seqlens=torch.tensor([0, 4, 9]))
    torch.testing.assert_close(packed[:, :4], whole[:, :4])
    torch.testing.assert_close(packed[:, 4:], rope(q[:, 4:], k[:, 4:])[0])
    rows, _ = rope(
        q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), seqlen_offset=torch.tensor([0, 4])
    )
    torch.testing.assert_close(rows[1, :5], rope(q, k, seqlen_offset=4)[0][0, :5])
    scaled_q, scaled_k = RotaryEmbedding(D, scale_base=512.0)(q, k)
    plain_q, plain_k = whole, rope(q, k)[1]
    torch.testing.assert_close(scaled_q[:, 0], plain_q[:, 0])
    same = torch.einsum("bthd,bthd->bth", scaled_q, scaled_k)
    torch.testing.assert_close(same, torch.einsum("bthd,bthd->bth", plain_q, plain_k))
    assert (scaled_q[:, 8].norm() - plain_q[:, 8].norm()).abs() > 1e-3
    with pytest.raises(ValueError, match="dim is 7"):
        RotaryEmbedding(7)


@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_linear_has_the_gradients_of_its_parts(bias):
    x = {"gate": leaf(2, 3, D), "up": leaf(2, 3, D), "weight": leaf(5, D)}
    if bias:
        x["bias"] = leaf(5)
    y = swiglu_linear(*x.values())
    want = F.linear(swiglu(x["gate"], x["up"]), x["weight"], x.get("bias"))
    assert_same(y, want, "y")
    expected = gradients([want], x)
    for name, grad in gradients([y], x).items():
        assert_same(grad, expected[name], name)


def test_mlp():
    assert intermediate_width(2048, 4) == 5632 and intermediate_width(64, None) == 256
    fused, plain = (
        GatedMLP(D, intermediate_size=20),
        GatedMLP(D, intermediate_size=20, fuse_swiglu=False),
    )
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, D)
    torch.testing.assert_close(fused(x), plain(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused(x).float().sum().backward()
    assert fused.down_proj.weight.grad.dtype == torch.float32
    with pytest.raises(ValueError, match="hidden_act is 'gelu'"):
        GatedMLP(D, hidden_act="gelu")


@pytest.mark.parametrize("fuse", [False, True])
def test_powlu_mlp(fuse):
    from fla.modules.activations import powglu

    mlp = GatedMLP(D, intermediate_size=20, hidden_act="powlu", fuse_swiglu=fuse, powglu_power=2.0)
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    mlp.double()
    want = powglu(mlp.gate_proj(x), mlp.up_proj(x), 2.0) @ mlp.down_proj.weight.mT
    leaves = {"x": x, **dict(mlp.named_parameters())}
    assert_same(mlp(x), want, "y")
    expected = gradients([want], leaves)
    for name, grad in gradients([mlp(x)], leaves).items():
        assert_same(grad, expected[name], f"d{name}")


class Adapted(torch.nn.Module):
    """A linear layer with an adapter of rank 2 beside it, whose weight is the base's."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_a_layer_in_the_place_of_down_proj_is_called():
    mlp, x = GatedMLP(D, intermediate_size=20).double(), torch.randn(3, D, dtype=torch.float64)
    plain, base = mlp(x), mlp.down_proj
    mlp.down_proj = Adapted(base).double()
    y = mlp(x)
    assert (y - plain).abs().max() > 1e-3
    y.sum().backward()
    assert mlp.down_proj.up.weight.grad.abs().sum() > 0
    merged = mlp.down_proj.up.weight @ mlp.down_proj.down.weight
    base.weight.data += merged
    mlp.down_proj = base
    assert_same(mlp(x), y, "merged")
    with base.register_forward_hook(lambda module, args, y: 2 * y):
        assert_same(mlp(x), 2 * y, "hook")


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_by_a_table(interleaved):
    """Positions from offsets and boundaries, and over the input's memory."""
    x = torch.randn(2, 5, 3, 10, dtype=torch.float64)
    angles = torch.randn(9, 4, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    want = rotary_embedding_ref(x, cos, sin, interleaved)
    torch.testing.assert_close(rotary_embedding(x, cos, sin, interleaved), want)
    offsets = torch.tensor([1, 4])
    got = rotary_embedding(x, cos, sin, interleaved, seqlen_offsets=offsets)
    for b in range(2):
        at = slice(1, 6) if b == 0 else slice(4, 9)
        row = rotary_embedding_ref(x[b : b + 1], cos[at], sin[at], interleaved)
        torch.testing.assert_close(got[b : b + 1], row)
    bounds = torch.tensor([0, 2, 5])
    got = rotary_embedding(x[:1], cos, sin, interleaved, cu_seqlens=bounds)
    parts = [rotary_embedding_ref(x[:1, a:b], cos, sin, interleaved) for a, b in ((0, 2), (2, 5))]
    torch.testing.assert_close(got, torch.cat(parts, 1))
    y = x.clone()
    assert rotary_embedding(y, cos, sin, interleaved, inplace=True) is y and torch.equal(
        y, rotary_embedding(x, cos, sin, interleaved)
    )
    with pytest.raises(ValueError, match="cos has 9 positions, but x reaches position 9"):
        rotary_embedding(x, cos, sin, seqlen_offsets=5)
    with pytest.raises(ValueError, match="pass a table"):
        rotary_embedding(x, cos[None, :5], sin[None, :5], seqlen_offsets=1)
    with pytest.raises(ValueError, match="pos_idx_in_fp32 is False"):
        RotaryEmbedding(8, pos_idx_in_fp32=False)
    q = torch.randn(1, 5, 2, 8)
    plain, sized = (RotaryEmbedding(8, device="cpu")(q, q, **o) for o in ({}, {"max_seqlen": 99}))
    assert torch.equal(plain[0], sized[0])


@pytest.mark.parametrize("gate", [swiglu, sigmoidglu])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gate_rounds_once(gate, dtype):
    x, y = torch.randn(2, 4096).to(dtype).unbind()
    exact = gate(x.double(), y.double())
    with torch.no_grad():
        assert torch.equal(gate(x, y), gate(x.float(), y.float()).to(dtype))
        limit = torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + torch.finfo(dtype).smallest_normal
        assert ((gate(x, y).double() - exact).abs() <= limit).all()
        halved = logsigmoid(x, 16.0)
        want = torch.nn.functional.logsigmoid(x.double()) / 16
        assert (halved.double() - want).abs().max() <= torch.finfo(dtype).eps / 2 * want.abs().max()
