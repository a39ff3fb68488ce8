# SPDX-License-Identifier: MIT
"""Properties x operators. A new line in OPS is tested here without a change."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fla.ops.registry import OPS
from tests.helpers import assert_same
from tests.ops import properties as P

every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


@every_op
def test_page_is_the_equation(op):
    P.check_page_is_the_equation(op)


@every_op
@pytest.mark.parametrize("T", [1, 7, 63, 64, 65, 130])
def test_forms_agree(op, T):
    P.check_forms_agree(op, T)


@every_op
def test_forms_agree_with_grouped_value_heads(op):
    P.check_forms_agree(op, 70, HV=6)


@every_op
@pytest.mark.parametrize("chunk_size", [1, 5, 16, 200])
def test_forms_agree_at_any_chunk_size(op, chunk_size):
    if op.name == "linear_attn":
        pytest.skip("its public functions have no chunk_size")
    P.check_forms_agree(op, 33, chunk_size=chunk_size)


@every_op
@pytest.mark.parametrize("cut", [1, 64, 100, 129])
def test_split_is_whole(op, cut):
    P.check_split_is_whole(op, 130, cut)


@every_op
@pytest.mark.parametrize("lengths", [[5, 0, 65, 64, 1, 0], [130], [0, 3], [64, 64, 64], [1, 1, 1]])
def test_packed_is_separate(op, lengths):
    P.check_packed_is_separate(op, lengths)


@every_op
def test_packed_is_separate_token_by_token(op):
    P.check_packed_is_separate(op, [5, 0, 70], op.token)


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), chunk_size=st.integers(1, 20))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_packed_is_separate_for_any_boundaries(lengths, chunk_size):
    if sum(lengths) == 0:
        lengths = [*lengths, 1]
    P.check_packed_is_separate(OPS[-1], lengths, chunk_size=chunk_size)


@every_op
def test_batch_mates_do_not_matter(op):
    P.check_batch_mates_do_not_matter(op)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(op, dtype):
    P.check_error_budget(op, dtype)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_budget(op, dtype):
    P.check_gradient_budget(op, dtype)


@every_op
def test_strides_do_not_matter(op):
    P.check_strides_do_not_matter(op)


@every_op
def test_no_tokens(op):
    state = P.random_state(2, 2)
    for form in (op.chunk, op.token):
        o, final = form(
            **op.inputs(2, 0, 2, P.K, P.V, dtype=torch.float64),
            initial_state=state,
            output_final_state=True,
            **op.fixed,
        )
        assert o.shape == (2, 0, 2, P.V) and torch.equal(final, state)


@every_op
@pytest.mark.parametrize("decay", [-1e-6, -20.0, -1e4, -torch.inf], ids=str)
def test_extreme_decays_are_exact_and_finite(op, decay):
    """Strong decays at some tokens among mild ones: no NaN, and the mild ones keep their
    accuracy."""
    if "g" not in op.gates:
        pytest.skip("no decay")
    inputs = op.inputs(1, 90, 2, P.K, P.V, dtype=torch.float64) | {
        "initial_state": P.random_state(1, 2)
    }
    inputs["g"][:, 3::7] = decay
    inputs = P.leaves(inputs)
    want = list(P.reference(op, inputs))
    got = P.call(op.chunk, op, inputs)
    for x, y, what in zip(got, want, ("o", "state"), strict=True):
        assert_same(x, y, what)
    single = {n: x.float() for n, x in inputs.items()}
    o, _ = P.call(op.chunk, op, single)
    assert (o.double() - want[0]).abs().max() < 1e-5 * want[0].abs().max()
    grads = P.gradients(got, inputs)
    for name, grad in P.gradients(want, inputs).items():
        assert_same(grads[name], grad, f"d{name}", rtol=1e-10)


@every_op
def test_compiles_without_a_graph_break(op):
    inputs = op.inputs(1, 70, 2, P.K, P.V)
    for form, T in ((op.chunk, 70), (op.token, 1)):
        call = functools.partial(form, output_final_state=True, **op.fixed)
        part = P.leaves({n: x[:, :T] for n, x in inputs.items()})
        eager, compiled = (
            call(**part),
            torch.compile(call, fullgraph=True, backend="aot_eager")(**part),
        )
        grads = P.gradients(list(compiled), part)
        for name, grad in P.gradients(list(eager), part).items():
            torch.testing.assert_close(grads[name], grad)
        for x, y in zip(compiled, eager, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_registered_operator(packed, gated):
    x = P.leaves(OPS[-1].inputs(1, 70, 2, P.K, P.V))
    state = P.random_state(2 if packed else 1, 2, torch.float32).requires_grad_()
    bounds = torch.tensor([0, 5, 70]) if packed else None
    gates = (x["g"], x["beta"]) if gated else (None, None)
    arguments = (x["q"], x["k"], x["v"], *gates, state, bounds, 0.3, 64, True, True)
    torch.library.opcheck(torch.ops.fla.chunk.default, arguments)


@every_op
def test_reverse_reads_from_the_end(op):
    if op.name not in ("linear_attn", "simple_gla"):
        pytest.skip("no reverse argument")
    inputs = op.inputs(1, 30, 2, P.K, P.V, dtype=torch.float64)
    flipped = {n: x.flip(1) for n, x in inputs.items()}
    o, state = P.call(op.token, op, inputs, reverse=True)
    want_o, want_state = P.call(op.token, op, flipped)
    assert_same(o, want_o.flip(1), "o")
    assert_same(state, want_state, "state")
    packed = P.call(op.token, op, inputs, reverse=True, cu_seqlens=torch.tensor([0, 10, 30]))
    parts = [
        P.call(op.token, op, {n: x[:, s] for n, x in inputs.items()}, reverse=True)
        for s in (slice(0, 10), slice(10, 30))
    ]
    assert_same(packed[0], torch.cat([p[0] for p in parts], 1), "packed o")
    assert_same(packed[1], torch.cat([p[1] for p in parts]), "packed state")


def _leak(x):
    """One thousandth of the token before, across boundaries and batch-mates."""
    return x + 1e-3 * x.flatten(0, 1).roll(1, 0).view_as(x)


def _broken(op):
    import dataclasses

    def chunk(q, k, v, g, *args, **kwargs):
        return op.chunk(q, _leak(k), v, g, *args, **kwargs)

    def naive(q, k, v, g, *args, **kwargs):
        return op.naive(q, k, v, g * 1.001, *args, **kwargs)

    return dataclasses.replace(op, name="broken", chunk=chunk, naive=naive)


@pytest.mark.parametrize(
    "check",
    [
        P.check_page_is_the_equation,
        functools.partial(P.check_forms_agree, T=65),
        functools.partial(P.check_split_is_whole, T=130, cut=64),
        functools.partial(P.check_packed_is_separate, lengths=[5, 65]),
        P.check_batch_mates_do_not_matter,
        functools.partial(P.check_error_budget, dtype=torch.float32),
        functools.partial(P.check_gradient_budget, dtype=torch.float32),
    ],
    ids=["page", "forms", "split", "packed", "batch", "budget", "gradients"],
)
def test_a_broken_operator_fails(check):
    op = _broken(OPS[1])
    with pytest.raises(AssertionError):
        check(op)
