# SPDX-License-Identifier: MIT
"""Long sequences, measured: `python -m benchmarks.long_context`.

ops      attention of several kinds and the gated delta rule at growing T, 4 heads of 64, fp32,
         causal: time in turns in one process, peak memory of forward and backward in one of its own
models   a training step of small language models at growing T
huge     dilated attention over a million tokens; random rows against the definition in fp64
ranks    1, 2 and 4 processes on this machine: time, and the bytes a rank sends beside the formula
plan     a billion tokens, computed from those formulas and not run
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a file too, from anywhere
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import fla.models
from benchmarks.common import alternate, environment, machine, python, resident_memory
from fla.distributed import sequence_parallel
from fla.ops.block_sparse_attention import block_sparse_attention, local_window
from fla.ops.dilated_attention import dilated_attention, geometric_schedule
from fla.ops.engine.attention import pieces
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.ring_attention import ring_attention

HEADS, WIDTH = 4, 64
LENGTHS = (4096, 8192, 16384, 32768, 65536)
DENSE = 16384  # the longest that dense attention is given
OUT = Path(__file__).parent / "results"


def branches(T: int) -> dict[str, list[int]]:
    segments, rates = geometric_schedule(T, first=1024)
    return dict(segment_lengths=segments, dilation_rates=rates)


def inputs(T: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, T, HEADS, WIDTH, generator=generator)
    return dict(q=q, k=k, v=v)


def kinds(x: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    T = x["q"].shape[1]
    q, k, v = x.values()
    window = local_window(T, 1024, causal=True)
    g, beta = torch.full((1, T, HEADS), -0.1), torch.full((1, T, HEADS), 0.5)
    found: dict[str, Callable[[], Any]] = {
        "dilated": lambda: dilated_attention(q, k, v, **branches(T), causal=True),
        "block-sparse": lambda: block_sparse_attention(q, k, v, window),
        "gated delta rule": lambda: chunk_gated_delta_rule(
            q, k, v, g, beta, use_qk_l2norm_in_kernel=True
        )[0],
    }
    if T <= DENSE:
        heads_first = [y.transpose(1, 2) for y in (q, k, v)]
        found["SDPA"] = lambda: F.scaled_dot_product_attention(*heads_first, is_causal=True)
    return found


def with_backward(function: Callable[[], Any], x: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function().sum(), list(x.values()))


def measure_ops(lengths: list[int], repeats: int, console: Console) -> dict[str, Any]:
    result: dict[str, Any] = {"forward": {}, "both": {}, "memory": {}}
    for T in lengths:
        console.print(f"ops, T = {T}")
        with torch.no_grad():
            result["forward"][T] = alternate(kinds(inputs(T)), repeats)
        x = {n: y.requires_grad_() for n, y in inputs(T).items()}
        forms = {n: with_backward(f, x) for n, f in kinds(x).items()}
        result["both"][T] = alternate(forms, max(1, repeats // 2))
        result["memory"][T] = {n: peak_memory(n, T) for n in forms}
    return result


def peak_memory(name: str, T: int) -> int:
    code = f"from benchmarks.long_context import memory_probe; print(memory_probe({name!r}, {T}))"
    return int(python("-c", code))


def memory_probe(name: str, T: int) -> int:
    """Runs in a fresh process: what forward and backward add to its memory at most."""
    small = {n: y.requires_grad_() for n, y in inputs(256).items()}
    with_backward(kinds(small)[name], small)()
    x = {n: y.requires_grad_() for n, y in inputs(T).items()}
    before = resident_memory("VmRSS")
    with_backward(kinds(x)[name], x)()
    return resident_memory("VmHWM") - before


def memory_formula(T: int) -> int:
    """The bytes that dilated attention allocates: o, its gradient, the gradients of q, k and v, and
    the log-sum-exp; and the rows of q, k, v, o and all gradients that are gathered at a time.
    """
    gathered = 4 * T * HEADS * 10 * WIDTH
    return 4 * T * HEADS * (5 * WIDTH + 1) + min(gathered, 3 * pieces.BYTES)


def measure_models(lengths: list[int], console: Console) -> dict[str, Any]:
    sizes: dict[str, Any] = dict(
        vocab_size=256, hidden_size=128, num_hidden_layers=2, num_heads=2, intermediate_size=256
    )
    result: dict[str, Any] = {}
    for T in lengths:
        console.print(f"models, T = {T}")
        made: dict[str, Any] = {
            "LongNet": fla.models.LongNetForCausalLM(
                fla.models.LongNetConfig(**sizes, **branches(T))
            ),
            "GatedDeltaNet": fla.models.GatedDeltaNetForCausalLM(
                fla.models.GatedDeltaNetConfig(**sizes, head_dim=64, expand_v=1.0)
            ),
        }
        if T <= DENSE:
            config = fla.models.TransformerConfig(**sizes)
            made["Transformer"] = fla.models.TransformerForCausalLM(config)
        tokens = torch.randint(256, (1, T))

        def step(model: Any, tokens: Tensor = tokens) -> None:
            model(tokens, labels=tokens, use_cache=False).loss.backward()

        result[str(T)] = alternate({n: lambda m=m: step(m) for n, m in made.items()}, 2)
    return result


def exact_row(x: list[Tensor], t: int, h: int, b: dict[str, list[int]]) -> Tensor:
    """A row of the result by the definition, in fp64."""
    q, k, v = (y[0, :, h].double() for y in x)
    s = torch.arange(t + 1)
    M = torch.zeros(t + 1, dtype=torch.float64)
    for w, r in zip(b["segment_lengths"], b["dilation_rates"], strict=True):
        if (t % w - h) % r == 0:
            M += (s // w == t // w) & ((s % w - h) % r == 0)
    seen = M > 0
    scores = (k[: t + 1][seen] @ q[t]) * q.shape[1] ** -0.5 + M[seen].log()
    return scores.softmax(0) @ v[: t + 1][seen]


def measure_huge(T: int, console: Console, heads: int = 2, width: int = 8) -> dict[str, Any]:
    console.print(f"huge, T = {T}")
    x = list(torch.randn(3, 1, T, heads, width, generator=torch.Generator().manual_seed(0)))
    segments, rates = geometric_schedule(T, first=2048, ratio=4)
    b = dict(segment_lengths=segments, dilation_rates=rates)
    begun = time.perf_counter()
    with torch.no_grad():
        o = dilated_attention(*x, **b, causal=True)
    seconds = time.perf_counter() - begun
    rows = torch.randint(T, (32,), generator=torch.Generator().manual_seed(1)).tolist()
    errors = [
        (o[0, t, h].double() - exact_row(x, t, h, b)).abs().max().item()
        for t in rows
        for h in range(heads)
    ]
    return dict(
        tokens=T, heads=heads, width=width, seconds=seconds, rows=len(rows), error=max(errors), **b
    )


def fetched(lengths: list[int], b: dict[str, list[int]]) -> int:
    """Rows of keys and values of a head that a rank fetches at most: sum over w > l of
    2 (l / r) (w / l - 1).
    """
    local, total = lengths[0], sum(lengths)
    pairs = zip(b["segment_lengths"], b["dilation_rates"], strict=True)
    return sum(2 * local // r * (min(w, total) // local - 1) for w, r in pairs if w > local)


def rank_cases(T: int, size: int) -> dict[str, tuple[Callable[[dict[str, Tensor]], Any], int]]:
    """The functions that run on the ranks, and the most bytes that a rank sends forward."""
    lengths, number = [T // size] * size, 4 * HEADS * WIDTH
    b, g = branches(T), torch.full((1, T // size, HEADS), -0.1)

    def delta(x: dict[str, Tensor]) -> Any:
        return chunk_gated_delta_rule(**x, g=g, beta=g.exp(), use_qk_l2norm_in_kernel=True)[0]

    def spread(mode: str) -> Callable[[dict[str, Tensor]], Any]:
        own = {} if size == 1 else dict(mode=mode)
        return lambda x: dilated_attention(**x, **b, **own)

    turned = 4 * lengths[0] * (size - 1) // size * number
    back = 4 * HEADS * lengths[0] * (size - 1) // size  # the log-sum-exp
    return {
        "gated delta rule": (delta, 4 * HEADS * WIDTH * WIDTH if size > 1 else 0),
        "dilated, gather": (spread("gather"), fetched(lengths, b) * number),
        "dilated, ring": (spread("ring"), fetched(lengths, b) * number),
        "dilated, heads": (spread("heads"), turned + back),
        "softmax, ring": (lambda x: ring_attention(**x), 2 * lengths[0] * (size - 1) * number),
    }


def rank_main(T: int) -> None:
    """One of the processes: times in JSON on the first."""
    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    torch.set_num_threads(1)
    x = {n: y.chunk(size, 1)[rank].contiguous().requires_grad_() for n, y in inputs(T).items()}
    result = {}
    for name, (function, formula) in rank_cases(T, size).items():
        with sequence_parallel(lengths=[T // size] * size) as parallel:
            function(x)
            sent = torch.tensor([parallel.sent])
            dist.all_reduce(sent, dist.ReduceOp.MAX)
            dist.barrier()
            begun = time.perf_counter()
            torch.autograd.grad(function(x).sum(), list(x.values()))
            dist.barrier()
        result[name] = dict(seconds=time.perf_counter() - begun, sent=int(sent), formula=formula)
    if rank == 0:
        Path(os.environ["FLA_RESULT"]).write_text(json.dumps(result))
    dist.destroy_process_group()


def measure_ranks(T: int, console: Console) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for size in (1, 2, 4):
        console.print(f"ranks, {size} processes")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node", str(size), "-m", "benchmarks.long_context"]
            variables = environment(FLA_RESULT=str(file), OMP_NUM_THREADS="1")
            subprocess.run([*command, "--rank", str(T)], check=True, env=variables)
            found[str(size)] = json.loads(file.read_text())
    return found


def plan(T: int = 2**30, heads: int = 12, width: int = 64, memory: int = 80 * 10**9) -> list[str]:
    """A billion tokens in bf16: what one layer's attention holds and moves, forward, computed."""
    segments, rates = geometric_schedule(T, first=2048, ratio=4)
    each = heads * (4 * width * 2 + width * 4 + 4)  # q, k, v, o; o and the log-sum-exp in fp32
    devices = 2 ** math.ceil(math.log2(T * each / memory))
    local = T // devices
    b = dict(segment_lengths=segments, dilation_rates=rates)
    rows = fetched([local] * devices, b)
    dense = 2 * local * (devices - 1) * heads * width * 2
    return [
        f"{T:,} tokens, {heads} heads of {width}, {len(rates)} branches: segments {segments[0]:,} "
        f"to {segments[-1]:,}, rates 1 to {rates[-1]:,}",
        f"{each:,} bytes per token, {T * each / 1e12:.2f} TB: {devices} devices of "
        f"{memory / 1e9:.0f} GB, {local:,} tokens and {local * each / 1e9:.1f} GB on each",
        f"a device fetches {rows:,} rows per head at most, {rows * heads * width * 2 / 1e6:.1f} "
        f"MB; the ring of dense attention would send {dense / 1e12:.2f} TB",
        f"a state of the gated delta rule of these heads is {heads * width**2 * 4 / 1e6:.2f} MB, "
        "whatever the length",
    ]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows)]


