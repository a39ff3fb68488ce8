# SPDX-License-Identifier: MIT
"""Show versions, devices, what each operator would run and why, and which models of transformers
use this package.
"""

from __future__ import annotations

from fla.cli.common import command_parser


def main(argv: list[str]) -> int:
    command_parser("doctor", __doc__).parse_args(argv)
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import fla
    from fla.models.provider import report
    from fla.ops.engine.dispatch import explain
    from fla.ops.engine.native import library
    from fla.ops.registry import OPS
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
    print("operators")
    for op in OPS:
        inputs = op.inputs(1, 8, 1, 4, 4, device=device)
        for function in (op.chunk, op.token):
            found = explain(function, next(iter(inputs.values())))
            line(found.op, f"{found.backend}: {found.form}")
    print(f"  because: {found.why}")
    for name, reason in found.rejected.items():
        print(f"  not {name}: {reason}")
    print("transformers models")
    for use in report():
        line(use.model, f"{use.function}: {use.runs} ({use.why})")
    return 0
