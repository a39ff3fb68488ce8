# SPDX-License-Identifier: MIT
"""The gated delta rule beside transformers' own torch code and torch's softmax attention.

    python -m benchmarks.ops           all lengths; table, plot and JSON under benchmarks/results
    python -m benchmarks.ops --lengths 1024 4096 --repeats 3 --out ""
    python -m benchmarks.ops --all     every operator of the family in one table (`family.py`)

H = 8 heads, K = V = 128, fp32, batch 1, q and k normalised inside the operators. Implementations
take turns in one process and the median counts; peak memory is measured in a process of its own.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # as a file too, from anywhere
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.models.qwen3_next import modeling_qwen3_next

from benchmarks.common import alternate, machine, python, resident_memory
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

HEADS, WIDTH = 8, 128
LENGTHS = [256, 512, 1024, 2048, 4096, 8192, 16384]
LONGEST_BACKWARD = 8192  # the fallback's graph at 16384 takes more memory than small machines have
MEMORY_LENGTH = 4096
fallback_chunk = modeling_qwen3_next.torch_chunk_gated_delta_rule.__wrapped__
fallback_token = modeling_qwen3_next.torch_recurrent_gated_delta_rule.__wrapped__


def inputs(T: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = (normal(1, T, HEADS, WIDTH) for _ in range(3))
    return dict(
        q=q, k=k, v=v, g=F.logsigmoid(normal(1, T, HEADS) + 2), beta=normal(1, T, HEADS).sigmoid()
    )


def implementations(x: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    def attention() -> Tensor:
        heads = (t.transpose(1, 2) for t in (x["q"], x["k"], x["v"]))
        return F.scaled_dot_product_attention(*heads, is_causal=True)

    return {
        "fla": lambda: chunk_gated_delta_rule(**x, use_qk_l2norm_in_kernel=True)[0],
        "transformers": lambda: fallback_chunk(*x.values(), use_qk_l2norm_in_kernel=True)[0],
        "sdpa": attention,
    }


def with_backward(function: Callable[[], Tensor], x: dict[str, Tensor]) -> Callable[[], object]:
    used = [t for name, t in x.items() if name in "qkv"]
    return lambda: torch.autograd.grad(function().sum(), used)


def time_forward(T: int, repeats: int) -> dict[str, float]:
    with torch.no_grad():
        return alternate(implementations(inputs(T)), repeats)


def time_both(T: int, repeats: int) -> dict[str, float]:
    x = {name: t.requires_grad_() for name, t in inputs(T).items()}
    return alternate({n: with_backward(f, x) for n, f in implementations(x).items()}, repeats)


def time_step(repeats: int) -> dict[str, float]:
    """One token from a state, as in decoding."""
    x, state = inputs(1), torch.randn(1, HEADS, WIDTH, WIDTH)
    options = dict(initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
    with torch.no_grad():
        return alternate(
            {
                "fla": lambda: fused_recurrent_gated_delta_rule(**x, **options),
                "transformers": lambda: fallback_token(*x.values(), **options),
            },
            repeats * 100,
        )


def peak_memory(name: str, T: int) -> int:
    """Bytes by which forward and backward raise the peak resident memory of a fresh process."""
    code = f"from benchmarks.ops import memory_probe; print(memory_probe({name!r}, {T}))"
    return int(python("-c", code))


def memory_probe(name: str, T: int) -> int:
    """Runs in the fresh process: warm up small, then measure."""
    small = {n: t.requires_grad_() for n, t in inputs(128).items()}
    with_backward(implementations(small)[name], small)()
    x = {n: t.requires_grad_() for n, t in inputs(T).items()}
    before = resident_memory("VmRSS")
    with_backward(implementations(x)[name], x)()
    return resident_memory("VmHWM") - before


def measure(lengths: list[int], repeats: int, console: Console) -> dict:
    result: dict = {"machine": machine(), "heads": HEADS, "width": WIDTH, "forward": {}, "both": {}}
    for T in lengths:
        console.print(f"T = {T}")
        result["forward"][T] = time_forward(T, repeats)
        if T <= LONGEST_BACKWARD:
            result["both"][T] = time_both(T, repeats)
    result["step"] = time_step(repeats)
    result["memory"] = {n: peak_memory(n, MEMORY_LENGTH) for n in ("fla", "transformers", "sdpa")}
    return result


def rows(result: dict) -> list[list[str]]:
    """The table: milliseconds, and how many times faster than each peer ours is."""

    def row(what: str, times: dict[str, float], unit: float, form: str) -> list[str]:
        cells = [what]
        for name in ("fla", "transformers", "sdpa"):
            cells.append(form.format(times[name] * unit) if name in times else "-")
        for name in ("transformers", "sdpa"):
            cells.append(f"{times[name] / times['fla']:.2f}x" if name in times else "-")
        return cells

    table = [row(f"forward, T={T}", t, 1e3, "{:.1f} ms") for T, t in result["forward"].items()]
    table += [
        row(f"forward+backward, T={T}", t, 1e3, "{:.1f} ms") for T, t in result["both"].items()
    ]
    table.append(row("decode step", result["step"], 1e6, "{:.0f} us"))
    name = f"peak memory, forward+backward, T={MEMORY_LENGTH}"
    table.append(row(name, result["memory"], 2**-20, "{:.0f} MiB"))
    return table


COLUMNS = ["", "fla", "transformers", "SDPA", "ours vs transformers", "ours vs SDPA"]


def write(result: dict, folder: Path) -> None:
    """JSON, Markdown and plot of one run."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"ops-{'gpu' if result['machine']['gpu'] != 'none' else 'cpu'}"
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    lines = [
        " | ".join(COLUMNS),
        " | ".join(["---"] * len(COLUMNS)),
        *(" | ".join(r) for r in rows(result)),
    ]
    about = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    text = f"# Gated delta rule, H={HEADS}, K=V={WIDTH}, fp32, batch 1\n\n{about}\n\n"
    (folder / f"{name}.md").write_text(text + "\n".join(f"| {line} |" for line in lines) + "\n")
    plot(result, folder / f"{name}.png")


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(10, 4), dpi=140, sharey=True)
    for axes, kind in zip(both, ("forward", "both"), strict=True):
        for name, style in (("fla", "o-"), ("transformers", "s--"), ("sdpa", "^:")):
            points = [(int(T), times[name] * 1e3) for T, times in result[kind].items()]
            axes.loglog(*zip(*points, strict=True), style, label=name)
        lengths = [int(T) for T in result["forward"]]
        axes.set_xticks(lengths, [f"{T:,}" for T in lengths], rotation=30)
        axes.minorticks_off()
        axes.set_xlabel("tokens")
        axes.set_title("forward" if kind == "forward" else "forward + backward")
        axes.grid(alpha=0.3)
    both[0].set_ylabel("milliseconds")
    both[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--out", default="benchmarks/results", help="folder for the results; '' writes none"
    )
    parser.add_argument("--all", action="store_true", help="every operator in one table")
    args = parser.parse_args()
    console = Console()
    if args.all:
        from benchmarks import family

        out = Path(args.out) if args.out else None
        family.report(family.measure(args.repeats, console), out, console, "family-cpu")
        return
    result = measure(args.lengths, args.repeats, console)
    table = Table(*COLUMNS, title=f"H={HEADS}, K=V={WIDTH}, fp32: {result['machine']['cpu']}")
    for cells in rows(result):
        table.add_row(*cells)
    console.print(table)
    if args.out:
        write(result, Path(args.out))


if __name__ == "__main__":
    main()
