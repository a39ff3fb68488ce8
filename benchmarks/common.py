# SPDX-License-Identifier: MIT
"""Timing, and the machine a figure comes from."""

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch


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


def machine() -> dict[str, str]:
    """Processor, threads and versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        rows = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = rows[0].partition(":")[2].strip() if rows else cpu
    return {
        "cpu": f"{cpu}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "date": time.strftime("%Y-%m-%d"),
    }
