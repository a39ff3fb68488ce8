# SPDX-License-Identifier: MIT
"""The engine on a GPU: `python -m benchmarks.gpu [--peer FOLDER] [--out benchmarks/results]`.

bf16, K = V = 128: the gated delta rule forward and backward at the shapes the literature reports,
KDA, the decode step, every stage beside what its bytes and flops would take, and the first call of
a fresh process. Times are medians of CUDA events. FOLDER holds another package called `fla`
(`pip install --no-deps --target FOLDER WHEEL...`); it runs the same shapes in a process of its own.
A measurement that fails is reported in its row, and the others continue.
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
from typing import Any, NamedTuple

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
    rows |= model_rows(device)
    rows["first call of a process, forward and backward"] = lambda: first_call(device)
    return rows


def model_rows(device: str) -> dict[str, Callable[[], float]]:
    """A Gated DeltaNet language model: a training step, and one further token of 32 sequences."""
    gpu = device == "cuda"
    sizes = dict(hidden_size=1024, num_hidden_layers=24, num_heads=8, head_dim=128)
    if not gpu:
        sizes = dict(hidden_size=64, num_hidden_layers=2, num_heads=1, head_dim=64)

    def model() -> Any:
        from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

        config = GatedDeltaNetConfig(**sizes, vocab_size=32000 if gpu else 256)
        dtype = torch.bfloat16 if gpu else torch.float32
        return GatedDeltaNetForCausalLM(config).to(device, dtype)

    def train() -> float:
        net, shape = model(), (8, 2048) if gpu else (1, 64)
        ids = torch.randint(256, shape, device=device)

        def step() -> None:
            net(input_ids=ids, labels=ids).loss.backward()
            net.zero_grad(set_to_none=True)

        return median_time(step, device)

    def token() -> float:
        net, ids = model().eval(), torch.randint(256, (32 if gpu else 2, 64), device=device)
        with torch.no_grad():
            cache = net(input_ids=ids, use_cache=True).past_key_values
            return median_time(
                lambda: net(input_ids=ids[:, :1], past_key_values=cache, use_cache=True), device
            )

    name = f"Gated DeltaNet, {sizes['num_hidden_layers']} layers"
    return {f"{name}: training step of 8 x 2,048": train, f"{name}: a token of 32 sequences": token}


def first_call(device: str) -> float:
    from benchmarks.common import environment

    code = (
        "import time, torch; from benchmarks import gpu;"
        "from fla.ops.gated_delta_rule import chunk_gated_delta_rule as f;"
        f"x = gpu.inputs((2, 2, 128, 1), {device!r}, False); begun = time.perf_counter();"
        "gpu.both(f, x)(); torch.cuda.is_available() and torch.cuda.synchronize();"
        "print(time.perf_counter() - begun)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120,
        env=environment(TRITON_CACHE_DIR=f"/tmp/triton-first-{os.getpid()}"),
    )  # fmt: skip
    return float(done.stdout.split()[-1])


class Stage(NamedTuple):
    """A stage, the tensors it reads or writes, and its products: (rows, inner, columns) each."""

    run: Callable[[], object]
    tensors: list[Tensor]
    products: list[tuple[int, int, int]]


PEAKS = {"H200": (4.8e12, 989e12), "H100": (3.35e12, 989e12), "A100": (2.0e12, 312e12)}


def stages(device: str) -> tuple[dict[str, Stage], int]:
    """The stages of one forward and backward at 16/64 heads and 8,192 tokens, and chunks times
    heads.
    """
    from fla.ops.engine.kernels.launch import CHUNK as C
    from fla.ops.engine.kernels.launch import Call
    from fla.ops.engine.recurrence.terms import Switches, Terms

    x = inputs((16, 64, 8192, 1) if device == "cuda" else SMALL, device, False)
    call = Call(Terms(**x), Switches(1.0), None, backward=True)
    do = torch.randn_like(call.v)
    states, written, _ = call.run_states(None)
    states_grad, solved, dv, _ = call.state_gradients(do, None)
    q, k, v, o = call.q, call.k, call.v, torch.empty_like(call.v)
    attention, inverse, _, below = call.system
    gates: list[Tensor] = [call.g, call.beta]
    chunk = [x for x in (attention, inverse, below) if x is not None]
    wide = [torch.empty(len(v), call.HV, K, device=device) for _ in range(2)]  # dq, dk
    K_V, C_V, C_K = (C, K, K), (C, C, K), (C, K, C)

    def scores() -> None:
        del call.system
        _ = call.system

    found = {
        "scores and solve": Stage(scores, [q, k, *gates, *chunk], [C_K, C_K, (C, C, C)]),
        "state": Stage(
            lambda: call.run_states(None),
            [k, v, *gates, inverse, states, written],
            [K_V, C_V, K_V],
        ),
        "output": Stage(
            lambda: call.output(states, written),
            [q, written, attention, states, call.g, o],
            [K_V, C_V],
        ),
        "gradient of the state": Stage(
            lambda: call.state_gradients(do, None),
            [q, k, do, *gates, attention, inverse, states_grad, solved, dv],
            [K_V, K_V, K_V, C_V, C_V],
        ),
        "gradients of rows": Stage(
            lambda: call.row_gradients(do, states, states_grad, written, solved),
            [q, k, v, do, *gates, *chunk, states, states_grad, written, solved, *wide],
            [C_K, C_K, C_K, C_K, K_V, K_V, K_V, C_V, C_V, C_V, C_V],
        ),
    }
    return found, call.chunks * call.HV


def roofline(device: str) -> list[str]:
    """Per stage: its time, the bytes it moves, its flops, and the least time that those take."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = next((p for known, p in PEAKS.items() if known in name), None)
    lines = [
        "| stage | time | bytes | GB/s | flops | TFLOP/s | of the roofline |",
        "|" + "---|" * 7,
    ]
    found, parts = stages(device)
    for title, stage in found.items():
        seconds = median_time(stage.run, device)
        size = sum(x.numel() * x.element_size() for x in stage.tensors)
        flops = parts * sum(2 * a * b * c for a, b, c in stage.products)
        share = f"{max(size / peak[0], flops / peak[1]) / seconds:.0%}" if peak else "-"
        lines.append(
            f"| {title} | {cell(seconds)} | {size / 1e6:.1f} MB | {size / seconds / 1e9:.0f} | "
            f"{flops / 1e9:.2f} G | {flops / seconds / 1e12:.2f} | {share} |"
        )
    return lines


def measure(rows: dict[str, Callable[[], float]]) -> dict[str, float | str]:
    """Seconds by row, or what went wrong there."""
    found: dict[str, float | str] = {}
    for name, row in rows.items():
        found[name] = guarded(row)
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
    stages = result["stages"]
    lines += ["", *([stages] if isinstance(stages, str) else stages)]
    return "\n".join(lines) + "\n"


def guarded(function: Callable[[], Any]) -> Any:
    """The result of `function`, or the message of the error it raised."""
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"


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
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file too, from anywhere
    from benchmarks.common import machine

    own = operator_rows(args.device) | own_rows(args.device)
    result = {"machine": machine(), "ours": measure(own)}
    result["stages"] = guarded(lambda: roofline(args.device))
    if args.peer:
        result["peer"] = peer(args.peer, args.device)
    print(report(result))
    if args.out:
        path = Path(args.out) / f"gpu-{result['machine']['date']}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
        path.with_suffix(".md").write_text(report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
