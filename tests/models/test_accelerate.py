# SPDX-License-Identifier: MIT
"""transformers' own models with our convolution and norm in them: the same numbers, and the way back."""

import sys

import pytest
import torch
import transformers

import fla
from fla.models.provided.causal_conv1d import causal_conv1d_update
from tests.models.common import ids
from tests.models.test_convert import build


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "olmo_hybrid", "kimi_linear", "mamba2"])
def test_same_logits_gradients_and_generation_and_undone(name):
    model, x = build(name), ids(2, 9)

    def results():
        model.zero_grad()
        out = model(x, labels=x)
        out.loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        generated = model.generate(x, max_new_tokens=6, do_sample=False, use_cache=True)
        return out.logits.detach(), grads, generated

    logits, grads, generated = results()
    home = sys.modules[type(model).__module__]
    names = ("causal_conv1d_fn", "causal_conv1d_update")
    functions = [getattr(home, n) for n in names]
    with fla.accelerate(model) as swapped:
        lines = str(swapped)
        assert all(f is not getattr(home, n) for f, n in zip(functions, names, strict=True))
        assert "causal_conv1d_fn" in lines and "causal_conv1d_update" in lines
        assert ("RMSNormGated" in lines) == (name != "mamba2")
        ours, ours_grads, ours_generated = results()
        with pytest.raises(ValueError, match="holds no short convolution"):
            fla.accelerate(torch.nn.Linear(2, 2))
    assert (ours - logits).abs().max() < 2e-5 and torch.equal(generated, ours_generated)
    for a, b in zip(ours_grads, grads, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(1e-3, b.abs().max().item())
    assert str(swapped) == "nothing replaced"
    assert torch.equal(results()[0], logits)
    assert functions == [getattr(home, n) for n in names]
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kept", [2, 3, 4, 6])
def test_update_is_transformers_own(kept, tokens):
    theirs = transformers.models.qwen3_5.modeling_qwen3_5.causal_conv1d_update
    theirs = getattr(theirs, "__wrapped__", theirs)
    x, state, weight, bias = (torch.randn(*s) for s in ((2, 5, tokens), (2, 5, kept), (5, 4), (5,)))
    if kept < 3:  # fewer inputs than the filter reaches back
        with pytest.raises(ValueError, match="conv_state keeps 2 inputs"):
            causal_conv1d_update(x, state, weight, bias, "silu")
        return
    ours, mine = state.clone(), state.clone()
    want = theirs(x, mine, weight, bias, "silu")
    got = causal_conv1d_update(x, ours, weight, bias, "silu")
    torch.testing.assert_close((got, ours), (want, mine))
