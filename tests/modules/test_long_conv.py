# SPDX-License-Identifier: MIT
"""Long convolutions against their sums in fp64: no token sees a later one."""

import math

import pytest
import torch
import torch.nn.functional as F

from fla.modules import ImplicitLongConvolution, LongConvolution
from fla.modules.long_conv import PositionalEmbedding, fft_conv
from tests.helpers import assert_same, gradients


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def literal(x, f, f_rev=None):
    """x `[B, D, T]`, f `[D, taps]`."""
    T = x.shape[-1]
    rows = []
    for t in range(T):
        y = x[..., t] + sum(f[:, s] * x[..., t - s] for s in range(min(t + 1, f.shape[1])))
        if f_rev is not None:
            y = y + sum(f_rev[:, s] * x[..., t + s] for s in range(min(T - t, f.shape[1])))
        rows.append(y)
    return torch.stack(rows, -1)


@pytest.mark.parametrize("taps", [3, 8, 12])
@pytest.mark.parametrize("both", [False, True])
def test_equals_the_sum(taps, both):
    x = {"u": leaf(2, 3, 8), "k": leaf(3, taps)} | ({"k_rev": leaf(3, taps)} if both else {})
    y, want = fft_conv(**x, dropout_mask=None, gelu=False), literal(*x.values())
    assert_same(y, want, "y")
    expected = gradients([want], x)
    for name, grad in gradients([y], x).items():
        assert_same(grad, expected[name], f"d{name}")


def test_gelu_then_mask_and_batched_filters():
    u, k, mask = leaf(2, 3, 5), leaf(3, 5), torch.tensor([[1.0, 0, 2], [0, 1, 1]]).double()
    want = F.gelu(literal(u, k)) * mask[..., None]
    assert_same(fft_conv(u, k, mask), want, "y")
    assert_same(fft_conv(u, k.expand(2, 3, 5), mask), want, "a filter per row")


@pytest.mark.parametrize("max_len", [4, 8, 12, 64])
def test_no_token_sees_a_later_one(max_len):
    conv = LongConvolution(3, max_len).double()
    x = leaf(2, 8, 3)
    other = torch.cat([x[:, :5], leaf(2, 3, 3)], 1)
    assert_same(conv(other)[:, :5], conv(x)[:, :5], "the past")
    want = literal(x.transpose(1, 2), conv.filter).transpose(1, 2)
    assert_same(conv(x), want, "y")


def test_implicit_filters():
    conv = ImplicitLongConvolution(3, 10, d_emb=5, d_hidden=4).double()
    names = {"pos_emb.z", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"}
    assert set(conv.state_dict()) == names and not conv.pos_emb.z.requires_grad
    f = conv.mlp(conv.pos_emb.z[0, :8]).mT
    x = leaf(2, 8, 3)
    assert_same(conv(x), literal(x.transpose(1, 2), f).transpose(1, 2), "y")
    conv(x).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in conv.mlp.parameters())


def test_positions():
    z = PositionalEmbedding(5, 4).z[0]
    for t in range(4):
        w = 2 * math.pi * t / 4
        want = [
            t / 3,
            *(math.cos(f * w) for f in (1e-4, 1)),
            *(-math.sin(f * w) for f in (1e-4, 1)),
        ]
        assert torch.allclose(z[t], torch.tensor(want), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PositionalEmbedding(1, 4), "emb_dim is 1; expected an odd number from 3 up"),
        (lambda: ImplicitLongConvolution(3, 4, d_emb=4), "d_emb is 4; expected an odd number"),
        (
            lambda: ImplicitLongConvolution(3, 4)(torch.zeros(1, 5, 3)),
            "x has 5 tokens but max_len is 4",
        ),
        (
            lambda: fft_conv(torch.zeros(2, 3, 4), torch.zeros(4, 4), None),
            "k has shape .*D is 3 in u",
        ),
        (
            lambda: fft_conv(torch.zeros(2, 3, 4), torch.zeros(5, 3, 4), None),
            r"k has shape \[5, 3, 4\]; expected filters of every channel",
        ),
        (
            lambda: fft_conv(
                torch.zeros(2, 3, 4), torch.zeros(3, 4), None, k_rev=torch.zeros(3, 5)
            ),
            r"k_rev has shape \[3, 5\]; expected that of k",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
