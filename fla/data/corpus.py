# SPDX-License-Identifier: MIT
"""Text: the Python standard library's own source (the default, always there), files, folders,
Hugging Face datasets. Every source becomes a `Corpus` (`documents.py`).
"""

import gzip
import lzma
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
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        documents = _read_files(path, files)
    if streaming:
        raise UsageError(
            "--streaming reads tables and Hugging Face datasets; drop it for text files"
        )
    return split(source, documents)


def _stdlib() -> dict[str, str]:
    root = Path(sysconfig.get_paths()["stdlib"])
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
    documents = {}
    for path in files:
        relative = path.relative_to(root) if path != root else Path(path.name)
        if SKIPPED_FOLDERS & set(relative.parts[:-1]):
            continue
        try:
            documents[relative.as_posix()] = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, PermissionError):
            continue
    return documents


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
    return split(label, {str(i): text for i, text in enumerate(table[column])})


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
