# SPDX-License-Identifier: MIT
"""The short convolution against torch's conv1d, with state, boundaries and gradients."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fla.modules import ShortConvolution
from fla.modules.convolution import LongConvolution, causal_conv1d, causal_conv1d_update
from tests.helpers import assert_same, gradients

D = 6


def make(B=2, T=11, W=4, bias=True, N=None):
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x = {"x": leaf(B, T, D), "weight": leaf(D, W), "initial_state": leaf(N or B, D, W)}
    return x | ({"bias": leaf(D)} if bias else {})


@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_equals_conv1d_with_history(W, activation):
    x = make(W=W)
    y, final = causal_conv1d(**x, activation=activation, output_final_state=True)
    history = torch.cat([x["initial_state"], x["x"].transpose(1, 2)], -1)
    want = F.conv1d(history[..., 1:], x["weight"].unsqueeze(1), x["bias"], groups=D).transpose(1, 2)
    want = want if activation is None else F.silu(want)
    assert_same(y, want, "y")
    assert_same(final, history[..., -W:], "state")
    expected = gradients([want, history[..., -W:]], x)
    for name, grad in gradients([y, final], x).items():
        assert_same(grad, expected[name], f"d{name}")


def test_residual_is_added_after_the_activation():
    x = make()
    r = torch.randn(2, 11, D, dtype=torch.float64)
    plain, _ = causal_conv1d(**x, activation="silu")
    assert_same(causal_conv1d(**x, activation="silu", residual=r)[0], plain + r, "y")


@pytest.mark.parametrize("cut", [1, 2, 5, 10])
def test_split_is_whole_and_steps_continue(cut):
    x = make()
    rest = {n: t for n, t in x.items() if n not in ("x", "initial_state")}
    want, final = causal_conv1d(**x, output_final_state=True)
    first, state = causal_conv1d(
        x["x"][:, :cut], **rest, initial_state=x["initial_state"], output_final_state=True
    )
    outs = [first]
    for t in range(cut, 11):
        y, state = causal_conv1d(
            x["x"][:, t : t + 1], **rest, initial_state=state, output_final_state=True
        )
        outs.append(y)
    assert_same(torch.cat(outs, 1), want, "y")
    assert_same(state, final, "state")


def check_packed(lengths, leak=0.0):
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    x = make(B=1, T=bounds[-1], N=len(lengths))
    rest = {n: t for n, t in x.items() if n not in ("x", "initial_state")}
    packed = causal_conv1d(
        **x, cu_seqlens=torch.tensor(bounds), output_final_state=True, activation="silu"
    )
    if leak:
        packed = (packed[0] + leak * x["x"].roll(1, 1), packed[1])
    parts = [
        causal_conv1d(
            x["x"][:, a:b],
            **rest,
            initial_state=x["initial_state"][i : i + 1],
            output_final_state=True,
            activation="silu",
        )
        for i, (a, b) in enumerate(pairwise(bounds))
    ]
    want = [torch.cat([y for y, _ in parts], 1), torch.cat([s for _, s in parts])]
    for got, expected, what in zip(packed, want, ("y", "state"), strict=True):
        assert_same(got, expected, what)
    expected = gradients(want, x)
    for name, grad in gradients(list(packed), x).items():
        assert_same(grad, expected[name], f"d{name}")


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_packed_is_separate_for_any_boundaries(lengths):
    check_packed(lengths)


def test_a_leaking_convolution_would_fail():
    with pytest.raises(AssertionError):
        check_packed([3, 4], leak=1e-3)


def test_module_keeps_conv1d_weights_and_masks_without_changing_its_input():
    conv = ShortConvolution(D, 4, bias=True)
    assert conv.weight.shape == (D, 1, 4) and conv.state_size == 4 * D
    x, mask = torch.randn(2, 5, D), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    before = x.clone()
    y, _ = conv(x, mask=mask)
    assert torch.equal(x, before)
    torch.testing.assert_close(y[:1, 2:], conv(x[:1, 2:])[0])
    y, cache = conv(x, output_final_state=True)
    step, _ = conv.step(x[:, :1], None, cache)
    torch.testing.assert_close(step, conv(torch.cat([x, x[:, :1]], 1))[0][:, 5:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(weight=torch.zeros(D + 1, 4)), r"weight has shape \[7, 4\].*D is 6 in x"),
        (dict(initial_state=torch.zeros(2, D, 4)), "initial_state holds 2 states but 1"),
        (dict(cu_seqlens=torch.tensor([0, 4])), "ends at 4 but there are T=5"),
        (dict(activation="relu"), "activation is 'relu'"),
        (dict(backend="triton"), "cannot run on cpu"),
    ],
)
def test_wrong_arguments(arguments, message, no_interpreter):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{"x": torch.zeros(1, 5, D), "weight": torch.zeros(D, 4), **arguments})


def test_wrong_module_arguments():
    with pytest.raises(ValueError, match="activation is 'relu'"):
        ShortConvolution(D, 4, activation="relu")
    with pytest.raises(ValueError, match="exclude each other"):
        ShortConvolution(D, 4)(
            torch.zeros(1, 5, D), mask=torch.ones(1, 5), cu_seqlens=torch.tensor([0, 5])
        )


@pytest.mark.parametrize("shape", [(3, D), (3, 1, D), (1, 3, D)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_update_moves_its_cache_on(shape, activation):
    x = make(B=3, T=7)
    weight, bias, cache = (x[n].detach() for n in ("weight", "bias", "initial_state"))
    residual = torch.randn(3, 7, D, dtype=torch.float64)
    want, final = causal_conv1d(
        **x, residual=residual, activation=activation, output_final_state=True
    )
    place = cache = cache.clone()
    for t in range(7):
        token, added = x["x"][:, t].view(shape), residual[:, t].view(shape)
        y, cache = causal_conv1d_update(token, cache, added, weight, bias, activation)
        assert y.shape == shape and cache is place and not y.requires_grad
        assert_same(y.view(3, D), want[:, t], "y")
    assert_same(cache, final, "cache")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": None}, "weight is None; pass the filters"),
        ({"x": torch.zeros(2, 2, D)}, r"x has shape \[2, 2, 6\]; expected one token per sequence"),
        (
            {"cache": torch.zeros(2, D, 3)},
            r"cache has shape \[2, 6, 3\]; expected \[N=2, D=6, W=4\]",
        ),
        ({"residual": torch.zeros(2, 1)}, "residual has shape .* expected that of x"),
        ({"activation": "relu"}, "activation is 'relu'"),
    ],
)
def test_update_refuses(arguments, message):
    good = {"x": torch.zeros(2, D), "cache": torch.zeros(2, D, 4), "weight": torch.zeros(D, 4)}
    with pytest.raises(ValueError, match=message):
        causal_conv1d_update(**good | arguments)


def test_what_follows_from_the_boundaries_is_checked():
    x, bounds = make(B=1, N=2), torch.tensor([0, 4, 11])
    chunks = torch.tensor([[0, 0], [1, 0]])
    got, _ = causal_conv1d(**x, cu_seqlens=bounds, cu_seqlens_cpu=bounds, chunk_indices=chunks)
    assert_same(got, causal_conv1d(**x, cu_seqlens=bounds)[0], "y")
    conv = ShortConvolution(D, 4).double()
    packed = {"cu_seqlens": bounds}
    assert_same(conv(x["x"], **packed, chunk_indices=chunks)[0], conv(x["x"], **packed)[0], "conv")
    for wrong, message in (
        ({"cu_seqlens": bounds, "cu_seqlens_cpu": bounds - 1}, "cu_seqlens_cpu differs"),
        ({"cu_seqlens": bounds, "chunk_indices": bounds}, r"shape \[3\]; expected \[chunks, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            causal_conv1d(**x, **wrong)
    del x["initial_state"]
    with pytest.raises(ValueError, match="chunk_indices is given without cu_seqlens"):
        causal_conv1d(**x, chunk_indices=chunks)


def test_long_convolutions_are_importable_where_they_stood():
    from fla.modules import long_conv

    assert LongConvolution is long_conv.LongConvolution
