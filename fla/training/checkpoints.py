# SPDX-License-Identifier: MIT
"""Checkpoints: which one is whole, which one to resume from."""

import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fla.core.errors import UsageError

WEIGHTS = "model.safetensors"
REQUIRED = (WEIGHTS, "trainer_state.json", "optimizer.pt", "scheduler.pt")


def step_of(path: Path) -> int:
    """The step in a folder's name `checkpoint-STEP`, or -1."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match.group(1)) if match else -1


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in an output folder, newest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and step_of(p) >= 0]
    return sorted(found, key=step_of, reverse=True)


def damage(path: Path) -> str | None:
    """What is missing or broken in a checkpoint, or None where it is whole."""
    for name in REQUIRED:
        if name == WEIGHTS and (path / f"{WEIGHTS}.index.json").exists():
            continue
        if not (path / name).exists():
            return f"{name} is missing"
    try:
        json.loads((path / "trainer_state.json").read_text())
    except ValueError:
        return "trainer_state.json is not valid JSON"
    for file in path.glob("*.safetensors"):
        if problem := broken_weights(file):
            return f"{file.name} {problem}"
    for name in ("optimizer.pt", "scheduler.pt"):
        if not zipfile.is_zipfile(path / name):
            return f"{name} is cut short"
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
    for file in files:
        if problem := broken_weights(file):
            raise UsageError(f"checkpoint {folder!r} is damaged: {file.name} {problem}")
    return path
