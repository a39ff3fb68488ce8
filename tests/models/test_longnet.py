# SPDX-License-Identifier: MIT
"""LongNet as an encoder, its presets and initialisation; as a decoder it is among the models of
every other test."""

import math

import pytest
import torch

from fla.layers import BlockSparseAttention, DilatedAttention
from fla.models import LongNetConfig, LongNetForCausalLM, LongNetModel
from tests.models.common import TINY, ids
from tests.processes import run

BRANCHES = dict(segment_lengths=[4, 16], dilation_rates=[1, 2])


def test_an_encoder_looks_both_ways_and_at_no_padding():
    torch.manual_seed(0)
    model = LongNetModel(LongNetConfig(**TINY, num_heads=4, causal=False, **BRANCHES)).eval()
    x = ids(1, 9)
    out = model(x)
    assert out.past_key_values is None
    changed = x.clone()
    changed[0, -1] = 5
    assert (model(changed).last_hidden_state[0, 0] != out.last_hidden_state[0, 0]).any()
    row = torch.cat([torch.full((1, 4), 7), x], 1)
    mask = torch.tensor([[0] * 4 + [1] * 9])
    padded = model(row, attention_mask=mask).last_hidden_state[:, 4:]
    assert torch.allclose(padded, out.last_hidden_state, atol=1e-5)
    with pytest.raises(ValueError, match="causal=False looks at tokens"):
        model(x, use_cache=True)


def test_a_language_model_looks_back_only():
    with pytest.raises(ValueError, match="causal=False sees the tokens"):
        LongNetForCausalLM(LongNetConfig(**TINY, num_heads=4, causal=False, **BRANCHES))


def test_presets_and_gains():
    assert LongNetConfig.preset("2.7b").num_hidden_layers == 32
    with pytest.raises(ValueError, match="'7b' is not one of 125m"):
        LongNetConfig.preset("7b")
    config = LongNetConfig(**TINY | dict(hidden_size=256), num_heads=4, **BRANCHES)
    layer = LongNetForCausalLM(config).model.layers[0]
    plain = math.sqrt(2 / (256 + 256))
    gain = math.sqrt(math.log(2 * config.num_hidden_layers))
    assert layer.attn.q_proj.weight.std().item() == pytest.approx(plain, rel=0.03)
    assert layer.attn.o_proj.weight.std().item() == pytest.approx(gain * plain, rel=0.03)


def test_wrong_layers_are_refused():
    with pytest.raises(ValueError, match=r"2 segment_lengths .* and 1 dilation_rates"):
        DilatedAttention(32, 4, segment_lengths=[2, 4], dilation_rates=[1])
    with pytest.raises(ValueError, match="pattern is 'diagonal'; expected one of local_window"):
        BlockSparseAttention(32, 4, pattern="diagonal")
    with pytest.raises(ValueError, match="expected window, at least window"):
        BlockSparseAttention(32, 4, pattern_options=dict(count=3))


def test_autocast_keeps_the_softmax_exact_and_has_gradients():
    torch.manual_seed(0)
    layer = DilatedAttention(32, 4, segment_lengths=[8, 32], dilation_rates=[1, 3])
    x = torch.randn(2, 50, 32, requires_grad=True)
    exact = layer(x)[0]
    want = torch.autograd.grad(exact.sum(), x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = layer(x)[0]
    assert o.dtype == torch.bfloat16
    found = torch.autograd.grad(o.float().sum(), x)[0]
    for got, ref in ((o, exact), (found, want)):
        assert (got.float() - ref).norm() < 0.02 * ref.norm()


def test_the_example_runs():
    done = run("examples/dilated_attention.py", check=True)
    losses = [float(x.split()[-1]) for x in done.stdout.splitlines() if x.startswith("step")]
    assert losses[-1] < losses[0] - 1
