# SPDX-License-Identifier: MIT
"""Figures of traces against the operators themselves, and against what is known of small cases."""

import itertools
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from fla.analysis import (
    Trace,
    attention,
    eigenvalues,
    gates,
    half_lives,
    memory,
    plot_attention,
    plot_eigenvalues,
    plot_gates,
    plot_half_lives,
    plot_memory,
    plot_states,
    state_sizes,
    trace,
)
from fla.ops.registry import OPS
from tests.helpers import assert_same
from tests.models.common import MODELS, ids
from tests.models.common import make as make_model

FAMILY = [
    op
    for op in OPS
    if op.equation and "steps" not in op.equation(op.inputs(1, 4, 2, 4, 4, dtype=torch.float64))
]
PLOTS = [plot_states, plot_half_lives, plot_gates, plot_eigenvalues, plot_memory]


@pytest.mark.parametrize("op", FAMILY, ids=lambda op: op.name)
def test_implied_attention_is_the_operator(op):
    inputs = op.inputs(2, 19, 2, 5, 6, dtype=torch.float64)
    found = Trace.of(op, inputs)
    o = op.call(op.chunk, inputs)[0]
    A = attention(found)
    assert_same(torch.einsum("bhts,bshv->bthv", A, found.v).view_as(o), o, "o")
    assert not A.triu(1).any()


@pytest.mark.parametrize("name", ["gsa", "abc", "gated_oja_rule", "hgrn", "mamba", "rwkv4"])
@pytest.mark.parametrize("form", ["chunk", "token"])
def test_operators_with_a_transition_for_each_channel_are_traced(name, form):
    """The last of an operator's runs is what it computes, its value channels as heads."""
    op = next(op for op in OPS if op.name == name)
    inputs = op.inputs(2, 11, 2, 5, 6, HV=4, dtype=torch.float64)
    states = op.states(2, 2, 5, 6, HV=4)

    class Layer(torch.nn.Module):
        def forward(self, states=None):
            return op.call(getattr(op, form), inputs, states)

    with trace(layer := Layer()) as found:
        o = layer()[0].flatten(2)
    got = torch.einsum("bhts,bshv->bthv", attention(found[-1]), found[-1].v).flatten(2)
    if name == "rwkv4":  # and the token itself
        got = got + (1 - found[-1].q.flatten(2)) * inputs["v"]
    assert_same(got, o, name)
    with trace(layer) as found:
        o = layer(states)[0].flatten(2)
    last = found[-1]
    before, after = zip(*itertools.pairwise(last.states()), strict=True)
    read = torch.stack(before if last.read_before else after, 1)
    got = last.scale * torch.einsum("bthk,bthkv->bthv", last.q, read).flatten(2)
    if name == "rwkv4":
        got = got + (1 - last.q.flatten(2)) * inputs["v"]
    assert_same(got, o, f"{name} from a state")


def test_a_wrong_trace_would_be_found():
    op = next(op for op in FAMILY if op.name == "gated_delta_rule")
    inputs = op.inputs(1, 9, 1, 4, 4, dtype=torch.float64)
    found = Trace.of(op, inputs)
    wrong = Trace(**vars(found) | dict(g=found.g * 0.9))
    o = op.call(op.chunk, inputs)[0]
    with pytest.raises(AssertionError):
        assert_same(torch.einsum("bhts,bshv->bthv", attention(wrong), found.v), o, "o")


@pytest.mark.parametrize("name", [n for n in ("gated_deltanet", "gla", "mamba2", "rwkv6", "rwkv7", "kda", "comba", "delta_net", "retnet", "simple_gla") if n in MODELS])  # fmt: skip
def test_traces_of_a_model_are_what_its_layers_computed(name, monkeypatch):
    """The last state that a trace arrives at is the one the model's cache holds."""
    torch.manual_seed(0)
    model = make_model(name).double().eval()
    x = ids(2, 11)
    with trace(model) as found, torch.no_grad():
        cache = model(x, use_cache=True).past_key_values
    assert len(found) == model.config.num_hidden_layers
    for i, one in enumerate(found):
        assert f"layers.{i}." in one.layer
        *_, last = one.states()
        held = cache.read_state(i).recurrent
        held = held.mT if held.shape != last.shape else held
        assert_same(last.to(held), held, "state", 1e-5)