def report(result: dict[str, Any]) -> str:
    names = ["dilated", "block-sparse", "gated delta rule", "SDPA"]
    lines = ["# Long sequences", "", f"{result['machine']}", ""]
    for part, unit, what in (
        ("forward", 1e3, "forward, ms"), ("both", 1e3, "forward and backward, ms"),
        ("memory", 2**-20, "what both add to memory, MiB"),
    ):  # fmt: skip
        rows = [
            [f"{int(T):,}", *(f"{row[n] * unit:,.0f}" if n in row else "-" for n in names)]
            for T, row in result["ops"][part].items()
        ]
        lines += [f"{what} (4 heads of 64, fp32, causal)", "", *table(["T", *names], rows), ""]
    rows = [
        [f"{int(T):,}", *(f"{x * 2**-20:,.0f}" for x in (m["dilated"], memory_formula(int(T))))]
        for T, m in result["ops"]["memory"].items()
    ]
    head = ["T", "measured", "formula"]
    lines += ["memory of dilated attention and its formula, MiB", "", *table(head, rows), ""]
    models = ["LongNet", "GatedDeltaNet", "Transformer"]
    rows = [
        [f"{int(T):,}", *(f"{row[n]:.2f}" if n in row else "-" for n in models)]
        for T, row in result["models"].items()
    ]
    lines += ["a training step of 2 layers of 128, s", "", *table(["T", *models], rows), ""]
    huge = result["huge"]
    lines += [
        f"{huge['tokens']:,} tokens ({huge['heads']} heads of {huge['width']}), forward: "
        f"{huge['seconds']:.1f} s; {huge['rows']} random rows differ from the definition in fp64 "
        f"by {huge['error']:.1e} at most",
        "",
        f"{result['ranks_tokens']:,} tokens over processes of this machine, a thread each (dilated "
        "looks both ways)",
        "",
    ]
    rows = [
        [size, name, f"{r['seconds']:.2f}", f"{r['sent']:,}", f"{r['formula']:,}"]
        for size, found in result["ranks"].items()
        for name, r in found.items()
    ]
    head = ["processes", "", "forward and backward, s", "a rank sends, bytes", "formula, at most"]
    lines += [*table(head, rows), "", "A billion tokens, computed from the formulas, not run:", ""]
    return "\n".join([*lines, *(f"- {line}" for line in plan())]) + "\n"


