# SPDX-License-Identifier: MIT
"""Properties x operators. A new line in OPS is tested here without a change."""

import dataclasses
import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fla.core.stage import use_backend
from fla.ops.engine.native import library
from fla.ops.engine.recurrence.recurrence import overwrite_states
from fla.ops.registry import OPS
from tests.helpers import matrix
from tests.ops import properties as P
from tests.ops.family import runs_on

every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.title)
BY_TITLE = {op.title: op for op in OPS}
GDN, KDA = BY_TITLE["Gated delta rule"], BY_TITLE["Kimi delta attention"]
SIMPLE_GLA = BY_TITLE["Simple GLA"]


@every_op
def test_page_is_the_equation(op):
    P.check_page_is_the_equation(op)


@every_op
@pytest.mark.parametrize("T", [1, 7, 63, 64, 65, 130])
def test_forms_agree(op, T):
    P.check_forms_agree(op, T)


@every_op
def test_forms_agree_with_grouped_value_heads(op):
    if not op.grouped:
        pytest.skip("no groups")
    P.check_forms_agree(op, 70, HV=6)


@every_op
@pytest.mark.parametrize("chunk_size", [1, 5, 16, 200])
def test_forms_agree_at_any_chunk_size(op, chunk_size):
    if "chunk_size" not in inspect.signature(op.chunk).parameters or op.grain > 1:
        pytest.skip("its chunk size is no choice")
    P.check_forms_agree(op, 33, chunk_size=chunk_size)


@every_op
@pytest.mark.parametrize("cut", [1, 64, 100, 129])
def test_split_is_whole(op, cut):
    if not op.state:
        pytest.skip("its state has a test of its own")
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
    P.check_packed_is_separate(GDN, lengths, chunk_size=chunk_size)


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


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), chunk_size=st.integers(1, 20))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_packed_is_separate_for_any_boundaries_and_vector_decay(lengths, chunk_size):
    if sum(lengths) == 0:
        lengths = [*lengths, 1]
    P.check_packed_is_separate(KDA, lengths, chunk_size=chunk_size)


@every_op
def test_no_tokens(op):
    states = op.states(2, 2, P.K, P.V)
    inputs = op.inputs(2, 0, 2, P.K, P.V, dtype=torch.float64)
    for form in (op.chunk, op.token):
        o, *finals = op.call(form, inputs, states)
        assert o.shape[:2] == (2, 0) and len(finals) == len(states)
        for final, state in zip(finals, states, strict=True):
            assert torch.equal(final, state)


@every_op
@pytest.mark.parametrize(("K", "V"), [(1, 1), (3, 7), (60, 100), (16, 1)])
def test_any_sizes(op, K, V):
    """K and V need not be powers of two, multiples of anything, or equal."""
    inputs = op.inputs(1, 20, 1, K, V, R=K // 2, dtype=torch.float64)
    P.results(op.call(op.chunk, inputs), P.reference(op, inputs), op.title)


@every_op
@pytest.mark.parametrize("decay", [-1e-6, -20.0, -1e4, -torch.inf], ids=str)
def test_extreme_decays_are_exact_and_finite(op, decay):
    """Strong decays at some tokens among mild ones: no NaN, and the mild ones keep their
    accuracy."""
    decays = [n for n, spec in op.tensors.items() if spec.endswith("decay")]
    if not decays:
        pytest.skip("no decay")
    inputs = op.inputs(1, 90, 2, P.K, P.V, dtype=torch.float64)
    for name in decays:
        inputs[name][:, 3::7] = decay
    inputs, states = P.leaves(inputs), P.start(op, 1)
    want = P.reference(op, inputs, states)
    got = op.call(op.chunk, inputs, states)
    P.results(got, want, op.title)
    o, *_ = op.call(op.chunk, {n: x.float() for n, x in inputs.items()}, states)
    assert (o.double() - want[0]).abs().max() < 1e-5 * want[0].abs().max()
    leaf = P.named(inputs, states)
    P.grads_equal(P.gradients(got, leaf), P.gradients(want, leaf), op.title)


# what `make test` traces: one operator of each engine and form, not those that take seconds
TRACED = {"Linear attention", "Gated linear attention", "Gated delta rule", "Kimi delta attention", "Comba", "RWKV-7", "Gated DeltaProduct", "Mamba", "Mamba-2", "HGRN", "Gated slot attention"}  # fmt: skip


@pytest.mark.parametrize(
    "op", matrix([(op,) for op in OPS], lambda op: op.title in TRACED), ids=lambda op: op.title
)
def test_compiles_without_a_graph_break(op):
    torch._dynamo.reset()
    whole = 20 if op.equation is None else 70  # loops of operators outside the family are unrolled
    inputs = op.inputs(1, whole, 2, P.K, P.V)
    for form, T in ((op.chunk, whole), (op.token, 1)):
        call = functools.partial(op.call, form)
        part = P.leaves(op.tokens(inputs, 0, T))
        eager = call(part)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(part)
        grads = P.gradients(list(compiled), part)
        for name, grad in P.gradients(list(eager), part).items():
            torch.testing.assert_close(grads[name], grad)
        for x, y in zip(compiled, eager, strict=True):
            torch.testing.assert_close(x, y)


BOUNDS = torch.tensor([0, 5, 70])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "title", ["Linear attention", "Gated delta rule", "Comba", "KDA", "RWKV-7"]
)
def test_registered_chunk(packed, title):
    T, H, K, V = 70, 2, P.K, P.V
    scalar, vector = torch.rand(1, T, H), torch.rand(1, T, H, K)
    low = F.normalize(torch.randn(1, T, H, K), dim=-1)
    gates = {
        "Linear attention": (None, None, None, None),
        "Gated delta rule": (-scalar, scalar, None, None),
        "Comba": (-scalar, scalar, None, low),
        "KDA": (-vector, scalar, None, None),
        "RWKV-7": (-vector, None, -low, low),
    }[title]
    tensors = [torch.randn(1, T, H, K), low, torch.randn(1, T, H, V), *gates]
    tensors.append(torch.randn(2 if packed else 1, H, K, V))
    leaf = [x if x is None else x.clone().requires_grad_() for x in tensors]
    arguments = (*leaf, BOUNDS if packed else None, 0.3, 64, title == "KDA", False, True)
    torch.library.opcheck(torch.ops.fla.chunk.default, arguments)