def test_outside_the_block_nothing_is_kept():
    model = make_model("gated_deltanet")
    with trace(model) as found:
        pass
    model(ids(1, 5))
    assert not found
    with trace(model, layers="layers.1.") as found:
        model(ids(1, 5))
    assert [x.layer for x in found] == ["model.layers.1.attn"]


def test_what_cannot_be_traced_is_refused():
    model = make_model("gated_deltanet")
    bounds = torch.tensor([0, 3, 9])
    with pytest.raises(ValueError, match="several sequences in a row"), trace(model):
        model(ids(1, 9), cu_seqlens=bounds)
    op = next(op for op in OPS if op.equation is None)
    with pytest.raises(ValueError, match="not a point of the one equation"):
        Trace.of(op, {})
    with trace(model) as found:
        cache = model(ids(1, 6), use_cache=True).past_key_values
        model(ids(1, 6), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="begins with a state"):
        attention(found[-1])
    with pytest.raises(ValueError, match="there are no traces"):
        plot_memory([])


def delta(T=12, K=4, beta=1.0, g=None):
    """One head that writes orthonormal keys in turn."""
    k = torch.eye(K, dtype=torch.float64)[torch.arange(T) % K].view(1, T, 1, K)
    v = torch.randn(1, T, 1, K, dtype=torch.float64)
    decay = None if g is None else torch.full((1, T, 1, 1), g, dtype=torch.float64)
    b = k if g is None else math.exp(g) * k
    strength = torch.full((1, T, 1), beta, dtype=torch.float64)
    return Trace("layer", "op", k, k, beta * v, decay, -beta * k, b, beta=strength)


def test_memory_eigenvalues_and_half_lives_of_known_cases():
    kept = memory(delta())[0]  # a key is read until it is written again, four tokens later
    assert_same(kept[:4], torch.ones(4, dtype=torch.float64), "kept")
    assert kept[4:].abs().max() < 1e-12
    fading = memory(delta(beta=0.0, g=-math.log(2) / 5))[0]
    assert_same(fading, 2.0 ** (-torch.arange(12, dtype=torch.float64) / 5), "fading")
    assert half_lives(delta(g=-math.log(2) / 5)).item() == pytest.approx(5)
    assert half_lives(delta()).item() == math.inf
    values = eigenvalues(delta(beta=2.0), 3)[0, :, 0].real.sort(-1).values
    assert_same(values, torch.tensor([[-1.0, 1, 1, 1]] * 3, dtype=torch.float64), "eigenvalues")
    assert gates(delta(beta=2.0))["erase"].eq(2).all()
    at, norms, ranks = state_sizes(delta(), every=4)
    assert at.tolist() == [4, 8, 12] and norms.shape == (3, 1, 1)
    assert (ranks > 1).all() and (ranks <= 4 + 1e-9).all()
    with pytest.raises(ValueError, match="every=99 is longer"):
        state_sizes(delta(), 99)


@pytest.mark.parametrize("plot", PLOTS, ids=lambda f: f.__name__)
def test_each_draws(plot, tmp_path):
    model = make_model("gated_deltanet")
    with trace(model) as found:
        model(ids(2, 24))
    plot(found).savefig(tmp_path / "a.png")
    plot_attention(found[0]).savefig(tmp_path / "b.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("a.png", "b.png"))


def test_transformers_own_models_are_traced():
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2,
        num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with trace(model) as found:
        model(ids(1, 9))
    assert [x.layer for x in found] == ["model.layers.0.linear_attn"]
    assert attention(found[0]).shape == (1, 4, 9, 9)
