# SPDX-License-Identifier: MIT
"""Compiles every Triton kernel ahead of time, no GPU needed, and reports what each takes:

    python -m scripts.compile_kernels [--targets sm_90 gfx942] [--out benchmarks/results]

Every member of the family goes through its stages, forward and backward, in bf16 with K = V of 128
and, for one member, 256; launches are compiled instead of run. Registers, spilled bytes and shared
memory are read from the binaries. Exits with 1 where a kernel does not compile, or does not fit its
device.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fla.modules.kernels import cross_entropy, divergence, gated_norm
from fla.modules.losses import Divergence, LogitShape
from fla.ops.engine.kernels import launch, scan, selective
from fla.ops.engine.kernels.convolution import Convolution
from fla.ops.engine.recurrence.terms import Switches, Terms

# a target, and the bytes of shared memory a program may have there
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166912),
    "sm_89": (GPUTarget("cuda", 89, 32), 101376),
    "sm_90": (GPUTarget("cuda", 90, 32), 232448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), 65536),
    "gfx950": (GPUTarget("hip", "gfx950", 64), 163840),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), 65536),
}
LIKE_OTHERS = {"gfx90a", "gfx950", "gfx1100"}  # of which a few members tell
FEW = [("none", "none"), ("scalar", "delta"), ("vector", "delta")]
DECAYS, ERASES = ("none", "scalar", "vector"), ("none", "delta", "low rank")


@dataclass
class Kernel:
    """The resources of one kernel on one target: registers of a thread, bytes it spills, bytes of
    shared memory of a program, and the seconds its compilation took.
    """

    target: str
    member: str
    kernel: str
    registers: int
    spilled: int
    shared: int
    seconds: float
    error: str = ""


class Target:
    """Takes the place of a driver: describes a device that is not there."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def compiled_instead(target: GPUTarget, found: Callable[..., None]) -> Iterator[None]:
    """Inside, a launch compiles its kernel for the target and hands it to `found`."""
    launched = JITFunction.__getitem__

    def compile_only(kernel: JITFunction, grid: object) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            begun, error, result = time.perf_counter(), "", None
            try:
                result = kernel.warmup(*args, grid=grid, **kwargs)
            except Exception as problem:  # whatever a compiler raises is what is looked for
                error = f"{type(problem).__name__}: {problem}"
            found(kernel.fn.__name__, result, time.perf_counter() - begun, error)

        return launch

    driver.set_active(Target(target))
    JITFunction.__getitem__ = compile_only
    try:
        yield
    finally:
        JITFunction.__getitem__ = launched


def resources(result: Any) -> tuple[int, int]:
    """Registers and spilled bytes of a compiled kernel."""
    if "cubin" not in result.asm:
        text = result.asm["amdgcn"]
        spilled = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text))
        return int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0]), 4 * spilled
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def problem(decay: str, erase: str, K: int) -> Terms:
    """The terms of a call; launches look at nothing but shapes and dtypes."""
    wide, half = (1, 128, 4), dict(dtype=torch.bfloat16)
    q, k = torch.zeros(2, 1, 128, 2, K, **half)
    v = torch.zeros(*wide, K, **half)
    g = dict(none=None, scalar=torch.zeros(wide), vector=torch.zeros(*wide, K))[decay]
    beta = torch.zeros(wide) if erase == "delta" else None
    a, b = torch.zeros(2, *wide, K, **half) if erase == "low rank" else (None, None)
    return Terms(q, k, v, g=g, beta=beta, a=a, b=b)


def compile_member(decay: str, erase: str, K: int) -> None:
    """All launches of one member, forward, backward and token by token."""
    terms, state = problem(decay, erase, K), torch.zeros(1, 4, K, K)
    switches = Switches(1.0, l2norm=erase == "delta")
    call = launch.Call(terms, switches, None)
    states, written, _ = call.run_states(state)
    call.output(states, written)
    call = launch.Call(terms, switches, None, backward=True)
    call.gradients(torch.zeros_like(terms.v), state, state)
    launch.tokens(terms, Switches(1.0, l2norm=True), state, None)


