# SPDX-License-Identifier: MIT
"""Show versions, devices, what runs each stage and why, and which models of transformers use this
package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fla.cli.common import command_parser

if TYPE_CHECKING:
    import torch

    from fla.core.stage import Decision


def main(argv: list[str]) -> int:
    command_parser("doctor", __doc__).parse_args(argv)
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import fla
    from fla.core.stage import STAGES
    from fla.models.provider import describe_packages, report
    from fla.ops.engine.native import library
    from fla.utils import get_available_device

    def line(name: str, value: object) -> None:
        print(f"  {name:<34} {value}")

    print("versions")
    line("fla", fla.__version__)
    line("python", platform.python_version())
    for package in ("torch", "transformers", "triton", "accelerate", "datasets", "tensorboard"):
        try:
            line(package, version(package))
        except PackageNotFoundError:
            line(package, "not installed")
    device = get_available_device()
    print("device")
    line("used by default", device)
    line("native kernels", library.MISSING or library.instruction_set_name())
    line("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for i in range(torch.cuda.device_count()):
        line(f"cuda:{i}", torch.cuda.get_device_name(i))
    print(f"stages in fp32 on {device}")
    found = decisions(torch.device(device))
    for decision in found:
        line(decision.stage, f"{decision.backend}: {decision.form}")
    # of the forms that exist: that there is no other, the lines above say
    reasons = (
        f"not {name}: {why}"
        for d in found
        for name, why in d.rejected
        if name in STAGES[d.stage].forms and name != "torch"
    )
    for reason in dict.fromkeys(reasons):
        print(f"  {reason}")
    print("packages that transformers models look up beside fla")
    for package, runs in describe_packages().items():
        line(package, runs)
    print("transformers models")
    for use in report():
        line(use.model, f"{use.function}: {use.runs} ({use.why})")
    return 0


def decisions(device: torch.device) -> list[Decision]:
    """What runs an ordinary call of each stage."""
    import torch

    import fla.modules
    from fla.core.stage import STAGES

    for name in ("registry", "dilated_attention", "block_sparse_attention"):
        import_module(f"fla.ops.{name}")  # which makes the stages of the pages
    for name in fla.modules.__all__:
        getattr(fla.modules, name)
    facts = {name: row.example(device, torch.float32) for name, row in STAGES.items()}
    return [STAGES[name].decision("fla doctor", None, facts[name]) for name in sorted(STAGES)]
