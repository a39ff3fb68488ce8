# SPDX-License-Identifier: MIT
"""The checks that the ranks of a test run: each against the same computation in one process, in fp64."""

import inspect
import json
import os
import re
import sys
import traceback
import warnings
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from itertools import accumulate, pairwise, product

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from dilated_attention_pytorch import (
    BlockSparseRingDilatedAttention,
    DilatedAttention,
    DistributedImprovedDilatedAttention,
    RingDilatedAttention,
    RingDilatedAttentionV2Collective,
    SparsePatternConfig,
)
from fla.core.parallel import current
from fla.distributed import reduce_gradients, sequence_parallel
from fla.layers import BlockSparseAttention
from fla.modules.convolution import ShortConvolution, causal_conv1d
from fla.modules.token_shift import token_shift
from fla.ops import cp
from fla.ops.block_sparse_attention import big_bird, block_sparse_attention
from fla.ops.delta_rule import chunk_delta_rule
from fla.ops.dilated_attention import dilated_attention
from fla.ops.registry import OPS
from fla.ops.ring_attention import naive_ring_attention, ring_attention, unzigzag, zigzag
from tests.models.common import MODELS, ids
from tests.models.common import make as make_model

OWN = ("log_linear_attn", "deltaformer", "ttt", "titans", "mesa_net", "mamba3")
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def lengths_of(total, size, kind):
    """Even, not divisible, a rank without tokens."""
    if kind == "even":
        return [total // size + (p < total % size) for p in range(size)]
    parts = [1, total - 1] if size == 2 else [2, 0, total - 5, 3]
    return parts if kind == "uneven" else parts[::-1]


def ends_of(lengths):
    return list(accumulate(lengths, initial=0))


def close(got, want, what, rtol=1e-10):
    assert got.shape == want.shape, f"{what}: {list(got.shape)} instead of {list(want.shape)}"
    if got.numel():
        error = (got - want).abs().max().item()
        assert error <= rtol * max(1.0, want.abs().max().item()), f"{what}: off by {error:.2e}"


def compare(run, tensors, lengths, rank, shared=(), along=None, on_ranks=None, order=lambda x: x):
    """`run(**tensors)` -> (o, *finals) whole, and from shards of every tensor with tokens: outputs,
    states and the sum of the ranks' gradients. `on_ranks` runs shards in place of `run`, with no
    context around it; `order` puts the tokens of a whole row in the order of the shards.
    """
    along = along or {}
    ends = ends_of(lengths)
    whole = {n: x.clone().requires_grad_() for n, x in tensors.items()}
    want, *finals = run(**whole)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(5), dtype=want.dtype)
    final_weights = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(6), dtype=x.dtype)
        for x in finals
    ]
    loss = (want * weights).sum() + sum(
        (x * w).sum() for x, w in zip(finals, final_weights, strict=True)
    )
    grads = torch.autograd.grad(loss, list(whole.values()), allow_unused=True)

    def cut(n, x):
        if n in shared:
            return x.clone()
        f = along.get(n, 1)
        return order(x)[:, ends[rank] * f : ends[rank + 1] * f].clone()

    mine = {n: cut(n, x).requires_grad_() for n, x in tensors.items()}
    with nullcontext() if on_ranks else sequence_parallel() as parallel:
        got, *got_finals = (on_ranks or run)(**mine)
    part = slice(ends[rank], ends[rank + 1])
    close(got, order(want)[:, part], "o")
    for x, y in zip(got_finals, finals, strict=True):
        close(x, y, "final state")
    # the final state is on every rank; its weight is spread over them
    loss = (got * order(weights)[:, part]).sum()
    loss = loss + sum((x * w).sum() for x, w in zip(got_finals, final_weights, strict=True)) / len(
        lengths
    )
    found = torch.autograd.grad(loss, list(mine.values()), allow_unused=True)
    for (n, x), grad, exact in zip(mine.items(), found, grads, strict=True):
        grad = torch.zeros_like(x) if grad is None else grad
        exact = torch.zeros_like(tensors[n]) if exact is None else exact
        if n in shared:
            grad = grad.contiguous()
            dist.all_reduce(grad)
            close(grad, exact, f"d{n}")
        else:
            close(grad, cut(n, exact), f"d{n}")
    return parallel


