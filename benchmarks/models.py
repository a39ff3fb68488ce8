# SPDX-License-Identifier: MIT
"""Every architecture as a small language model: `python -m benchmarks.models`.

Hidden size 256, 4 layers, vocabulary 256, fp32, batch 1: a training step (forward, loss, backward)
on 1024 tokens, the prompt of 1024 tokens into a cache, one further token, and the bytes that cache
holds.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a file too, from anywhere
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from benchmarks.common import alternate, machine
from benchmarks.family import write_table
from fla.models import Cache
from fla.tasks.models import FIELDS, small_config

TOKENS = 1024
HEADER = ("model", "parameters", "training step", "tokens/s", "prompt", "per token", "cache")


def build(name: str) -> Any:
    config = small_config(
        name, 256, 4, 256, head_dim=64, max_position_embeddings=2 * TOKENS, initializer_range=0.02
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def measure(name: str, repeats: int) -> dict[str, Any]:
    model, x = build(name), torch.randint(3, 256, (1, TOKENS))

    def train() -> None:
        model.zero_grad(set_to_none=True)
        model(x, labels=x, use_cache=False).loss.backward()

    model.train()
    training = alternate({"train": train}, repeats)["train"]
    model.eval()
    with torch.no_grad():

        def prompt() -> Cache:
            cache = Cache(config=model.config)
            model(x, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return cache

        first = alternate({"prompt": prompt}, repeats)["prompt"]
        cache = prompt()
        size, token = cache.size_in_bytes(), x[:, :1]
        one = alternate(
            {"token": lambda: model(token, past_key_values=cache, use_cache=True)}, repeats * 5
        )["token"]
    parameters = sum(p.numel() for p in model.parameters())
    return dict(parameters=parameters, training=training, prompt=first, token=one, cache=size)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(FIELDS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="benchmarks/results", help="folder, or '' for none")
    args = parser.parse_args(argv)
    console, rows = Console(), {}
    for name in args.models:
        console.print(f"measuring {name}")
        rows[name] = measure(name, args.repeats)
    result = {"machine": machine(), "tokens": TOKENS, "rows": rows}
    table = [
        (
            name,
            f"{row['parameters'] / 1e6:.1f}M",
            f"{row['training'] * 1e3:.0f} ms",
            f"{TOKENS / row['training']:,.0f}",
            f"{row['prompt'] * 1e3:.0f} ms",
            f"{row['token'] * 1e3:.2f} ms",
            f"{row['cache'] / 2**10:,.0f} KiB",
        )
        for name, row in rows.items()
    ]
    out = Path(args.out) if args.out else None
    write_table(HEADER, table, result, out, console, "models-cpu", __doc__)


if __name__ == "__main__":
    main()
