# SPDX-License-Identifier: MIT
"""Two results side by side, as ratios:

    python -m benchmarks.compare before.json after.json
    python -m benchmarks.compare --revisions main HEAD -- benchmarks.ops --quick

The second checks both revisions out beside each other, builds their kernels, and runs the benchmark
in turn, `--rounds` times; figures are medians over the rounds. A ratio above 1 is a larger second.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a file too, from anywhere
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.table import Table

Figures = dict[str, float]
NAMES = ("model", "op", "module", "name", "pass", "length", "tokens", "batch", "T")


def figures(result: Any) -> Figures:
    """Every number of a result by its path; a row of a list goes by the names it holds."""
    return dict(_numbers(result, ()))


def _numbers(x: Any, path: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    if isinstance(x, bool) or x is None or isinstance(x, str):
        return
    if isinstance(x, int | float):
        yield " / ".join(path), float(x)
    elif isinstance(x, dict):
        for name, value in x.items():
            if name not in ("machine", "arguments", *NAMES):
                yield from _numbers(value, (*path, str(name)))
    else:
        for i, value in enumerate(x):
            own = [str(value[n]) for n in NAMES if isinstance(value, dict) and n in value]
            yield from _numbers(value, (*path, " ".join(own) or str(i)))


def show(before: Figures, after: Figures, names: tuple[str, str], console: Console) -> None:
    """The figures both have, largest change first; what one lacks is named."""
    table = Table("figure", *names, "ratio")
    both = [n for n in before if n in after]
    ratios = {n: after[n] / before[n] if before[n] else float("nan") for n in both}
    for n in sorted(both, key=lambda n: -abs(ratios[n] - 1) if ratios[n] == ratios[n] else 0.0):
        table.add_row(n, f"{before[n]:.4g}", f"{after[n]:.4g}", f"{ratios[n]:.2f}")
    console.print(table)
    for missing, name in (
        (set(before) - set(after), names[1]),
        (set(after) - set(before), names[0]),
    ):
        if missing:
            console.print(f"not in {name}: {', '.join(sorted(missing))}")


def _read(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"compare: {path} is no result file: {error}")


def _run(tree: Path, command: list[str], out: Path) -> Figures:
    """The benchmark in a checkout; all the result files it writes."""
    run = [sys.executable, "-m", *command, "--out", str(out)]
    subprocess.run(run, cwd=tree, check=True, env=os.environ | {"PYTHONPATH": str(tree)})
    found: Figures = {}
    for file in sorted(out.glob("*.json")):
        found |= figures(json.loads(file.read_text()))
    return found


def revisions(pair: list[str], command: list[str], rounds: int) -> list[Figures]:
    """Medians of a benchmark's figures in two revisions, run in turn."""
    runs: list[list[Figures]] = [[], []]
    with tempfile.TemporaryDirectory() as scratch:
        trees = [Path(scratch) / str(i) for i in range(2)]
        try:
            for tree, revision in zip(trees, pair, strict=True):
                subprocess.run(
                    ["git", "worktree", "add", "--detach", str(tree), revision], check=True
                )
                build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
                subprocess.run(build, cwd=tree, check=True)
            for turn in range(rounds):
                for i in (0, 1) if turn % 2 == 0 else (1, 0):
                    runs[i].append(_run(trees[i], command, Path(scratch) / f"out-{turn}-{i}"))
        finally:
            for tree in trees:
                subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=False)
    return [{n: statistics.median(run[n] for run in of if n in run) for n in of[0]} for of in runs]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    own, command = argv[:cut], argv[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", help="two result files")
    parser.add_argument("--revisions", nargs=2, metavar="REVISION")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(own)
    if args.revisions:
        if not command:
            parser.error("--revisions needs a benchmark after --, such as -- benchmarks.ops")
        before, after = revisions(args.revisions, command, args.rounds)
        show(before, after, (args.revisions[0], args.revisions[1]), Console())
    elif len(args.files) == 2:
        before, after = (figures(_read(path)) for path in args.files)
        show(before, after, (args.files[0], args.files[1]), Console())
    else:
        parser.error("pass two result files, or --revisions A B -- BENCHMARK")


if __name__ == "__main__":
    main()
