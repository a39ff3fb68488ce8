# SPDX-License-Identifier: MIT
"""Score a trained model: perplexity and bits per byte of held-out text, by position too, recall
probes, tasks of `fla task` and of lm-eval.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from fla.cli.common import command_parser, load


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("eval", __doc__)
    parser.add_argument("checkpoint", help="folder of a saved model")
    parser.add_argument(
        "--data", default="stdlib", help="as for fla train; its held-out part is scored"
    )
    parser.add_argument("--data_column", default="text")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument(
        "--bucket", type=int, help="also perplexity by position, in buckets of this size"
    )
    parser.add_argument("--recall", type=int, help="also recall probes of so many characters")
    parser.add_argument("--tokenizer", help="'byte' or one of Hugging Face; else the checkpoint's")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="tasks of `fla task` it was trained on, alone"
    )
    parser.add_argument("--harness", nargs="+", metavar="TASK", help="tasks of lm-eval, alone")
    parser.add_argument("--harness_folder", help="folder of lm-eval tasks of one's own")
    parser.add_argument("--limit", type=int, help="examples of an lm-eval task")
    parser.add_argument("--device", help="cpu, cuda, ...; the best available by default")
    return parser


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.tasks:
        from fla.cli import task

        return task.main([",".join(args.tasks), "--checkpoint", args.checkpoint])

    from rich.console import Console
    from rich.table import Table

    from fla.data.corpus import load_corpus
    from fla.evals.harness import run_harness
    from fla.training import run

    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several:
        from accelerate import PartialState

        args.device = args.device or str(PartialState().device)
    console = Console(highlight=False, quiet=int(os.environ.get("RANK", 0)) > 0)
    model, tokenizer = load(args.checkpoint, args.device, args.tokenizer)
    if args.harness:
        results = run_harness(model, tokenizer, args.harness, args.harness_folder, args.limit)
        figures = Table("task", "measure", "value")
        for name, values in results.items():
            for measure, value in values.items():
                figures.add_row(name, measure, f"{value:.4f}")
        console.print(figures)
        return 0
    corpus = load_corpus(args.data, args.data_column)
    if several:
        scored = run.evaluate_together(model, tokenizer, corpus, args.length, args.bucket)
    else:
        scored = run.evaluate(model, tokenizer, corpus, args.length, args.bucket, console)
    if not console.quiet:
        console.print(_scores(args, model, tokenizer, corpus, scored))
    return 0


def _scores(args: argparse.Namespace, model: Any, tokenizer: Any, corpus: Any, scored: Any) -> Any:
    """The table of `fla eval`."""
    from rich.table import Table

    from fla.data.corpus import compressed_bits_per_byte
    from fla.data.probes import PROBES
    from fla.evals.recall import recall

    table = Table(
        title=f"held-out text of {corpus.name}: {scored.bytes / 1e6:.2f} MB, {scored.tokens} tokens"
    )
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("bits per byte", f"{scored.bits_per_byte:.4f}")
    table.add_row("perplexity per token", f"{scored.perplexity:.4f}")
    for name, bits in compressed_bits_per_byte(corpus.held_out).items():
        table.add_row(f"bits per byte, {name}", f"{bits:.4f}")
    for start, perplexity in scored.by_position().items():
        table.add_row(f"perplexity at {start}..{start + args.bucket - 1}", f"{perplexity:.4f}")
    for kind in PROBES if args.recall else ():
        found = recall(model, tokenizer, kind, characters=args.recall)
        table.add_row(f"recall, {kind}: exact answers", f"{found.exact:.0%}")
        table.add_row(f"recall, {kind}: nats a token of it", f"{found.nats:.4f}")
    return table