def plot(result: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, sides = plt.subplots(1, 2, figsize=(10, 4), dpi=140)
    for axes, part, unit, label in zip(
        sides, ("both", "memory"), (1, 2**-20), ("s, forward and backward", "MiB"), strict=True
    ):
        lengths = list(result["ops"][part])
        for name in ("SDPA", "dilated", "block-sparse", "gated delta rule"):
            points = [
                (int(T), result["ops"][part][T][name] * unit)
                for T in lengths
                if name in result["ops"][part][T]
            ]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.set_xticks([int(T) for T in lengths], [f"{int(T) // 1024}k" for T in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    sides[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--huge", type=int, default=2**20)
    parser.add_argument("--ranks", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT / "long-context-cpu")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        return rank_main(options.rank)
    console = Console()
    result: dict[str, Any] = {"machine": machine()}
    result["ops"] = measure_ops(options.lengths, options.repeats, console)
    result["models"] = measure_models(options.lengths, console)
    result["huge"] = measure_huge(options.huge, console)
    result["ranks"], result["ranks_tokens"] = measure_ranks(options.ranks, console), options.ranks
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    result = json.loads(json.dumps(result))
    options.out.with_suffix(".md").write_text(report(result))
    plot(result, options.out.with_suffix(".png"))
    console.print(report(result), markup=False)
    return None


if __name__ == "__main__":
    main()
