# SPDX-License-Identifier: MIT
"""Tokenise a corpus once, into shards that `fla train --data tokens:FOLDER` reads from disk:

    fla preprocess my_texts/ runs/tokens --tokenizer gpt2 --workers 8

Where it was stopped, the same command continues.
"""

from __future__ import annotations

import os

from fla.cli.common import command_parser


def main(argv: list[str]) -> int:
    parser = command_parser("preprocess", __doc__)
    parser.add_argument("data", help="as --data of fla train: a file, a folder, a table, hf:NAME")
    parser.add_argument("folder", help="the folder to write")
    parser.add_argument("--data_column", default="text")
    parser.add_argument("--streaming", action="store_true", help="read a table on the fly")
    parser.add_argument("--tokenizer", default="byte")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--characters", type=int, default=1 << 24, help="of a shard, about")
    args = parser.parse_args(argv)

    from rich.console import Console
    from rich.progress import Progress

    from fla.data.corpus import load_corpus
    from fla.data.shards import write_shards

    console = Console(highlight=False, soft_wrap=True)
    corpus = load_corpus(args.data, args.data_column, args.streaming)
    total = None if corpus.streaming else sum(map(len, corpus.train))
    kept = [0, 0]
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("characters", total=total)

        def shown(characters: int, made: bool) -> None:
            kept[made] += 1
            bar.advance(task, characters)

        index = write_shards(
            corpus, args.tokenizer, args.folder, characters=args.characters,
            workers=args.workers, progress=shown,
        )  # fmt: skip
    console.print(
        f"{index['tokens']:,} tokens in {index['shards']} shards ({kept[1]} made now, {kept[0]} "
        f"there before)\nfla train --data tokens:{args.folder} --tokenizer {args.tokenizer}"
    )
    return 0
