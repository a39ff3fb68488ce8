# SPDX-License-Identifier: MIT
"""Compile a model's GPU kernels, and check them against torch, before they are needed:

    fla warm-up gated_deltanet --hidden_size 2048 --head_dim 128 --lengths 1 2048
    fla warm-up runs/mine

It runs a training step and a decode step at each length in each dtype. Triton keeps what it
compiles on disk (`TRITON_CACHE_DIR`), so jobs on the same machine, or with the same folder, start
at once.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from fla.cli.common import command_parser

DTYPES = ("bfloat16", "float16", "float32", "float64")


def main(argv: list[str]) -> int:
    parser = command_parser("warm-up", __doc__)
    parser.add_argument("model", help="an architecture, NAME:field=value:..., or a saved model")
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=1, help="kernels are the same in all")
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 2048])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    args = parser.parse_args(argv)

    import torch

    from fla.utils import get_available_device

    device = get_available_device()
    if device == "cpu":
        print("fla warm-up: no GPU here; the CPU's kernels were compiled at installation")
    model = build(args)
    for dtype in args.dtypes:
        model.to(device=device, dtype=getattr(torch, dtype))
        for length in args.lengths:
            begun = time.perf_counter()
            warm(model, length)
            print(f"{dtype}, {length} tokens: {time.perf_counter() - begun:.1f} s")
    return 0


def build(args: argparse.Namespace) -> Any:
    """A saved model, or a fresh one of the sizes asked for."""
    from transformers import AutoModelForCausalLM

    from fla.tasks.models import small_config

    if Path(args.model).is_dir():
        return AutoModelForCausalLM.from_pretrained(args.model)
    config = small_config(args.model, args.hidden_size, args.layers, 1024, head_dim=args.head_dim)
    return AutoModelForCausalLM.from_config(config)


def warm(model: Any, length: int) -> None:
    """Forward, backward, and a token after it."""
    import torch

    tokens = torch.randint(3, model.config.vocab_size, (1, length), device=model.device)
    model.train()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        model(tokens[:, -1:], past_key_values=cache, use_cache=True)
