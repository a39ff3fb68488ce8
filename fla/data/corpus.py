# SPDX-License-Identifier: MIT
"""Text: the Python standard library's own source (the default, always there), files, folders,
Hugging Face datasets. Every source becomes a `Corpus` (`documents.py`).
"""

import gzip
import lzma
import os
import sys
import sysconfig
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from fla.core.errors import UsageError
from fla.data.documents import Corpus, split
from fla.data.probes import prompts
from fla.data.shards import load_held_out, load_index

STREAM_HELD_OUT = 200
# made-up texts of each of four lengths, by probe: 3.6 MB, half of it where every line asks
RECALLED = {"single": 500, "multi": 500, "variable": 500, "mqar": 2000}
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_corpus(source: str, column: str = "text", streaming: bool = False) -> Corpus:
    """`"stdlib"`, a text file, a table (.json, .jsonl, .csv, .parquet), a folder of text files, or
    `"hf:NAME"` or `"hf:NAME::CONFIG"` for a Hugging Face dataset; `"recall"` for made-up texts that
    ask for what they say (`fla.data.probes`), and `"stdlib+recall"` for both; `"tokens:FOLDER"`
    for what `fla preprocess` wrote. Raises `UsageError` where nothing is there.
    """
    if not source:
        raise UsageError("--data: it is empty; pass a text file, a folder, 'stdlib' or 'hf:NAME'")
    if source.startswith("tokens:"):
        folder = Path(source.removeprefix("tokens:")).expanduser()
        load_index(folder)
        return Corpus(source, [], load_held_out(folder), folder)
    if source in ("stdlib", "recall", "stdlib+recall"):
        documents = _stdlib() if "stdlib" in source else {}
        documents |= _recall() if "recall" in source else {}
    elif source.startswith("hf:"):
        return _from_datasets(source[3:], None, column, streaming)
    else:
        path = Path(source).expanduser()
        if not path.exists():
            raise UsageError(
                f"--data: {source!r} does not exist; pass a text file, a folder, 'stdlib', or "
                "'hf:NAME' for a "
                "Hugging Face dataset"
            )
        if path.suffix in TABLES:
            return _from_datasets(TABLES[path.suffix], str(path), column, streaming)
        files = [path] if path.is_file() else _files(path)
        documents = _read_files(path, files)
    if streaming:
        raise UsageError(
            "--streaming reads tables and Hugging Face datasets; drop it for text files"
        )
    return split(source, documents)


def _files(folder: Path) -> list[Path]:
    """All files below a folder; those in folders that cannot be entered are not seen."""
    found: list[Path] = []
    for home, _, names in os.walk(folder, onerror=lambda error: _tell(folder, [str(error)])):
        found += [p for p in (Path(home, name) for name in names) if p.is_file()]
    return sorted(found)


def _stdlib() -> dict[str, str]:
    root = _library()
    return _read_files(root, sorted(root.rglob("*.py")))


def _recall() -> dict[str, str]:
    texts: dict[str, list[str]] = {}
    for seed, (kind, share) in enumerate(RECALLED.items()):
        for characters in (100, 200, 300, 400):
            found = prompts(kind, share, characters, seed=1000 + seed)
            texts[f"{kind} {characters}"] = [p.text + p.answer + "\n" for p in found]
    return {f"recall/{n} {i}": text for n, rows in texts.items() for i, text in enumerate(rows)}


def _read_files(root: Path, files: list[Path]) -> dict[str, str]:
    """Text by path, without files that are not UTF-8, tests and installed packages."""
    documents, unread = {}, []
    for path in files:
        relative = path.relative_to(root) if path != root else Path(path.name)
        if SKIPPED_FOLDERS & set(relative.parts[:-1]):
            continue
        try:
            documents[relative.as_posix()] = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            why = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
            unread.append(f"{relative.as_posix()} ({why})")
    if unread and not (root.is_file() or root == _library()):
        _tell(root, unread)
    return documents


def _library() -> Path:
    """Where Python's standard library is, some of whose files are meant not to be UTF-8."""
    return Path(sysconfig.get_paths()["stdlib"])


def _tell(root: Path, unread: list[str]) -> None:
    shown = ", ".join(unread[:5]) + (f" and {len(unread) - 5} more" if len(unread) > 5 else "")
    print(f"--data: {len(unread)} files of {root} are left out: {shown}", file=sys.stderr)


def _from_datasets(name: str, file: str | None, column: str, streaming: bool) -> Corpus:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            "--data: tables and Hugging Face datasets need the package datasets; pip install "
            "'flash-linear-attention[train]'"
        ) from error
    path, _, config = (name, "", "") if file else name.partition("::")
    try:
        table = datasets.load_dataset(
            path, config or None, data_files=file, split="train", streaming=streaming
        )
    except Exception as error:
        raise UsageError(f"--data: {file or 'hf:' + name!r} cannot be loaded: {error}") from error
    names = table.column_names
    if names is not None and column not in names:
        raise UsageError(
            f"--data: {file or name!r} has no column {column!r}; pass --data_column with one of "
            f"{', '.join(names)}"
        )
    label = file or f"hf:{name}"
    if streaming:
        held = [row[column] for row in islice(table, STREAM_HELD_OUT)]
        return Corpus(label, _Column(table.skip(len(held)), column), held)
    texts = list(table[column])
    wrong = next((x for x in texts if x is not None and not isinstance(x, str)), None)
    if wrong is not None:
        raise UsageError(
            f"--data_column: {column!r} of {label!r} holds {type(wrong).__name__}s; expected text"
        )
    return split(label, {str(i): text for i, text in enumerate(texts) if text is not None})


class _Column:
    """One column of a streamed table, as often as it is read."""

    def __init__(self, table: Iterable[dict], column: str):
        self.table, self.column = table, column

    def __iter__(self):
        for row in self.table:
            yield row[self.column]


def compressed_bits_per_byte(documents: list[str]) -> dict[str, float]:
    """What gzip -9 and xz -9 make of the concatenated documents, in bits per byte: the floor a
    model should beat.
    """
    data = "".join(documents).encode()
    sizes = {
        "gzip -9": len(gzip.compress(data, 9)),
        "xz -9": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / max(1, len(data)) for name, size in sizes.items()}
