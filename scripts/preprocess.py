# SPDX-License-Identifier: MIT
"""Tokenise a corpus once, into shards that `fla train --data tokens:FOLDER` reads from disk:

python -m scripts.preprocess my_texts/ runs/tokens --tokenizer gpt2 --workers 8

The same command resumes where it was stopped.
"""

import argparse
import os
import sys

from rich.console import Console
from rich.progress import Progress

from fla.core.errors import UsageError
from fla.data.corpus import load_corpus
from fla.data.shards import write_shards


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="as --data of fla train: a file, a folder, a table, hf:NAME")
    parser.add_argument("folder")
    parser.add_argument("--data_column", default="text")
    parser.add_argument("--streaming", action="store_true", help="read a table on the fly")
    parser.add_argument("--tokenizer", default="byte")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--characters", type=int, default=1 << 24, help="of a shard, about")
    args = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    try:
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
    except UsageError as error:
        print(f"preprocess: {error}", file=sys.stderr)
        return 2
    console.print(
        f"{index['tokens']:,} tokens in {index['shards']} shards ({kept[1]} made now, {kept[0]} "
        f"there before)\nfla train --data tokens:{args.folder} --tokenizer {args.tokenizer}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