def compile_channels() -> None:
    """The convolution, the vector scan and the selective scan."""
    x, weight = torch.zeros(128, 64, dtype=torch.bfloat16), torch.zeros(64, 4, dtype=torch.bfloat16)
    rows = torch.zeros(1, 4, 64)
    cuts = launch.Cuts.of([0, 128], x.device)
    call = Convolution(x, weight, None, rows, cuts)
    call.forward(True)
    call.backward(x, rows, True)
    scan.backward(x, x, x, rows[:, 0], rows[:, 0], cuts)
    A, B = torch.zeros(64, 16), x[:, :16].contiguous()
    cuts = launch.Cuts.of([0, 128], x.device, selective.CHUNK)
    inputs = selective.Inputs(x, x.float(), A, B, B)
    selective.forward(inputs, A[None], cuts, False)
    selective.backward(inputs, x, A[None], A[None], cuts)


def compile_modules() -> None:
    """Gated norm, cross entropy and divergences."""
    half = dict(dtype=torch.bfloat16)
    for width in (128, 4096):
        x, w = torch.zeros(64, width, **half), torch.zeros(width, **half)
        gated_norm.forward(x, x, w, None, False, 1e-6)
        gated_norm.backward(x, x, x, w, None, False, 1e-6)
    logits, labels = torch.zeros(4, 32768, **half), torch.zeros(4, dtype=torch.int64)
    rows = cross_entropy.forward(logits, labels, LogitShape())
    ones = torch.ones(4)
    cross_entropy.backward(logits, labels, rows, ones, ones, LogitShape(), logits, 1e-4)
    for kind in divergence.MODES:
        divergence.rows(logits.float(), logits.float(), labels, Divergence(kind, ce_weight=0.1))


def compile_all(target: str, members: list[tuple[str, str]]) -> list[Kernel]:
    """Every kernel once per member and set of switches."""
    rows: list[Kernel] = []
    seen = set()
    gpu, most = TARGETS[target]
    launch.shared_memory = lambda device: most  # type: ignore[assignment]
    launch.on_amd = lambda: gpu.backend == "hip"
    broad = [(*member, 256) for member in members if member == ("scalar", "delta")]
    for decay, erase, K in [*((*member, 128) for member in members), *broad]:

        def found(name: str, result: Any, seconds: float, error: str) -> None:
            member = f"{decay}, {erase}, {K}"  # noqa: B023 - called before the next one
            if error:
                rows.append(Kernel(target, member, name, 0, 0, 0, seconds, error.splitlines()[0]))
            elif result.hash not in seen:
                seen.add(result.hash)
                shared = result.metadata.shared
                error = f"{shared} bytes of shared memory, {most} are there" * (shared > most)
                size = resources(result)
                rows.append(Kernel(target, member, name, *size, shared, seconds, error))

        with compiled_instead(gpu, found):
            compile_member(decay, erase, K)
            if (decay, erase) == members[0]:
                compile_channels()
                compile_modules()
    return rows


def report(rows: list[Kernel]) -> str:
    lines = [
        "Every Triton kernel compiled ahead of time: `python -m scripts.compile_kernels`.",
        "",
        f"bf16, triton {triton.__version__}. Registers of a thread, bytes it spills,",
        "shared memory of a program.",
        "",
        "| target | decay, erase, K = V | kernel | registers | spilled | shared | compiled in |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r.target} | {r.member} | {r.kernel} | "
            + (r.error or f"{r.registers} | {r.spilled} | {r.shared:,} | {r.seconds:.1f} s")
            + " |"
            for r in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--members", nargs="+", help="'scalar,delta' and the like; all by default")
    parser.add_argument("--out", default="", help="folder for kernels.md and kernels.json")
    args = parser.parse_args(argv)
    members = [(decay, erase) for decay in DECAYS for erase in ERASES]
    if args.members:
        members = [tuple(m.split(",")) for m in args.members]  # type: ignore[misc]
    few = [m for m in members if m in FEW] or members
    rows = [
        row
        for target in args.targets
        for row in compile_all(target, few if target in LIKE_OTHERS else members)
    ]
    print(report(rows))
    if args.out:
        folder = Path(args.out)
        (folder / "kernels.md").write_text(report(rows))
        (folder / "kernels.json").write_text(json.dumps([asdict(r) for r in rows], indent=1))
    errors = [row for row in rows if row.error]
    for row in errors:
        print(f"{row.target} {row.member} {row.kernel}: {row.error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
