# SPDX-License-Identifier: MIT
"""What the ranks of a test run: every check against the same computation in one process, in fp64."""

import json
import os
import sys
import traceback
from datetime import timedelta
from itertools import accumulate

import torch
import torch.distributed as dist

from fla.distributed import sequence_parallel
from fla.modules.convolution import causal_conv1d
from fla.modules.token_shift import token_shift
from fla.ops.registry import OPS

OWN = (
    "log_linear_attn",
    "deltaformer",
    "ttt",
    "titans",
    "mesa_net",
    "rwkv4",
    "mamba",
    "abc",
    "mlstm",
)
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def lengths_of(total, size, kind):
    """Even, not divisible, a rank without tokens."""
    if kind == "even":
        return [total // size + (p < total % size) for p in range(size)]
    parts = [1, total - 1 - 0] if size == 2 else [2, 0, total - 5, 3]
    return parts if kind == "uneven" else parts[::-1]


def ends_of(lengths):
    return list(accumulate(lengths, initial=0))


def close(got, want, what, rtol=1e-10):
    assert got.shape == want.shape, f"{what}: {list(got.shape)} instead of {list(want.shape)}"
    if got.numel():
        error = (got - want).abs().max().item()
        assert error <= rtol * max(1.0, want.abs().max().item()), f"{what}: off by {error:.2e}"


def compare(run, tensors, lengths, rank, shared=(), total=None, along=None):
    """`run(**tensors)` -> (o, *finals) whole, and from shards of every tensor with tokens: outputs,
    states and the sum of the ranks' gradients.
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
        return x[:, ends[rank] * f : ends[rank + 1] * f].clone()

    mine = {n: cut(n, x).requires_grad_() for n, x in tensors.items()}
    with sequence_parallel() as parallel:
        got, *got_finals = run(**mine)
    part = slice(ends[rank], ends[rank + 1])
    close(got, want[:, part], "o")
    for x, y in zip(got_finals, finals, strict=True):
        close(x, y, "final state")
    # the final state is on every rank; its weight is spread over them
    loss = (got * weights[:, part]).sum()
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


def main(rank, size, port, folder):
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=60))
    results = {}
    for name, function in CHECKS.items():
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
    main(*map(int, sys.argv[1:4]), sys.argv[4])