def family():
    return [op for op in OPS if op.name not in OWN]


def op_check(op, packed):
    def run_check(rank, size):
        for kind in ("even", "uneven", "reversed"):
            T = 23
            lengths = lengths_of(T, size, kind)
            bounds = torch.tensor([0, 6, 6, 7, 20, 23] if packed else [0, T])
            inputs = op.inputs(1 if packed else 2, T, 2, 5, 6, dtype=torch.float64)
            states = op.states(len(bounds) - 1 if packed else 2, 2, 5, 6)
            names = [f"state{i}" for i in range(len(states))]
            along = {n: 2 if "T*n" in op.axes(n) else 1 for n in inputs}
            shared = {n for n in inputs if not {"T", "T*n"} & set(op.axes(n))} | set(names)

            def run(op=op, names=names, bounds=bounds, **x):
                own = [x.pop(n) for n in names]
                options = dict(cu_seqlens=bounds) if packed else {}
                return op.call(op.chunk, x, own, **options)

            tensors = inputs | dict(zip(names, states, strict=True))
            compare(run, tensors, lengths, rank, shared, along=along)

    return run_check


for _op in family():
    for _packed in (False, True):
        CHECKS[f"{_op.title} {'packed' if _packed else 'rows'}"] = op_check(_op, _packed)


