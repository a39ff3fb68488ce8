# SPDX-License-Identifier: MIT
"""Sizes of the tree, to hold a change against: `python -m scripts.tree_size [FOLDER]`.

Lines and files, the median and the largest file, lines and arguments per function, comments and
docstrings per line of code, and duplication: the share of code lines that lie in a run of 8 lines
which stands in another file too.
"""

import ast
import io
import sys
import tokenize
from collections import defaultdict
from pathlib import Path
from statistics import mean, median

RUN = 8
FunctionDef = ast.FunctionDef | ast.AsyncFunctionDef


def doc_lines(tree: ast.Module) -> set[int]:
    """The lines of all docstrings."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FunctionDef.__args__)):
            first = node.body[0] if node.body else None
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found |= set(range(value.lineno, (value.end_lineno or value.lineno) + 1))
    return found


def signature_lines(tree: ast.Module) -> set[int]:
    """The lines of all functions' parameters and results, which a public interface repeats."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, FunctionDef):
            found |= set(range(node.lineno, node.body[0].lineno))
    return found


def comment_lines(text: str) -> set[int]:
    """The lines that hold a comment, the licence line apart."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0] for t in tokens if t.type == tokenize.COMMENT and "SPDX" not in t.string}


def duplicated(code: dict[Path, list[str]]) -> int:
    """The number of code lines in a run of `RUN` lines that another file holds too."""
    owners: dict[tuple[str, ...], set[Path]] = defaultdict(set)
    for path, lines in code.items():
        for i in range(len(lines) - RUN + 1):
            owners[tuple(lines[i : i + RUN])].add(path)
    total = 0
    for lines in code.values():
        marked: set[int] = set()
        for i in range(len(lines) - RUN + 1):
            if len(owners[tuple(lines[i : i + RUN])]) > 1:
                marked |= set(range(i, i + RUN))
        total += len(marked)
    return total


def measure(folder: Path) -> dict[str, str]:
    """The figures by name."""
    lengths, functions, arguments, code, bodies = [], [], [], {}, {}
    comments = docs = 0
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text()
        lines, tree = text.splitlines(), ast.parse(text)
        lengths.append((len(lines), path))
        doc, comment = doc_lines(tree), comment_lines(text)
        comments, docs = comments + len(comment - doc), docs + len(doc)
        for node in ast.walk(tree):
            if isinstance(node, FunctionDef):
                functions.append((node.end_lineno or node.lineno) - node.lineno + 1)
                a = node.args
                arguments.append(len(a.posonlyargs + a.args + a.kwonlyargs))
        kept = [
            (i, stripped)
            for i, line in enumerate(lines, 1)
            if (stripped := line.strip()) and i not in doc and not stripped.startswith("#")
        ]
        signatures = signature_lines(tree)
        code[path] = [line for _, line in kept]
        bodies[path] = [line for i, line in kept if i not in signatures]
    total = sum(map(len, code.values()))
    largest = max(lengths)
    return {
        "files": str(len(lengths)),
        "lines": str(sum(n for n, _ in lengths)),
        "lines of code": str(total),
        "median file": f"{median(n for n, _ in lengths):.0f}",
        "largest file": f"{largest[0]} ({largest[1].relative_to(folder.parent)})",
        "median function": f"{median(functions):.0f} lines",
        "95th percentile function": f"{sorted(functions)[int(0.95 * len(functions))]} lines",
        "arguments per function": f"{mean(arguments):.2f}",
        "comments per line of code": f"{comments / total:.1%}",
        "docstring lines per line of code": f"{docs / total:.1%}",
        "8-line duplication": f"{duplicated(code) / total:.2%}",
        "the same without signatures": f"{duplicated(bodies) / total:.2%}",
    }


def main() -> int:
    folders = [Path(x) for x in sys.argv[1:]] or [Path("fla")]
    for folder in folders:
        print(folder)
        for name, value in measure(folder).items():
            print(f"  {name:<34} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
