# SPDX-License-Identifier: MIT
"""The engine on a GPU: `python -m benchmarks.gpu [--peer FOLDER] [--out benchmarks/results]`.

bf16, K = V = 128: the gated delta rule forward and backward at the shapes the literature reports,
KDA, the decode step, every stage beside what its bytes and flops would take, and the first call of
a fresh process. Times are medians of CUDA events. FOLDER holds another package called `fla`
(`pip install --no-deps --target FOLDER WHEEL...`); it runs the same shapes in a process of its own.
What fails is reported in its row, and the rest goes on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

K = 128
# query and value heads, tokens of a sequence, sequences
SHAPES = [
    (2, 8, 2048, 1), (2, 8, 8192, 1), (2, 8, 32768, 1), (16, 32, 8192, 1), (16, 32, 4096, 8),
    (16, 64, 2048, 1), (16, 64, 8192, 1), (16, 64, 32768, 1), (16, 64, 1024, 8),
]  # fmt: skip
BACKWARD = [(16, 32, 8192, 1), (16, 32, 32768, 1), (8, 16, 8192, 1), (2, 4, 32768, 1)]
KDA = [(64, 64, 8192, 1), (16, 16, 8192, 1)]
DECODE = [1, 32, 256]  # sequences of 32 heads
SMALL = (1, 2, 100, 2)  # where there is no GPU to measure
REPEATS = 20


def median_time(function: Callable[[], object], device: str) -> float:
    """Seconds."""
    function()
    times = []
    for _ in range(REPEATS if device == "cuda" else 1):
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def inputs(shape: tuple[int, int, int, int], device: str, vector: bool) -> dict[str, Any]:
    H, HV, T, N = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k = torch.randn(2, N, T, H, K, device=device, dtype=dtype)
    v = torch.randn(N, T, HV, K, device=device, dtype=dtype)
    g = -torch.rand(N, T, HV, *([K] if vector else []), device=device)
    beta = torch.rand(N, T, HV, device=device, dtype=dtype)
    return dict(q=F.normalize(q, dim=-1), k=F.normalize(k, dim=-1), v=v, g=g, beta=beta)


def forward(function: Callable, x: dict[str, Tensor]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            function(**x)

    return run


def both(function: Callable, x: dict[str, Tensor]) -> Callable[[], object]:
    leaves = {n: y.detach().requires_grad_() for n, y in x.items()}

    def run() -> None:
        o = function(**leaves)
        o = o[0] if isinstance(o, tuple) else o
        torch.autograd.grad(o, list(leaves.values()), torch.ones_like(o), allow_unused=True)

    return run


def attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    groups = v.shape[2] // q.shape[2]
    heads = [y.transpose(1, 2) for y in (*(x.repeat_interleave(groups, 2) for x in (q, k)), v)]
    return F.scaled_dot_product_attention(*heads, is_causal=True)


def operator_rows(device: str) -> dict[str, Callable[[], float]]:
    """The rows that any package called `fla` can fill."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    from fla.ops.kda import chunk_kda

    gpu = device == "cuda"
    rows: dict[str, Callable[[], float]] = {}

    def row(name: str, way: Callable, function: Callable, shape: tuple, vector: bool) -> None:
        title = f"{name}, {shape[0]}/{shape[1]} heads, {shape[3]} x {shape[2]:,}"
        rows[title] = lambda: median_time(way(function, inputs(shape, device, vector)), device)

    for shape in SHAPES if gpu else [SMALL]:
        row("forward", forward, chunk_gated_delta_rule, shape, False)
    for shape in BACKWARD if gpu else [SMALL]:
        row("forward and backward", both, chunk_gated_delta_rule, shape, False)
    for shape in KDA if gpu else [SMALL]:
        row("KDA forward", forward, chunk_kda, shape, True)
    for N in DECODE if gpu else DECODE[:1]:
        x = inputs((32, 32, 1, N), device, False)
        x["initial_state"] = torch.randn(N, 32, K, K, device=device)
        step = forward(
            lambda **y: fused_recurrent_gated_delta_rule(**y, output_final_state=True), x
        )
        rows[f"decode step, {N} x 32 heads"] = lambda step=step: median_time(step, device)
    return rows