@pytest.mark.parametrize("packed", [False, True])
def test_registered_columns_and_scan(packed):
    x = [torch.randn(1, 70, 2, n).requires_grad_() for n in (P.K, P.K, P.V)]
    g = (-torch.rand(1, 70, 2, P.V)).requires_grad_()
    bounds, N = (BOUNDS, 2) if packed else (None, 1)
    state = torch.randn(N, 2, P.K, P.V).requires_grad_()
    columns = (*x, g, state, bounds, 0.3, 64, True)
    torch.library.opcheck(torch.ops.fla.chunk_columns.default, columns)
    state = torch.randn(N, 2, P.V).requires_grad_()
    torch.library.opcheck(torch.ops.fla.scan.default, (x[2], g, state, bounds, 64))


@every_op
def test_reverse_reads_from_the_end(op):
    if "reverse" not in inspect.signature(op.token).parameters:
        pytest.skip("no reverse argument")
    inputs = op.inputs(1, 30, 2, P.K, P.V, dtype=torch.float64)
    flipped = {n: x.flip(1) if "T" in op.axes(n) else x for n, x in inputs.items()}
    if op.name == "abc" or (op.name == "gsa" and "g" not in inputs):
        pytest.skip("runs forward only")
    o, *states = op.call(op.token, inputs, reverse=True)
    want_o, *want_states = op.call(op.token, flipped)
    P.results([o, *states], [want_o.flip(1), *want_states], op.title)
    packed = op.call(op.token, inputs, reverse=True, cu_seqlens=torch.tensor([0, 10, 30]))
    parts = [op.call(op.token, op.tokens(inputs, *s), reverse=True) for s in ((0, 10), (10, 30))]
    outs, *finals = zip(*parts, strict=True)
    P.results(packed, [torch.cat(outs, 1), *(torch.cat(x) for x in finals)], op.title)


def _leak(x):
    """One thousandth of the token before, across boundaries and batch-mates."""
    return x + 1e-3 * x.flatten(0, 1).roll(1, 0).view_as(x)


def _broken(op):
    def chunk(k, **kwargs):
        return op.chunk(k=_leak(k), **kwargs)

    def naive(g, **kwargs):
        return op.naive(g=g * 1.001, **kwargs)

    return dataclasses.replace(op, name="broken", chunk=chunk, naive=naive)


@pytest.mark.parametrize("op", [SIMPLE_GLA, KDA], ids=lambda op: op.title)
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
def test_a_broken_operator_fails(check, op):
    op = _broken(op)
    with pytest.raises(AssertionError):
        check(op)


@every_op
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_state_is_overwritten_on_request(op, backend):
    if op.equation is None or op.state != {"initial_state": "N HV K V"}:
        pytest.skip("it hands no state to the recurrence as it is")
    if not runs_on(op, backend) or (backend == "native" and library.MISSING):
        pytest.skip("no kernel")
    inputs = op.inputs(1, 10, 2, P.K, P.V)
    states = op.states(3, 2, P.K, P.V, dtype=torch.float32)
    bounds = torch.tensor([0, 3, 3, 10])
    with torch.no_grad(), use_backend(backend):
        for form in (op.token, op.chunk):
            want = op.call(form, inputs, states, cu_seqlens=bounds)
            given = [x.clone() for x in states]
            with overwrite_states():
                got = op.call(form, inputs, given, cu_seqlens=bounds)
            P.results(got, want, op.title, 0)
            assert got[1] is given[0]


def test_a_state_that_cannot_be_overwritten_is_refused():
    inputs, state = GDN.inputs(2, 1, 2, P.K, P.V), GDN.states(2, 2, P.K, P.V, dtype=torch.float32)
    with overwrite_states():
        with pytest.raises(ValueError, match=r"initial_state is torch.bfloat16.*float32"):
            GDN.call(GDN.token, inputs, [state[0].bfloat16()])
        with pytest.raises(ValueError, match=r"overwrite_states.. while a gradient is recorded"):
            GDN.call(GDN.token, P.leaves(inputs), state)
        transposed = state[0].mT.contiguous()
        with torch.no_grad():
            want = GDN.call(GDN.token, inputs, state[0].clone()[None])
            got = GDN.call(GDN.token, inputs, [transposed], state_v_first=True)
    assert got[1] is transposed
    P.results([got[0], transposed.mT], want, "V first", 1e-6)