def context_check(op, layout):
    def run_check(rank, size):
        order = partial(zigzag, ranks=size) if layout == "zigzag" else lambda x: x
        for bounds in ([0, 24], [0, 6, 6, 7, 20, 24]):
            bounds = torch.tensor(bounds)
            context = cp.build_cp_context(bounds, dist.group.WORLD, layout=layout)
            inputs = op.inputs(1, 24, 2, 5, 6, dtype=torch.float64)
            states = op.states(len(bounds) - 1, 2, 5, 6)
            names = [f"state{i}" for i in range(len(states))]
            along = {n: 2 if "T*n" in op.axes(n) else 1 for n in inputs}
            shared = {n for n in inputs if not {"T", "T*n"} & set(op.axes(n))} | set(names)

            def run(names=names, cu_seqlens=bounds, cp_context=None, **x):
                own = [x.pop(n) for n in names]
                more = {} if cp_context is None else dict(cp_context=cp_context)
                return op.call(op.chunk, x, own, cu_seqlens=cu_seqlens, **more)

            tensors = inputs | dict(zip(names, states, strict=True))
            for own in (context.cu_seqlens, bounds):
                compare(
                    run, tensors, [24 // size] * size, rank, shared, along,
                    partial(run, cu_seqlens=own, cp_context=context), order,
                )  # fmt: skip

    return run_check


for _op in OPS:
    takes = "cp_context" in inspect.signature(_op.chunk).parameters
    if takes and not _op.name.startswith("precond"):  # which refuse it
        for _layout in ("contiguous", "zigzag"):
            CHECKS[f"{_op.title} with a {_layout} cp_context"] = context_check(_op, _layout)


@check
def convolution_and_shift_with_cp_context(rank, size):
    T, generator = 16, torch.Generator().manual_seed(0)
    lengths = [T // size] * size
    ends = ends_of(lengths)
    part = slice(ends[rank], ends[rank + 1])
    for bounds, layout in product(([0, T], [0, 1, 2, 9, T]), ("contiguous", "zigzag")):
        cu = torch.tensor(bounds)
        context = cp.build_cp_context(cu, None, conv1d_kernel_size=4, layout=layout)
        order = partial(zigzag, ranks=size) if layout == "zigzag" else lambda x: x
        x, w, b = (
            torch.randn(s, generator=generator, dtype=torch.float64)
            for s in ((1, T, 3), (3, 4), (3,))
        )

        def convolve(x, w, b, **options):
            return causal_conv1d(x, w, b, x * x, activation="silu", **options)[:1]

        def shift(x, **options):
            return [token_shift(x, **options)]

        one, several = dict(cu_seqlens=cu), dict(cp_context=context)
        compare(
            partial(convolve, **one), dict(x=x, w=w, b=b), lengths, rank, {"w", "b"}, None,
            partial(convolve, **several), order,
        )  # fmt: skip
        compare(
            partial(shift, **one), dict(x=x), lengths, rank, (), None, partial(shift, **several),
            order,
        )  # fmt: skip
        module = ShortConvolution(3, 4).double()
        whole = order(module(x, **one)[0])
        got = module(order(x)[:, part], cu_seqlens=context.cu_seqlens, cp_context=context)[0]
        close(got, whole[:, part], "ShortConvolution")
    for broken in (
        lambda: causal_conv1d(x[:, part], w[:, :2], cp_context=context),
        lambda: token_shift(x[:, part], cu.roll(1), cp_context=context),
        lambda: token_shift(x[:, part], cp_context=cp.get_cp_cu_seqlens(cu, None, size, rank)),
    ):
        with pytest.raises(ValueError, match="cp_context"):
            broken()
    with sequence_parallel(), pytest.raises(ValueError, match="cp_context was given inside"):
        token_shift(x[:, part], cp_context=context)


@check
def what_neighbours_send(rank, size):
    x = torch.full((2, 3), float(rank + 1))
    assert cp.conv_cp_send_recv_fwd(x, dist.group.WORLD)[0, 0] == rank
    assert cp.conv_cp_send_recv_bwd(x, dist.group.WORLD)[0, 0] == (rank + 2) % (size + 1)
    assert cp.all_gather_into_tensor(x)[0].shape == (size, 2, 3)
    assert cp.all_reduce_sum(x.clone())[0][0, 0] == sum(range(size + 1))


@check
def convolution(rank, size):
    for kind in ("even", "uneven", "reversed"):
        for bounds in (None, [0, 1, 2, 9, 11]):
            lengths = lengths_of(11, size, kind)
            generator = torch.Generator().manual_seed(0)
            x, w, b = (
                torch.randn(s, generator=generator, dtype=torch.float64)
                for s in ((1 if bounds else 2, 11, 3), (3, 4), (3,))
            )
            options = {} if bounds is None else dict(cu_seqlens=torch.tensor(bounds))
            compare(
                lambda x, w, b, o=options: causal_conv1d(x, w, b, activation="silu", **o)[:1],
                dict(x=x, w=w, b=b), lengths, rank, {"w", "b"},
            )  # fmt: skip


@check
def shift(rank, size):
    for kind in ("even", "uneven"):
        for bounds in (None, [0, 1, 2, 9, 11]):
            x = torch.randn(
                1, 11, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
            )
            bound = None if bounds is None else torch.tensor(bounds)
            compare(
                lambda x, b=bound: [token_shift(x, b)], dict(x=x), lengths_of(11, size, kind), rank
            )


@check
def ring(rank, size):
    """Dense attention, any lengths, boundaries, grouped queries, and in zigzag order."""
    generator = torch.Generator().manual_seed(0)

    def rows(T, B):
        shapes = dict(q=(B, T, 4, 5), k=(B, T, 2, 5), v=(B, T, 2, 7))
        return {
            n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()
        }

    def naive(q, k, v, causal, bounds):
        parts = [
            naive_ring_attention(q[:, a:b], k[:, a:b], v[:, a:b], causal)
            for a, b in pairwise(bounds)
        ]
        return [torch.cat(parts, 1)]

    for causal in (False, True):
        for kind in ("even", "uneven"):
            for bounds in ([0, 22], [0, 3, 3, 17, 22]):
                packed = len(bounds) > 2
                cu = dict(cu_seqlens=torch.tensor(bounds)) if packed else {}

                def run(q, k, v, causal=causal, bounds=bounds, cu=cu):
                    if current() is None:
                        return naive(q, k, v, causal, bounds)
                    return [ring_attention(q, k, v, causal=causal, **cu)]

                compare(run, rows(22, 1 if packed else 2), lengths_of(22, size, kind), rank)
        T = 4 * size
        x = {n: y.requires_grad_() for n, y in rows(T, 2).items()}
        want = naive(**x, causal=causal, bounds=[0, T])[0]
        weights = torch.randn(
            want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype
        )
        grads = torch.autograd.grad((want * weights).sum(), list(x.values()))

        def mine(y):
            return zigzag(y, size).chunk(size, 1)[rank]

        own = {n: mine(y.detach()).clone().requires_grad_() for n, y in x.items()}
        with sequence_parallel() as parallel:
            got = ring_attention(**own, causal=causal, order="zigzag")
        # keys and values of all ranks but one, 4 tokens of 2 heads of 5 and 7 channels, twice
        assert parallel.sent == 2 * 4 * (size - 1) * 2 * (5 + 7) * 8, parallel.sent
        close(got, mine(want), "zigzag o")
        found = torch.autograd.grad((got * mine(weights)).sum(), list(own.values()))
        for n, grad, exact in zip(own, found, grads, strict=True):
            close(grad, mine(exact), f"zigzag d{n}")
    assert torch.equal(unzigzag(zigzag(want, size), size), want)


@check
def dilated(rank, size):
    """Dilated attention in all modes, for lengths and segments that do not divide each other."""
    branches = dict(segment_lengths=[4, 7, 16, 50], dilation_rates=[1, 3, 2, 5])
    generator = torch.Generator().manual_seed(0)
    for causal in (False, True):
        for kind, bounds in (("even", None), ("uneven", None), ("uneven", [0, 3, 3, 17, 29])):
            shapes = dict(q=(4, 5), k=(size, 5), v=(size, 7))
            B = 2 if bounds is None else 1
            x = {
                n: torch.randn(B, 29, *s, generator=generator, dtype=torch.float64)
                for n, s in shapes.items()
            }
            cu = {} if bounds is None else dict(cu_seqlens=torch.tensor(bounds))
            for mode in ("gather", "ring", "heads"):

                def run(q, k, v, mode=mode, cu=cu, causal=causal):
                    own = {} if current() is None else dict(mode=mode)
                    return [dilated_attention(q, k, v, **branches, **cu, **own, causal=causal)]

                compare(run, x, lengths_of(29, size, kind), rank)


@check
def block_sparse(rank, size):
    """A pattern of the whole row, on shards that no block divides; and a layer that chooses."""
    generator = torch.Generator().manual_seed(0)
    shapes = dict(q=(4, 5), k=(2, 5), v=(2, 7))
    for causal in (False, True):
        pattern = big_bird(29, 3, 4, 1, block_size=4, causal=causal)
        for kind in ("even", "uneven"):
            x = {
                n: torch.randn(2, 29, *s, generator=generator, dtype=torch.float64)
                for n, s in shapes.items()
            }
            compare(
                lambda p=pattern, **x: [block_sparse_attention(**x, pattern=p)],
                x, lengths_of(29, size, kind), rank,
            )  # fmt: skip
    layer = BlockSparseAttention(
        8, 2, pattern="topk_content", pattern_options=dict(count=2), block_size=3
    )
    layer = layer.double()
    for parameter in layer.parameters():
        dist.broadcast(parameter.data, 0)
    for bounds in (None, [0, 4, 4, 21, 29]):
        cu = {} if bounds is None else dict(cu_seqlens=torch.tensor(bounds))
        x = torch.randn(1, 29, 8, generator=generator, dtype=torch.float64)
        compare(
            lambda x, cu=cu: [layer(x, **cu)[0]], dict(x=x), lengths_of(29, size, "uneven"), rank
        )


@check
def ring_modules(rank, size):
    """The modules of dilated_attention_pytorch, with no context around them."""
    branches = ([4, 7, 50], [1, 3, 5])
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 29, 4, 6, generator=generator, dtype=torch.float64)
    lengths = lengths_of(29, size, "uneven")
    ends = ends_of(lengths)
    part = slice(ends[rank], ends[rank + 1])
    config = SparsePatternConfig("local_window", block_size=4, local_window_size=6)
    pairs = [
        (RingDilatedAttention(*branches), DilatedAttention(*branches)),
        (RingDilatedAttentionV2Collective(*branches, ring_size=size), DilatedAttention(*branches)),
        (
            DistributedImprovedDilatedAttention(*branches, sequence_parallel=True),
            DilatedAttention(*branches),
        ),
        (
            BlockSparseRingDilatedAttention([8], [1], config),
            BlockSparseRingDilatedAttention([8], [1], config, ring_size=1),
        ),
    ]
    for several, alone in pairs:
        whole = [x.clone().requires_grad_() for x in (q, k, v)]
        want = alone(*whole, is_causal=True)
        want.sin().sum().backward()
        mine = [x[:, part].clone().requires_grad_() for x in (q, k, v)]
        got = several(*mine, is_causal=True)
        close(got, want[:, part], "o")
        got.sin().sum().backward()
        for x, y in zip(mine, whole, strict=True):
            close(x.grad, y.grad[:, part], "gradient")
    for broken, message in (
        (RingDilatedAttention(*branches, dropout=0.1), "dropout=0.1 under sequence parallelism"),
        (RingDilatedAttention(*branches, ring_size=size + 1), "No ring|ring is not simulated"),
    ):
        try:
            broken(q, k, v)
        except ValueError as error:
            assert re.search(message, str(error)), error
        else:
            raise AssertionError(f"{message!r} was not raised")


@check
def dilated_bytes(rank, size):
    """If segments, rates and shards divide each other, a rank receives, per head, the sum over w > l
    of 2 (l / r) (w / l - 1) rows; in the heads mode 4 l (P - 1) / P.
    """
    branches = dict(segment_lengths=[8, 16, 32], dilation_rates=[1, 2, 4])
    l, H, D = 8, 4, 3  # noqa: E741
    q, k, v = torch.randn(3, 1, l, H, D, dtype=torch.float64)
    rows = sum(
        2 * (l // r) * (min(w, l * size) // l - 1) for w, r in zip(*branches.values(), strict=True)
    )
    for mode in ("gather", "ring"):
        with sequence_parallel(lengths=[l] * size) as parallel:
            dilated_attention(q, k, v, **branches, mode=mode)
        # two branches may ask for a row, which moves once
        assert 0 < parallel.sent <= rows * H * D * 8, (parallel.sent, rows * H * D * 8)
        for i in range(3):
            warnings.simplefilter("ignore")
            one = {n: [x[i]] for n, x in branches.items()}
            with sequence_parallel(lengths=[l] * size) as parallel:
                dilated_attention(q, k, v, **one, mode=mode)
            w, r = (x[i] for x in branches.values())
            rows = 2 * (l // r) * (min(w, l * size) // l - 1)
            assert parallel.sent == rows * H * D * 8, (i, parallel.sent, rows * H * D * 8)
        rows = sum(
            2 * (l // r) * (min(w, l * size) // l - 1)
            for w, r in zip(*branches.values(), strict=True)
        )
    with sequence_parallel(lengths=[l] * size) as parallel:
        dilated_attention(q, k, v, **branches, mode="heads")
    # the log-sum-exp comes back too
    assert parallel.sent == (4 * D + 1) * l * (size - 1) // size * H * 8


@check
def bytes_moved(rank, size):
    """A state a hop, forward and backward; the tail of the convolution."""
    q, k, v = (torch.randn(1, 8, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    beta = torch.rand(1, 8, 2, dtype=torch.float64)
    with sequence_parallel(lengths=[8] * size) as parallel:
        o, _ = chunk_delta_rule(q, k, v, beta)
        state = 2 * 4 * 4 * 8
        assert parallel.sent == (state if rank + 1 < size else 0)
        o.sum().backward()
        assert parallel.sent == state * ((rank + 1 < size) + (rank > 0))
    x = torch.randn(1, 8, 3, dtype=torch.float64)
    with sequence_parallel(lengths=[8] * size) as parallel:
        causal_conv1d(x, torch.randn(3, 4, dtype=torch.float64))
        assert parallel.sent == (4 * 3 * 8 if rank + 1 < size else 0)


def model_check(name):
    def run(rank, size):
        model = make_model(name).double()
        for packed in (False, True):
            T = 19
            lengths = lengths_of(T, size, "even" if packed else "uneven")
            ends = ends_of(lengths)
            x = ids(1 if packed else 2, T)
            cu = dict(cu_seqlens=torch.tensor([0, 4, 4, 11, T])) if packed else {}
            model.zero_grad()
            want = model(x, labels=x, use_cache=False, **cu)
            want.loss.backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            own = x[:, ends[rank] : ends[rank + 1]]
            with sequence_parallel(lengths=lengths):
                got = model(own, labels=own, use_cache=False, **cu)
                got.loss.backward()
                reduce_gradients(model)
            close(got.loss, want.loss, "loss")
            if want.logits is not None:
                close(got.logits, want.logits[:, ends[rank] : ends[rank + 1]], "logits")
            for n, p in model.named_parameters():
                if n in grads:
                    close(p.grad, grads[n], f"d{n}", 1e-8)

    return run


# experts, and what has no such form yet
REFUSED = {
    "gated_deltanet-experts", "mamba3", "mesa_net",
    "log_linear_mamba2", "deltaformer", "mom",
}  # fmt: skip
FEW = {  # one model of a kind
    f"model {n}"
    for n in ("gated_deltanet", "longnet", "mamba", "rwkv7", "samba", "transformer")
}  # fmt: skip
for _name in MODELS:
    if _name not in REFUSED:
        CHECKS[f"model {_name}"] = model_check(_name)


def sharded_check(name):
    def run(rank, size):
        """Parameters on all ranks (FSDP2), a row of the batch on each: gradients are the mean's."""
        torch.manual_seed(0)
        model, x = make_model(name).double(), ids(size, 9)
        whole = {
            n: g
            for n, g in zip(
                dict(model.named_parameters()),
                torch.autograd.grad(
                    model(x, labels=x, use_cache=False).loss,
                    list(model.parameters()),
                    materialize_grads=True,
                ),
                strict=True,
            )
        }
        for layer in model.base_model.layers:
            fully_shard(layer)
        fully_shard(model)
        own = x[rank : rank + 1]
        model(own, labels=own, use_cache=False).loss.backward()
        assert sum(p.to_local().numel() for p in model.parameters()) < sum(
            p.numel() for p in model.parameters()
        )
        for n, p in model.named_parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            close(grad.full_tensor(), whole[n], f"d{n}", 1e-8)

    return run


for _name in ("gated_deltanet", "mamba2", "rwkv7", "transformer"):
    CHECKS[f"fsdp {_name}"] = sharded_check(_name)


@check
def refusals(rank, size):
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    model = make_model("longnet").double()
    others = ("deltaformer", "log_linear_mamba2", "mamba3", "mesa_net", "mom")
    refused = [
        (partial(make_model(n).double(), ids(1, 4), use_cache=False), "called inside sequence_par")
        for n in others
    ]
    experts = make_model("gated_deltanet-experts").double().train()
    with sequence_parallel(lengths=[4] * size):
        for function, said in (
            *refused,
            (lambda: causal_conv1d(x[:, :3], torch.randn(8, 4)), "causal_conv1d: 3 tokens on rank"),
            (lambda: causal_conv1d(x, torch.randn(8, 4), output_final_state=True), "with a state"),
            (lambda: experts(ids(1, 4), labels=ids(1, 4), use_cache=False), "the experts' balance"),
            (lambda: model(ids(1, 4), attention_mask=torch.tensor([[0, 1, 1, 1]])), "padding in"),
            (
                lambda: ring_attention(*[x.view(1, 4, 2, 4)] * 3, order="spiral"),
                "order is 'spiral'",
            ),
        ):
            try:
                function()
            except ValueError as error:
                assert said in str(error), error
            else:
                raise AssertionError(f"nothing said {said!r}")


def main(folder, models):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = dist.get_rank(), dist.get_world_size()
    results = {}
    left_out = {f"model {n}" for n in MODELS} - FEW if models == "few" else set()
    for name, function in CHECKS.items():
        if name in left_out:
            continue
        torch.manual_seed(0)
        try:
            function(rank, size)
            results[name] = None
        except Exception:  # the ranks are no longer in step: it ends here
            results[name] = traceback.format_exc()
        with open(f"{folder}/{rank}.json", "w") as f:
            json.dump(results, f)
        if results[name] is not None:
            os._exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
