# SPDX-License-Identifier: MIT
"""Dilated attention against the equation with all multiplicities, in fp64."""

import copy
import pickle
import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fla.ops.dilated_attention import (
    coverage_report,
    dilated_attention,
    dilated_attention_step,
    geometric_schedule,
    naive_dilated_attention,
)
from fla.ops.engine.attention import flash, pieces
from tests.helpers import assert_same, error, gradients

BRANCHES = {
    "divide": dict(segment_lengths=[8, 16, 64], dilation_rates=[1, 2, 4]),
    "do not divide": dict(segment_lengths=[7, 16, 30], dilation_rates=[1, 3, 6]),
    "longer than all": dict(segment_lengths=[16, 500], dilation_rates=[1, 5]),
    "one": dict(segment_lengths=[500], dilation_rates=[1]),
}
by_branches = pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES.keys())
either = pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])


def make(T=50, H=3, HQ=None, B=2, K=8, V=8, dtype=torch.float64, S=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, T, HQ or H, K), (B, S or T, H, K), (B, S or T, H, V))
    rows = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.to(dtype).requires_grad_() for x in rows]


def compare(x, branches, causal, **options):
    want = naive_dilated_attention(*x, **branches, causal=causal, **options)
    got = dilated_attention(*x, **branches, causal=causal, **options)
    assert_same(got, want, "o")
    named = dict(zip("qkv", x, strict=True))
    found, exact = gradients([got], named), gradients([want], named)
    for name, grad in found.items():
        assert_same(grad, exact[name], f"d{name}", 1e-10)


@by_branches
@either
@pytest.mark.parametrize(("T", "H"), [(64, 3), (50, 4), (50, 5), (5, 2), (1, 1), (0, 2)], ids=str)
def test_is_the_equation(branches, causal, T, H):
    compare(make(T, H), branches, causal)


@either
@pytest.mark.parametrize(("K", "V"), [(8, 5), (3, 20), (1, 1)], ids=str)
def test_any_sizes_and_grouped_queries(causal, K, V):
    compare(make(50, 2, 6, K=K, V=V), BRANCHES["do not divide"], causal)


@either
def test_offsets_and_heads_of_branches(causal):
    x, branches = make(50, 4), BRANCHES["divide"]
    compare(x, branches, causal, head_offsets=[3, 0, 7, 2])
    heads = [[0, 1], [2], [1, 3]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(x, branches, causal, branch_heads=heads, scale=0.7)
    o, lse = dilated_attention(*x, **branches, causal=causal, branch_heads=heads, return_lse=True)
    assert not o[:, 1::2, 2].any() and (lse[:, 1::2, 2] == -torch.inf).all()  # on no grid
    per_query = dict(head_offsets=[3, 3, 0, 0])
    y = make(50, 2, 4)
    want = dilated_attention(*y, **branches, head_offsets=[3, 0])
    assert torch.equal(dilated_attention(*y, **branches, **per_query), want)


@given(
    T=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    rates=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    causal=st.booleans(),
    suffix=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_branches(T, lengths, rates, causal, suffix):
    branches = dict(segment_lengths=lengths, dilation_rates=[1, *rates][: len(lengths)])
    compare(make(min(suffix, T), 2, 4, S=T, B=1), branches, causal)


@by_branches
@either
def test_packed_is_separate(branches, causal):
    x, bounds = make(50, 3, B=1), [0, 13, 13, 14, 50]
    packed = dilated_attention(*x, **branches, causal=causal, cu_seqlens=torch.tensor(bounds))
    parts = [
        dilated_attention(*(y[:, a:b] for y in x), **branches, causal=causal)
        for a, b in pairwise(bounds)
    ]
    named = dict(zip("qkv", x, strict=True))
    assert_same(packed, torch.cat(parts, 1), "o")
    got, want = gradients([packed], named), gradients([torch.cat(parts, 1)], named)
    assert all(error(got[n], want[n]) < 1e-10 for n in named)


@either
def test_one_branch_of_rate_one_is_softmax_attention(causal):
    q, k, v = make(50, 2, 4)
    heads_first = [y.transpose(1, 2) for y in (q, k, v)]
    want = F.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True)
    got = dilated_attention(q, k, v, **BRANCHES["one"], causal=causal)
    assert_same(got, want.transpose(1, 2), "o")


@by_branches
def test_rows_are_averages_and_the_future_is_not_seen(branches):
    q, k, v = make()
    ones = dilated_attention(q, k, torch.ones_like(v), **branches, causal=True)
    assert_same(ones, torch.ones_like(ones), "of ones")
    assert_same(
        dilated_attention(q, k, 10 * v, **branches),
        10 * dilated_attention(q, k, v, **branches),
        "10 v",
    )
    whole = dilated_attention(q, k, v, **branches, causal=True)
    for n in (1, 17, 31):
        part = dilated_attention(*(y[:, :n] for y in (q, k, v)), **branches, causal=True)
        assert_same(whole[:, :n], part, f"the first {n}")


def test_a_token_reaches_exactly_its_keys():
    """The gradient of o_t in v_s is there where M is, and nowhere else."""
    q, k, v = make(30, 2, B=1)
    branches = BRANCHES["do not divide"]
    zero = torch.zeros_like(q)
    o = dilated_attention(zero, k, v, **branches, causal=True)
    M = torch.zeros(2, 30, 30, dtype=torch.float64)
    for w, r in zip(*branches.values(), strict=True):
        for h in range(2):
            for start in range(0, 30, w):
                grid = [t for t in range(start, min(start + w, 30)) if (t - start - h) % r == 0]
                for i, t in enumerate(grid):
                    M[h, t, grid[: i + 1]] += 1
    for t in (0, 8, 15, 29):
        (dv,) = torch.autograd.grad(o[0, t].sum(), v, retain_graph=True)
        assert_same(dv[0, :, :, 0].T, M[:, t] / M[:, t].sum(-1, keepdim=True), f"token {t}")


@by_branches
def test_a_step_is_the_last_row(branches):
    q, k, v = make(50, 2, 4)
    whole = naive_dilated_attention(q, k, v, **branches, causal=True)
    for t in (0, 6, 7, 29, 49):
        got = dilated_attention_step(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], **branches)
        assert_same(got, whole[:, t : t + 1], f"token {t}")
    lengths = torch.tensor([50, 31])  # the second row is padded on the left
    shifted = [torch.stack([y[0], torch.cat([y[1, 31:], y[1, :31]])]) for y in (k, v)]
    query = torch.stack([q[0, 49:], q[1, 30:31]])
    got = dilated_attention_step(query, *shifted, **branches, lengths=lengths)
    assert_same(got[0, 0], whole[0, 49], "first")
    assert_same(got[1, 0], whole[1, 30], "second")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(dtype):
    """Against the equation in fp64, no worse than twice its own plain evaluation in fp32."""
    x = [y.detach().to(dtype) for y in make(70, 4)]
    branches = BRANCHES["do not divide"]
    exact = naive_dilated_attention(*(y.double() for y in x), **branches, causal=True)
    plain = naive_dilated_attention(*(y.float() for y in x), **branches, causal=True).to(dtype)
    got = dilated_attention(*x, **branches, causal=True)
    assert got.dtype == dtype
    unit = torch.finfo(dtype).eps * exact.abs().max()
    assert error(got, exact) <= 2 * error(plain, exact) + unit


