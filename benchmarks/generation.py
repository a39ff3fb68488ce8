# SPDX-License-Identifier: MIT
"""Reading a prompt and writing after it: `python -m benchmarks.generation [--models ...]`.

Any saved model, or small ones of a size: tokens per second of the prompt into a cache (one forward
pass), and of the tokens after it, one pass each, greedily, models in turn; and the bytes of the
cache. The Python between the passes counts, `generate` and its sampling do not.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a file too, from anywhere
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console

from benchmarks.common import alternate, machine
from benchmarks.family import write_table
from benchmarks.language import build, sizes, tokens

HEADER = ("model", "prompt", "batch", "prompt tokens/s", "written tokens/s", "per token", "cache")


def cache_bytes(cache: Any) -> int:
    """The bytes of all tensors that a cache holds."""
    seen: dict[int, int] = {}

    def look(x: Any) -> None:
        if isinstance(x, torch.Tensor):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict | list | tuple):
            for y in x.values() if isinstance(x, dict) else x:
                look(y)
        elif hasattr(x, "__dict__"):
            look(vars(x))

    look(cache.layers if hasattr(cache, "layers") else cache)
    return sum(seen.values())


@torch.inference_mode()
def measure(
    models: dict[str, Any], prompt: int, batch: int, written: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds of the prompt and of a token after it, of every model in turn."""
    caches: dict[str, Any] = {}

    def read(name: str) -> None:
        out = models[name](tokens(models[name], batch, prompt), use_cache=True, logits_to_keep=1)
        caches[name] = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def write(name: str) -> None:
        cache, token = caches[name]
        for _ in range(written):
            out = models[name](token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        caches[name] = cache, token

    first = alternate({name: (lambda name=name: read(name)) for name in models}, repeats)
    held = {name: cache_bytes(caches[name][0]) for name in models}
    after = alternate({name: (lambda name=name: write(name)) for name in models}, repeats)
    return {
        name: {"prompt": first[name], "token": after[name] / written, "cache": held[name]}
        for name in models
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sizes(parser)
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--written", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    console, rows, table = Console(), [], []
    models = {name: build(name, args).eval() for name in args.models}
    for prompt in args.prompts:
        console.print(f"measuring prompts of {prompt}")
        for name, row in measure(models, prompt, args.batch, args.written, args.repeats).items():
            rows.append({"model": name, "length": prompt, "batch": args.batch} | row)
            cells = [
                name, f"{prompt:,}", str(args.batch),
                f"{args.batch * prompt / row['prompt']:,.0f}", f"{args.batch / row['token']:,.0f}",
                f"{row['token'] * 1e3:.2f} ms", f"{row['cache'] / 2**20:,.2f} MiB",
            ]  # fmt: skip
            table.append(tuple(cells))
    result = {"machine": machine(), "arguments": vars(args), "rows": rows}
    out = Path(args.out) if args.out else None
    name = f"generation-{args.device.partition(':')[0]}"
    write_table(HEADER, table, result, out, console, name, __doc__ or "")


if __name__ == "__main__":
    main()
