# SPDX-License-Identifier: MIT
"""Timing, memory, fresh processes, and the machine a figure comes from (`fla.utils`)."""

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fla.utils import machine

__all__ = ["alternate", "environment", "machine", "python", "resident_memory"]


def alternate(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function, run in turn `repeats` times after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for turn in range(repeats):  # there and back: who runs first finds the caches of who ran last
        for name, function in list(functions.items())[:: 1 if turn % 2 else -1]:
            begun = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in times.items()}


def resident_memory(which: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes; where there is no /proc, the peak."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith(which))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def environment(**variables: str) -> dict[str, str]:
    """The environment of a process that finds this checkout, wherever it is started."""
    path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))} | variables


def python(*arguments: str) -> str:
    """What a fresh Python process prints."""
    done = subprocess.run(
        [sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip
    return done.stdout