def test_parts_and_blocks_do_not_matter(monkeypatch):
    x = make(50, 3, 6, V=5)
    monkeypatch.setattr(pieces, "BYTES", 1)
    monkeypatch.setattr(flash, "ROWS", 3)
    compare(x, BRANCHES["divide"], True)


def test_registered_and_compiled():
    x, branches = make(20, 2, dtype=torch.float32), BRANCHES["divide"]
    arguments = (*x, None, [8, 16], [1, 2], [0, 1], [True] * 4, True, 0.3)
    torch.library.opcheck(torch.ops.fla.dilated_attention, arguments)
    compiled = torch.compile(lambda *x: dilated_attention(*x, **branches), fullgraph=True)
    assert torch.equal(compiled(*x), dilated_attention(*x, **branches))


def test_what_cannot_be_is_refused():
    q, k, v = make()
    for change, said in {
        (("dilation_rates", (1, 2)),): r"3 segment_lengths \[8, 16, 64\] and 2 dilation_rates",
        (("segment_lengths", (8, 0, 3)),): r"segment_lengths is \[8, 0, 3\]; expected one positive",
        (("head_offsets", (1, 2)),): r"head_offsets is \[1, 2\]; expected 3 numbers",
        (("branch_heads", ((0,), (1,))),): "branch_heads is .*expected for each of 3 branches",
        (("branch_heads", ((0,), (1,), (3,))),): "list of heads below 3",
        (("cu_seqlens", torch.tensor([0, 50])),): "cu_seqlens was given with batch size 2",
    }.items():
        with pytest.raises(ValueError, match=said):
            dilated_attention(q, k, v, **BRANCHES["divide"] | dict(change))
    with pytest.raises(ValueError, match=r"native.*no native kernel"):
        floats = (y.float() for y in (q, k, v))
        dilated_attention(*floats, **BRANCHES["divide"], backend="native")
    with pytest.raises(ValueError, match="differ within a group of 2"):
        dilated_attention(*make(H=2, HQ=4), **BRANCHES["divide"], head_offsets=[0, 1, 0, 0])
    with pytest.raises(ValueError, match="q has T=50 tokens and k has S=20"):
        dilated_attention(q, k[:, :20], v[:, :20], **BRANCHES["one"])
    with pytest.raises(ValueError, match=r"q has T=50 tokens.*one query"):
        dilated_attention_step(q, k, v, **BRANCHES["one"])
    with pytest.warns(RuntimeWarning, match=r"no dilation rate of .2. is 1"):
        dilated_attention(q, k, v, segment_lengths=[8], dilation_rates=[2])


def test_reports_count_what_the_oracle_counts():
    """The share of served pairs and the scores per token, from all M."""
    heads, T, branches = 3, 48, dict(segment_lengths=[16, 48], dilation_rates=[2, 4])
    with pytest.warns(RuntimeWarning):
        report = coverage_report(*branches.values(), heads)
    k = torch.zeros(1, T, heads, 1, dtype=torch.float64)
    _, lse = dilated_attention(k, k, k, **branches, return_lse=True)
    counts = lse[0].exp()
    assert report.pairs == pytest.approx(counts.mean().item())
    assert report.blind == pytest.approx((counts == 0).double().mean().item())
    assert report.residues == [2, 3] and report.keys == [8, 12]
    assert report.served == pytest.approx([0.5, 0.25])
    assert geometric_schedule(70_000, 2048, 4) == ([2048, 8192, 32768, 131072], [1, 4, 16, 64])
    with pytest.raises(ValueError, match="ratio=1"):
        geometric_schedule(100, 8, 1)


def test_nothing_is_kept_between_calls():
    x = make(20, 2)
    first = dilated_attention(*x, **BRANCHES["divide"])
    assert torch.equal(first, dilated_attention(*x, **BRANCHES["divide"]))
    clone = pickle.loads(pickle.dumps(copy.deepcopy([y.detach() for y in x])))
    assert torch.equal(first, dilated_attention(*clone, **BRANCHES["divide"]))
