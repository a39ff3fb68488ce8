# SPDX-License-Identifier: MIT
"""transformers' own models on a CPU, without and with us: `python -m benchmarks.peer_transformers`.

Random weights in fp32, batch 1, real widths with the number of layers (and of experts, and the
vocabulary) cut to fit: Qwen3.5 0.8B with 4 layers, Kimi-Linear with 4 layers of a quarter of its
width. Each figure comes from processes of its own, in turn; the median counts. "without" hides
the package, "fla" is the package installed, "accelerate" also calls `fla.accelerate(model)`.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a file too, from anywhere
    sys.path[0] = str(Path(__file__).resolve().parents[1])

WAYS = ("without", "fla", "accelerate")
VOCABULARY = 8192
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3.5 0.8B": (
        "Qwen3_5Text",
        dict(
            hidden_size=1024, intermediate_size=3584, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=2, head_dim=256, linear_num_key_heads=16,
            linear_num_value_heads=16, linear_key_head_dim=128, linear_value_head_dim=128,
        ),
    ),
    "Kimi-Linear": (
        "KimiLinear",
        dict(
            hidden_size=576, intermediate_size=2304, moe_intermediate_size=256,
            num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
            num_local_experts=16, num_experts_per_tok=4, kv_lora_rank=128, qk_nope_head_dim=64,
            qk_rope_head_dim=32, v_head_dim=64, linear_head_dim=128, linear_num_heads=8,
            layer_types=["linear_attention"] * 3 + ["full_attention"],
        ),
    ),
}  # fmt: skip
ROWS = ("prefill 2048", "prefill 8192", "decode", "training step 1024")


def measure(model: str, way: str) -> dict[str, float]:
    """Seconds of every row, in this process."""
    if way == "without":
        sys.modules["fla"] = None  # type: ignore[assignment]
    import torch
    import transformers

    prefix, sizes = MODELS[model]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(
        **sizes, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    name = f"{prefix.removesuffix('Text')}ForCausalLM"
    net = getattr(transformers, name)(config).eval()
    if way == "accelerate":
        import fla

        fla.accelerate(net)
    x = torch.randint(3, VOCABULARY, (1, 8192))
    times = {}

    def clock(row: str, function: Any, repeats: int) -> None:
        if repeats > 1:
            function()
        spent = []
        for _ in range(repeats):
            begun = time.perf_counter()
            function()
            spent.append(time.perf_counter() - begun)
        times[row] = statistics.median(spent)

    with torch.no_grad():
        clock(ROWS[0], lambda: net(x[:, :2048], logits_to_keep=1, use_cache=False), 3)
        clock(ROWS[1], lambda: net(x, logits_to_keep=1, use_cache=False), 1)
        cache = net(x[:, :1024], logits_to_keep=1, use_cache=True).past_key_values
        clock(ROWS[2], lambda: net(x[:, :1], past_key_values=cache), 40)
    net.train()
    y = x[:, :1024]
    clock(ROWS[3], lambda: net(y, labels=y, use_cache=False).loss.backward(), 2)
    return times


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=1, help="processes for each figure")
    parser.add_argument("--out", default="benchmarks/results", help="folder, or '' for none")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    from rich.console import Console

    from benchmarks.common import machine, python
    from benchmarks.family import write_table

    console, result, table = Console(), {}, []
    for model in args.models:
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for i in range(args.rounds):
            for way in WAYS:
                console.print(f"measuring {model}, {way}, {i + 1} of {args.rounds}")
                command = ["-m", "benchmarks.peer_transformers", "--measure", model, way]
                runs[way].append(json.loads(python(*command).splitlines()[-1]))
        result[model] = {
            way: {row: statistics.median(r[row] for r in rows) for row in ROWS}
            for way, rows in runs.items()
        }
        for row in ROWS:
            plain, ours, swapped = (result[model][way][row] * 1e3 for way in WAYS)
            cells = [f"{x:,.1f} ms" for x in (plain, ours, swapped)]
            table.append(
                (f"{model}, {row}", *cells, f"{plain / ours:.2f}x", f"{plain / swapped:.2f}x")
            )
    header = ("", *WAYS, "fla is faster by", "accelerate by")
    out = Path(args.out) if args.out else None
    data = {"machine": machine(), "rows": result}
    write_table(header, table, data, out, console, "transformers-cpu", __doc__)


if __name__ == "__main__":
    main()
