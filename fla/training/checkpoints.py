# SPDX-License-Identifier: MIT
"""Checkpoints: which one is whole, which one to resume from.

A folder is sealed when it is written to the end: `checksums.txt` lists the SHA-256 of every file
that loading reads, in the form that `sha256sum -c checksums.txt` takes. A file that is missing,
damaged or another's is then named before anything is loaded.
"""

import hashlib
import os
import re
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fla.core.errors import UsageError

WEIGHTS = "model.safetensors"
SEAL = "checksums.txt"
# What `from_pretrained` reads of a model's folder, which may hold other files beside.
OF_A_MODEL = (
    "*.safetensors", "*.safetensors.index.json", "*config.json", "*.py", "tokenizer*", "vocab*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
REQUIRED = (WEIGHTS, "trainer_state.json", "optimizer.pt", "scheduler.pt")


def step_of(path: Path) -> int:
    """The step in a folder's name `checkpoint-STEP`, or -1."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match.group(1)) if match else -1


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in an output folder, newest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and step_of(p) >= 0]
    return sorted(found, key=step_of, reverse=True)


def digest(file: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def seal(folder: Path) -> None:
    """Write the checksums of a checkpoint, of all that is in it, or of a model's folder, as the
    last thing written into it.
    """
    if step_of(folder) >= 0:
        found = {p for p in folder.rglob("*") if p.name != SEAL}
    else:
        found = {p for pattern in OF_A_MODEL for p in folder.glob(pattern)}
    files = sorted(p for p in found if p.is_file())
    _write(folder, [f"{digest(p)}  {p.relative_to(folder).as_posix()}" for p in files])


def record(file: Path) -> None:
    """Write or replace one file's line in its folder's checksums, for a folder that grows."""
    kept = [line for line in _lines(file.parent) if line.partition("  ")[2] != file.name]
    _write(file.parent, [*kept, f"{digest(file)}  {file.name}"])


def require_whole(file: Path) -> Path:
    """A file that `record` knows, or `UsageError` where it is missing or not what was saved."""
    lines = [line.partition("  ") for line in _lines(file.parent)]
    right = [found for found, _, name in lines if name == file.name]
    if not file.is_file():
        raise UsageError(f"{file} is missing; delete its folder to make it again")
    if right and right[0] != digest(file):
        raise UsageError(f"{file} is not what was saved; delete its folder to make it again")
    return file


def _write(folder: Path, lines: list[str]) -> None:
    beside = folder / f"{SEAL}.{os.getpid()}.part"
    beside.write_text("\n".join([*lines, ""]))
    os.replace(beside, folder / SEAL)


def _lines(folder: Path) -> list[str]:
    path = folder / SEAL
    return path.read_text(errors="replace").splitlines() if path.is_file() else []


def broken_seal(folder: Path, skip: str = "") -> str | None:
    """Which file of a sealed folder is not what was saved, or None; also where there is no seal.
    Files whose names match `skip` are not looked at.
    """
    for line in _lines(folder):
        if skip and fnmatch(line.partition("  ")[2], skip):
            continue
        right, _, name = line.partition("  ")
        if not name or len(right) != 64:
            return f"{SEAL} holds {line[:80]!r}, which is no checksum"
        if not (folder / name).is_file():
            return f"{name} is missing"
        if digest(folder / name) != right:
            return f"{name} is not what was saved; if it was changed on purpose, delete {SEAL}"
    return None


def damage(path: Path) -> str | None:
    """What is missing or broken in a checkpoint, or None where it is whole."""
    if not (path / SEAL).is_file():
        return f"{SEAL} is missing: it was not written to the end"
    if not (path / SEAL).read_bytes().endswith(b"\n"):
        return f"{SEAL} is cut short"
    if problem := broken_seal(path):
        return problem
    listed = {line.partition("  ")[2] for line in _lines(path)}
    for name in [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]:
        if name != SEAL and name not in listed:
            return f"{name} is not in {SEAL}"
    for name in REQUIRED:
        if name == WEIGHTS and (path / f"{WEIGHTS}.index.json").exists():
            continue
        if not (path / name).exists():
            return f"{name} is missing"
    return None


def broken_weights(file: Path) -> str | None:
    """Why a safetensors file cannot be read, or None where it can. The header holds every offset,
    so a file that was cut short is found without reading it.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            weights.keys()
    except (SafetensorError, OSError) as error:
        return f"cannot be read ({error})"
    return None


def newest_whole(folder: Path, warn=print) -> Path | None:
    """The newest whole checkpoint; damaged ones are named through `warn` and passed over."""
    for path in checkpoints(folder):
        problem = damage(path)
        if problem is None:
            return path
        warn(f"checkpoint {path} is damaged ({problem}); trying the one before it")
    return None


def require_model(folder: str) -> Path:
    """The folder of a saved model, checked; raises `UsageError` that says what is wrong with it."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UsageError(f"checkpoint {folder!r} does not exist; pass the folder of a saved model")
    if not (path / "config.json").exists():
        inner = newest_whole(path, warn=lambda message: None)
        hint = f"; did you mean {inner}?" if inner else ""
        raise UsageError(f"checkpoint {folder!r} has no config.json{hint}")
    files = list(path.glob("*.safetensors"))
    if not files:
        raise UsageError(f"checkpoint {folder!r} has no {WEIGHTS}: it was not written to the end")
    problems = (f"{file.name} {problem}" for file in files if (problem := broken_weights(file)))
    if problem := next(problems, None):
        raise UsageError(f"checkpoint {folder!r} is damaged: {problem}")
    return path
