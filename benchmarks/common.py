# SPDX-License-Identifier: MIT
"""Timing, memory, and the machine a figure comes from (`fla.utils`)."""

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fla.utils import machine

__all__ = ["alternate", "machine", "resident_memory"]


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
