# SPDX-License-Identifier: MIT
"""transformers' own models on a CPU, without and with us: `python -m benchmarks.peer_transformers`.

Random weights in fp32, batch 1. All eight models that call `fla`, with 3 linear layers and one of
attention each; widths, experts and the vocabulary are cut to fit a small machine, head sizes are
real, and Qwen3.5 has the real widths of its 0.8B. Each figure comes from processes of its own, in
turn; the median counts. "without" hides the package, "fla" is the package installed, "accelerate"
also calls `fla.accelerate(model)`.
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
LAYERS = dict(
    num_hidden_layers=4, layer_types=["linear_attention"] * 3 + ["full_attention"]
)  # fmt: skip
GDN = dict(
    num_attention_heads=8, num_key_value_heads=2, head_dim=256, linear_key_head_dim=128,
    linear_value_head_dim=128, **LAYERS,
)  # fmt: skip
KDA = dict(
    hidden_size=576, intermediate_size=2304, moe_intermediate_size=256, num_experts_per_tok=4,
    num_attention_heads=8, num_key_value_heads=8, kv_lora_rank=128, qk_nope_head_dim=64,
    v_head_dim=64, linear_head_dim=128, linear_num_heads=8, **LAYERS,
)  # fmt: skip
EXPERTS = dict(
    hidden_size=1024, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=256,
    shared_expert_intermediate_size=256, linear_num_key_heads=8, linear_num_value_heads=16, **GDN,
)  # fmt: skip
# name -> (prefix of the config class, name of the model class, sizes)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen3-Next": ("Qwen3Next", "Qwen3NextForCausalLM", EXPERTS),
    "Qwen3.5 0.8B": (
        "Qwen3_5Text",
        "Qwen3_5ForCausalLM",
        dict(
            hidden_size=1024, intermediate_size=3584, linear_num_key_heads=16,
            linear_num_value_heads=16, **GDN,
        ),
    ),
    "Qwen3.5-MoE": ("Qwen3_5MoeText", "Qwen3_5MoeForCausalLM", EXPERTS),
    "Qwen4-Exp": (
        "Qwen4ExpText",
        "Qwen4ExpForCausalLM",
        dict(
            hc_count=4, hc_lowrank=64, indexer_n_heads=4, indexer_kv_heads=1,
            indexer_head_dim=256, indexer_budget=2048, indexer_compress_ratio=4, **EXPERTS,
        ),
    ),
    "OLMo-Hybrid": (
        "OlmoHybrid",
        "OlmoHybridForCausalLM",
        dict(
            hidden_size=1024, intermediate_size=2816, num_attention_heads=8,
            linear_num_key_heads=8, linear_num_value_heads=8, linear_key_head_dim=96,
            linear_value_head_dim=192, **LAYERS,
        ),
    ),
    "Kimi-Linear": (
        "KimiLinear",
        "KimiLinearForCausalLM",
        dict(qk_rope_head_dim=32, num_local_experts=16, **KDA),
    ),
    "GLM-5-Next": (
        "Glm5NextText",
        "Glm5NextTextModel",
        dict(
            q_lora_rank=256, n_routed_experts=16, index_head_dim=64, index_n_heads=4, hc_mult=4,
            **KDA,
        ),
    ),
    "Bailing-Hybrid": (
        "BailingHybrid",
        "BailingHybridForCausalLM",
        dict(
            qk_rope_head_dim=32, num_local_experts=16, n_group=4, topk_group=2, head_dim=64, **KDA
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

    prefix, name, sizes = MODELS[model]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(
        **sizes, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    net = getattr(transformers, name)(config).eval()
    last = dict(logits_to_keep=1) if "CausalLM" in name else {}
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
        clock(ROWS[0], lambda: net(x[:, :2048], **last, use_cache=False), 3)
        clock(ROWS[1], lambda: net(x, **last, use_cache=False), 1)
        cache = net(x[:, :1024], **last, use_cache=True).past_key_values
        clock(ROWS[2], lambda: net(x[:, :1], past_key_values=cache), 40)
    net.train()
    y = x[:, :1024]
    if last:
        clock(ROWS[3], lambda: net(y, labels=y, use_cache=False).loss.backward(), 2)
    else:  # the bare decoder: transformers has no language model of it alone
        step = lambda: net(y, use_cache=False).last_hidden_state.square().mean().backward()  # noqa: E731
        clock(ROWS[3], step, 2)
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
