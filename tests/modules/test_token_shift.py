# SPDX-License-Identifier: MIT
"""Token shift as a step of autograd, against plain autograd."""

import pytest
import torch

import fla.modules
from fla.modules.token_shift import TokenShift, token_shift, token_shift_ref
from tests.helpers import assert_same, gradients


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("bounds", [None, [0, 3, 3, 4, 9]])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("output_cache", [False, True])
def test_function_has_the_gradients_of_the_plain_form(bounds, given, output_cache):
    assert fla.modules.TokenShift is TokenShift
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    x = {"x": leaf(1, 9, 5) if bounds else leaf(2, 9, 5)}
    if given:
        x["cache"] = leaf(4 if bounds else 2, 5)
    got = TokenShift.apply(x["x"], cu_seqlens, x.get("cache"), output_cache, None)
    want = token_shift(**x, cu_seqlens=cu_seqlens, output_cache=True)
    assert (got[1] is None) is not output_cache
    got, want = got[: 1 + output_cache], want[: 1 + output_cache]
    for y, expected in zip(got, want, strict=True):
        assert_same(y, expected, "value")
    expected = gradients(list(want), x)
    for name, grad in gradients(list(got), x).items():
        assert_same(grad, expected[name], f"d{name}")


def test_gradient_checks_and_short_calls():
    x = leaf(2, 4, 3)
    assert torch.autograd.gradcheck(lambda x: TokenShift.apply(x)[0], (x,))
    assert_same(TokenShift.apply(x)[0], token_shift_ref(x), "x alone")


def test_table_of_chunks_changes_nothing():
    x, bounds = leaf(1, 5, 3), torch.tensor([0, 2, 5])
    got = token_shift(x, bounds, chunk_indices=torch.tensor([[0, 0], [1, 0]]))
    assert_same(got, token_shift_ref(x, bounds), "delta")
    with pytest.raises(ValueError, match="chunk_indices is given without cu_seqlens"):
        token_shift(x, chunk_indices=torch.tensor([[0, 0]]))
