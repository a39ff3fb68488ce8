# SPDX-License-Identifier: MIT
"""Block-sparse attention against one softmax under the dense mask, in fp64."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fla.ops import block_sparse_attention as page
from fla.ops.block_sparse_attention import (
    BlockPattern,
    block_sparse_attention,
    naive_block_sparse_attention,
    topk_content,
)
from fla.ops.engine.attention import pieces
from tests.helpers import assert_same, error, gradients

PATTERNS = {
    "local": lambda n, **o: page.local_window(n, 9, **o),
    "strided": lambda n, **o: page.strided(n, 3, 2, **o),
    "dilated": lambda n, **o: page.dilated(n, [1, 3], **o),
    "global": lambda n, **o: page.global_local(n, 5, 4, **o),
    "hierarchical": lambda n, **o: page.hierarchical(n, [(1, 1), (2, 4)], **o),
    "random": lambda n, **o: page.random_blocks(n, 2, **o),
    "big bird": lambda n, **o: page.big_bird(n, 3, 5, 1, **o),
}
every_pattern = pytest.mark.parametrize("make", PATTERNS.values(), ids=PATTERNS.keys())
either = pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
OPTIONS = dict(block_size=8)


def rows(T=50, H=2, HQ=None, B=2, K=8, V=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, HQ or H, K), (B, T, H, K), (B, T, H, V))
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.to(dtype).requires_grad_() for x in made]


def compare(x, pattern, named=None, **options):
    want = naive_block_sparse_attention(*x, pattern, **options)
    got = block_sparse_attention(*x, pattern, **options)
    assert_same(got, want, "o")
    named = dict(zip("qkv", x, strict=True)) | (named or {})
    found, exact = gradients([got], named), gradients([want], named)
    for name, grad in found.items():
        assert_same(grad, exact[name], f"d{name}", 1e-10)


@every_pattern
@either
@pytest.mark.parametrize("T", [64, 50, 5, 0], ids=str)
def test_is_one_softmax(make, causal, T):
    compare(rows(T), make(T, causal=causal, **OPTIONS))


@every_pattern
@either
def test_density_is_that_of_the_mask(make, causal):
    for T in (48, 50, 7):
        pattern = make(T, causal=causal, **OPTIONS)
        every = T * (T + 1) / 2 if causal else T * T
        assert pattern.density() == pytest.approx(pattern.dense().sum().item() / every)
        assert pattern.density() <= 1


def random_pattern(T, size, step, causal, shape=(1, 1), share=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    blocks = (-(-T // step), -(-T // size))
    return BlockPattern(
        torch.rand(*shape, *blocks, generator=generator) < share, T, size, step, causal
    )


@given(
    T=st.integers(1, 40),
    step=st.sampled_from([1, 2, 4, 8]),
    causal=st.booleans(),
    shape=st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]),
    share=st.sampled_from([0.0, 0.3, 0.9]),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_pattern(T, step, causal, shape, share, seed):
    """Queries for which nothing is kept, blocks of queries that are smaller, its own for each head."""
    pattern = random_pattern(T, 8, step, causal, shape, share, seed)
    compare(rows(T, 2, 4), pattern)
    assert pattern.density() == pytest.approx(
        pattern.dense().double().sum((2, 3)).mean().item() / (T * (T + 1) / 2 if causal else T * T)
    )


@either
@pytest.mark.parametrize("step", [None, 4, 1])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_chosen_by_content(causal, step, gated):
    q, k, v = rows(50, 2, 2, V=5)
    pattern = topk_content(q, k, 3, query_block=step, causal=causal, gated=gated, **OPTIONS)
    own = torch.arange(pattern.kept.shape[2]) * pattern.query_block // 8
    assert pattern.kept[:, :, range(len(own)), own].all()
    empty = topk_content(q[:, :0], k[:, :0], 3, causal=causal, **OPTIONS)
    assert block_sparse_attention(q[:, :0], k[:, :0], v[:, :0], empty).shape == (2, 0, 2, 5)
    counts = pattern.kept.sum(-1)
    assert (counts <= 3).all() and (causal or (counts == 3).all())
    if gated:
        gate = pattern.gate.detach().requires_grad_()
        pattern = BlockPattern(pattern.kept, 50, 8, pattern.query_block, causal, gate)
        compare((q, k, v), pattern, dict(gate=gate))
    else:
        compare((q, k, v), pattern)


def test_a_gate_teaches_what_chooses():
    """Gradient reaches the queries and keys that chose, through the gate alone."""
    asks, offers = (x.detach().requires_grad_() for x in rows(50)[:2])
    x = rows(50)
    for gated in (False, True):
        pattern = topk_content(asks, offers, 3, causal=True, gated=gated, **OPTIONS)
        o = block_sparse_attention(*x, pattern)
        if gated:
            grads = torch.autograd.grad(o.square().sum(), (asks, offers))
            assert all(g.abs().max() > 1e-6 for g in grads)
        else:
            assert pattern.gate is None


@pytest.mark.parametrize("step", [None, 1])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_the_future_is_not_seen(step, gated):
    """Neither by attention nor by the choice of blocks."""
    q, k, v = (x.detach() for x in rows(50))

    def run(*x):
        options = dict(causal=True, query_block=step, gated=gated, **OPTIONS)
        return block_sparse_attention(*x, topk_content(x[0], x[1], 3, **options))

    whole = run(q, k, v)
    for t in (1, 8, 20, 33):
        changed = [torch.cat([x[:, :t], 10 * x[:, t:].flip(1)], 1) for x in (q, k, v)]
        assert_same(run(*changed)[:, :t], whole[:, :t], f"before {t}")


@either
def test_flex_attention_agrees(causal):
    """Which shows the mask it is given, too."""
    x = [y.detach().float() for y in rows(50, 2, 4)]
    for pattern in (
        PATTERNS["global"](50, causal=causal, **OPTIONS),
        random_pattern(50, 8, 8, causal, (2, 2), 0.3),
        topk_content(x[1], x[1], 2, causal=causal, gated=True, **OPTIONS),
    ):
        want, want_lse = block_sparse_attention(*x, pattern, return_lse=True)
        got, lse = block_sparse_attention(*x, pattern, backend="flex", return_lse=True)
        assert error(got, want) < 1e-5
        seen = want_lse > -torch.inf
        assert torch.equal(seen, lse > -torch.inf) and error(lse[seen], want_lse[seen]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(dtype):
    x = [y.detach().to(dtype) for y in rows(70)]
    pattern = PATTERNS["big bird"](70, causal=True, **OPTIONS)
    exact = naive_block_sparse_attention(*(y.double() for y in x), pattern)
    plain = naive_block_sparse_attention(*(y.float() for y in x), pattern).to(dtype)
    got = block_sparse_attention(*x, pattern)
    assert got.dtype == dtype
    assert error(got, exact) <= 2 * error(plain, exact) + torch.finfo(dtype).eps * exact.abs().max()


def test_parts_do_not_matter(monkeypatch):
    monkeypatch.setattr(pieces, "BYTES", 1)
    compare(rows(50, 2, 4), random_pattern(50, 8, 4, True, (2, 2)))


def test_registered_and_compiled():
    x, pattern = rows(20, dtype=torch.float32), PATTERNS["local"](20, **OPTIONS)
    gate = torch.randn(2, 2, 3, 3, requires_grad=True)
    for g in (None, gate):
        arguments = (*x, pattern.kept, g, [8, 8], True, 0.3)
        torch.library.opcheck(torch.ops.fla.block_sparse_attention, arguments)
    call = partial(block_sparse_attention, pattern=pattern)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*x), call(*x))


def test_a_union_keeps_what_either_keeps():
    parts = [PATTERNS[n](50, causal=True, **OPTIONS) for n in ("local", "strided")]
    union = parts[0] | parts[1]
    assert torch.equal(union.dense(), parts[0].dense() | parts[1].dense())
    with pytest.raises(ValueError, match="union of causal=True and causal=False"):
        parts[0] | PATTERNS["local"](50, **OPTIONS)


def test_what_cannot_be_is_refused():
    x, pattern = rows(), PATTERNS["local"](50, **OPTIONS)
    with pytest.raises(ValueError, match="pattern is a Tensor; pass a BlockPattern"):
        block_sparse_attention(*x, pattern.kept)
    with pytest.raises(ValueError, match=r"pattern is for 40 tokens.*T=50"):
        block_sparse_attention(*x, PATTERNS["local"](40, **OPTIONS))
    with pytest.raises(ValueError, match=r"query_block=3 must divide block_size=8"):
        BlockPattern(pattern.kept, 50, 8, 3)
    with pytest.raises(ValueError, match=r"kept is torch.bool \[1, 1, 7, 7\]; expected bool"):
        BlockPattern(pattern.kept, 90, 8, 8)
    with pytest.raises(ValueError, match="FlexAttention has no backward on CPUs"):
        block_sparse_attention(*x, pattern, backend="flex")
    with pytest.raises(ValueError, match=r"native.*no native kernel"):
        block_sparse_attention(*(y.float() for y in x), pattern, backend="native")
