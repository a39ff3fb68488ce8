# SPDX-License-Identifier: MIT
"""A training step of language models: `python -m benchmarks.training_throughput [--models ...]`.

Forward, loss, backward and an AdamW step, models in turn: tokens per second, the memory it takes on
top of the model and its optimizer (in a process of its own), and the share of the machine's
arithmetic, which is what a large matrix product reaches in the same run, that goes into 6 flops per
parameter and token (MFU; embeddings left out, attention and recurrence not counted).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a file too, from anywhere
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console

from benchmarks.common import alternate, machine, python, resident_memory
from benchmarks.family import write_table
from benchmarks.language import build, sizes, tokens

PROBED = ("hidden_size", "layers", "head_dim", "vocabulary", "device", "tokens")
HEADER = ("model", "parameters", "tokens", "a step", "tokens/s", "memory", "MFU")


def peak_flops(device: str) -> float:
    """Flops a second of a product of two matrices of 2,048 (8,192 on a GPU)."""
    gpu = device.startswith("cuda")
    n, dtype = (8192, torch.bfloat16) if gpu else (2048, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / alternate({"product": lambda: a @ b}, 5)["product"]


def peak_memory(args: argparse.Namespace, name: str, length: int) -> int:
    """Bytes that a step takes at most on top of the model and its optimizer, in a fresh process."""
    options = [f"--{n}={getattr(args, n)}" for n in PROBED]
    own = ["--models", name, *options, "--lengths", str(length), "--probe"]
    return int(python("-m", "benchmarks.training_throughput", *own))


def memory_probe(args: argparse.Namespace) -> int:
    """Runs in the fresh process: a step that makes the optimizer's state, then the measured one."""
    length = args.lengths[0]
    model = build(args.models[0], args).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    step_of(model, optimizer, 1, min(64, length))()
    step = step_of(model, optimizer, max(1, args.tokens // length), length)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = resident_memory("VmRSS")
    step()
    return resident_memory("VmHWM") - before


def step_of(
    model: Any, optimizer: torch.optim.Optimizer, batch: int, length: int
) -> Callable[[], None]:
    """One step of training on the same tokens."""
    ids = tokens(model, batch, length)

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def counted(model: Any) -> int:
    """Parameters that a token meets in a product."""
    embedding = model.get_input_embeddings().weight
    rest = sum(p.numel() for p in model.parameters() if p is not embedding)
    return rest + (embedding.numel() if model.config.tie_word_embeddings else 0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sizes(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--probe", action="store_true", help="print the memory of a step alone")
    args = parser.parse_args(argv)
    if args.probe:
        print(memory_probe(args))
        return
    console, rows, table = Console(), [], []
    models = {name: build(name, args).train() for name in args.models}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        for name, model in models.items()
    }
    peak = peak_flops(args.device)
    for length in args.lengths:
        console.print(f"measuring steps of {args.tokens} tokens in rows of {length}")
        batch = max(1, args.tokens // length)
        steps = {n: step_of(models[n], optimizers[n], batch, length) for n in models}
        memory = {name: peak_memory(args, name, length) for name in steps}
        for name, seconds in alternate(steps, args.repeats).items():
            rate, n = batch * length / seconds, counted(models[name])
            row = dict(seconds=seconds, memory=memory[name], mfu=6 * n * rate / peak)
            rows.append({"model": name, "length": length, "batch": batch, "parameters": n} | row)
            cells = [
                name, f"{n / 1e6:.2f}M", f"{batch} x {length:,}", f"{seconds * 1e3:.0f} ms",
                f"{rate:,.0f}", f"{memory[name] / 2**20:,.0f} MiB", f"{row['mfu']:.0%}",
            ]  # fmt: skip
            table.append(tuple(cells))
    result = {"machine": machine(), "arguments": vars(args), "peak_flops": peak, "rows": rows}
    out = Path(args.out) if args.out else None
    name = f"training-{args.device.partition(':')[0]}"
    write_table(HEADER, table, result, out, console, name, __doc__ or "")


if __name__ == "__main__":
    main()