def own_rows(device: str) -> dict[str, Callable[[], float]]:
    """Softmax attention beside it, and the first call of a fresh process."""
    rows: dict[str, Callable[[], float]] = {}
    for shape in [(16, 64, 2048, 1), (16, 64, 8192, 1)] if device == "cuda" else [SMALL]:
        for name, way in (("forward", forward), ("forward and backward", both)):
            title = f"SDPA {name}, {shape[0]}/{shape[1]} heads, {shape[3]} x {shape[2]:,}"
            rows[title] = lambda way=way, shape=shape: median_time(
                way(attention, inputs(shape, device, False)), device
            )
    rows["first call of a process, forward and backward"] = lambda: first_call(device)
    return rows


def first_call(device: str) -> float:
    code = (
        "import time, torch; from benchmarks import gpu;"
        "from fla.ops.gated_delta_rule import chunk_gated_delta_rule as f;"
        f"x = gpu.inputs((2, 2, 128, 1), {device!r}, False); begun = time.perf_counter();"
        "gpu.both(f, x)(); torch.cuda.is_available() and torch.cuda.synchronize();"
        "print(time.perf_counter() - begun)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120,
        env=os.environ | {"TRITON_CACHE_DIR": f"/tmp/triton-first-{os.getpid()}"},
    )  # fmt: skip
    return float(done.stdout.split()[-1])


def stage_rows(device: str) -> dict[str, Callable[[], float]]:
    """Each stage of one forward and backward at 16/64 heads, 8,192 tokens."""
    from fla.ops.engine.kernels.launch import Call

    x = inputs((16, 64, 8192, 1) if device == "cuda" else SMALL, device, False)
    tensors = (*x.values(), None, None)
    call = Call(tensors, None, 1.0, False, False, backward=True)
    do = torch.randn_like(call.v)
    states, written, _ = call.run_states(None)
    states_grad, solved, _, _ = call.state_gradients(do, None)

    def scores() -> None:
        del call.system
        _ = call.system

    stages: dict[str, Callable[[], object]] = {
        "scores and solve": scores,
        "state": lambda: call.run_states(None),
        "output": lambda: call.output(states, written),
        "gradient of the state": lambda: call.state_gradients(do, None),
        "gradients of rows": lambda: call.row_gradients(do, states, states_grad, written, solved),
    }
    return {f"stage: {n}": lambda f=f: median_time(f, device) for n, f in stages.items()}


def measure(rows: dict[str, Callable[[], float]]) -> dict[str, float | str]:
    """Seconds by row, or what went wrong there."""
    found: dict[str, float | str] = {}
    for name, row in rows.items():
        try:
            found[name] = row()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        print(f"  {name}: {cell(found[name])}", file=sys.stderr, flush=True)
    return found


def cell(x: float | str | None) -> str:
    if x is None:
        return "-"
    return x if isinstance(x, str) else f"{x * 1e6:.0f} us" if x < 1e-3 else f"{x * 1e3:.2f} ms"


def peer(folder: str, device: str) -> dict[str, float | str]:
    """The operators of another package, in a process that finds it before ours."""
    environment = os.environ | {"PYTHONPATH": folder}
    command = [sys.executable, str(Path(__file__).resolve()), "--operators", "--device", device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd="/")
    if done.returncode:
        return {"all": f"exit {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def report(result: dict) -> str:
    ours, theirs = result["ours"], result.get("peer", {})
    about = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    lines = ["The engine on a GPU: `python -m benchmarks.gpu`.", "", about, ""]
    lines += ["| bf16, K = V = 128 | ours | peer | |", "|---|---|---|---|"]
    for name, x in ours.items():
        y = theirs.get(name)
        ratio = f"{y / x:.2f}x" if isinstance(x, float) and isinstance(y, float) else ""
        lines.append(f"| {name} | {cell(x)} | {cell(y)} | {ratio} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--peer", help="folder of another package called fla")
    parser.add_argument("--out", default="benchmarks/results", help="folder, or '' for none")
    parser.add_argument("--operators", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: torch sees no GPU here; --device cpu tries the script", file=sys.stderr
        )
        return 2
    if args.operators:  # also inside a peer's process, where this file is all there is of us
        print(json.dumps(measure(operator_rows(args.device))))
        return 0
    from benchmarks.common import machine

    own = operator_rows(args.device) | own_rows(args.device) | stage_rows(args.device)
    result = {"machine": machine(), "ours": measure(own)}
    if args.peer:
        result["peer"] = peer(args.peer, args.device)
    print(report(result))
    if args.out:
        path = Path(args.out) / f"gpu-{result['machine']['date']}"
        path.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
        path.with_suffix(".md").write_text(report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
