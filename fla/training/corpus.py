# SPDX-License-Identifier: MIT
"""Text: the Python standard library's own source (the default, always there), files, folders,
Hugging Face datasets.

Every source is a list of documents split into a training and a held-out part. The split is by
document, from a hash of its name, so it is the same on every run and machine.
"""

import gzip
import hashlib
import lzma
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fla.training.errors import UsageError

HELD_OUT_ONE_IN = 20
STREAM_HELD_OUT = 200
# made-up texts of each of four lengths, by probe: 3.6 MB, half of it where every line asks
RECALLED = {"single": 500, "multi": 500, "variable": 500, "mqar": 2000}
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class Corpus:
    """Training documents (a list, or an iterable read on the fly) and held-out documents; with
    `shards` the training part lies there as tokens.
    """

    name: str
    train: Iterable[str]
    held_out: list[str]
    shards: Path | None = None

    @property
    def streaming(self) -> bool:
        return not isinstance(self.train, list)

    def held_out_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.held_out)


def load_corpus(source: str, column: str = "text", streaming: bool = False) -> Corpus:
    """`"stdlib"`, a text file, a table (.json, .jsonl, .csv, .parquet), a folder of text files, or
    `"hf:NAME"` or `"hf:NAME::CONFIG"` for a Hugging Face dataset; `"recall"` for made-up texts that
    ask for what they say (`fla.evals.recall`), and `"stdlib+recall"` for both; `"tokens:FOLDER"`
    for what `fla preprocess` wrote. Raises `UsageError` where nothing is there.
    """
    if source.startswith("tokens:"):
        from fla.training.shards import load_held_out, load_index

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
    from fla.evals.recall import prompts

    texts: dict[str, list[str]] = {}
    for seed, (kind, share) in enumerate(RECALLED.items()):
        for characters in (100, 200, 300, 400):
            found = prompts(kind, share, characters, seed=1000 + seed)
            texts[f"{kind} {characters}"] = [p.text + p.answer + "\n" for p in found]
    return {f"recall/{n} {i}": text for n, rows in texts.items() for i, text in enumerate(rows)}


def split(name: str, documents: dict[str, str]) -> Corpus:
    """Hold out about a twentieth of the text in whole documents, at least one; a single document is
    cut instead.
    """
    documents = {key: text for key, text in documents.items() if text}
    if not documents:
        raise UsageError(f"--data: {name!r} holds no text; every file is empty or not UTF-8")
    if len(documents) == 1:
        text = next(iter(documents.values()))
        cut = len(text) - max(1, len(text) // HELD_OUT_ONE_IN)
        return Corpus(name, [text[:cut]], [text[cut:]])
    budget = sum(map(len, documents.values())) / HELD_OUT_ONE_IN
    held: set[str] = set()
    for key in sorted(documents, key=lambda k: hashlib.sha256(k.encode()).hexdigest()):
        if not held or len(documents[key]) <= budget:
            held.add(key)
            budget -= len(documents[key])
    return Corpus(
        name,
        [text for key, text in documents.items() if key not in held],
        [text for key, text in documents.items() if key in held],
    )


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
