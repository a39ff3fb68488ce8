# SPDX-License-Identifier: MIT
"""Every architecture as a small language model: `python -m benchmarks.models`.

Hidden size 256, 4 layers, vocabulary 256, fp32, batch 1: a training step (forward, loss, backward)
on 1024 tokens, the prompt of 1024 tokens into a cache, one further token, and the bytes that cache
holds.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fla.models
from benchmarks.common import alternate, machine
from benchmarks.family import write_table
from fla.models import Cache

TOKENS = 1024
SIZES: dict[str, Any] = dict(
    hidden_size=256, num_hidden_layers=4, vocab_size=256, max_position_embeddings=2 * TOKENS
)
HEADS = dict(num_heads=4)
GDN = HEADS | dict(head_dim=64)
SSM = dict(head_dim=64, state_size=64)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Transformer": HEADS,
    "LinearAttention": HEADS,
    "RetNet": HEADS,
    "GLA": HEADS,
    "HGRN": {},
    "HGRN2": dict(expand_ratio=64),
    "LightNet": dict(expand_ratio=64),
    "GSA": HEADS | dict(num_slots=64),
    "ABC": HEADS | dict(num_slots=64),
    "Raven": HEADS | dict(num_slots=64, topk=16),
    "RWKV4": {},
    "RWKV6": HEADS,
    "RWKV7": dict(head_dim=64),
    "Rodimus": dict(ska_attn=dict(num_heads=4, window_size=256)),
    "Mamba": {},
    "Mamba2": SSM,
    "Mamba3": SSM,
    "LogLinearMamba2": SSM,
    "Samba": dict(attn=dict(layers=[1, 3], num_heads=4, window_size=256)),
    "DeltaNet": HEADS,
    "GatedDeltaNet": GDN | dict(expand_v=1.0),
    "GatedDeltaNet2": GDN,
    "GatedDeltaProduct": GDN | dict(expand_v=1.0, num_householder=2),
    "KDA": GDN,
    "Comba": GDN | dict(expand_v=1.0),
    "PrecondGatedDeltaNet": GDN | dict(expand_v=1.0),
    "PrecondKDA": GDN,
    "MesaNet": GDN,
    "Mom": GDN,
    "DeltaFormer": HEADS,
    "BitNet": HEADS,
    "MLA": HEADS
    | dict(
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        qk_head_dim=64,
        v_head_dim=64,
    ),
}
HEADER = ("model", "parameters", "training step", "tokens/s", "prompt", "per token", "cache")


def build(name: str) -> Any:
    config = getattr(fla.models, f"{name}Config")(**SIZES, **ARCHITECTURES[name])
    torch.manual_seed(0)
    return getattr(fla.models, f"{name}ForCausalLM")(config)


def measure(name: str, repeats: int) -> dict[str, Any]:
    model, x = build(name), torch.randint(3, 256, (1, TOKENS))

    def train() -> None:
        model.zero_grad(set_to_none=True)
        model(x, labels=x, use_cache=False).loss.backward()

    model.train()
    training = alternate({"train": train}, repeats)["train"]
    model.eval()
    with torch.no_grad():

        def prompt() -> Cache:
            cache = Cache(config=model.config)
            model(x, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return cache

        first = alternate({"prompt": prompt}, repeats)["prompt"]
        cache = prompt()
        size, token = cache.size_in_bytes(), x[:, :1]
        one = alternate(
            {"token": lambda: model(token, past_key_values=cache, use_cache=True)}, repeats * 5
        )["token"]
    parameters = sum(p.numel() for p in model.parameters())
    return dict(parameters=parameters, training=training, prompt=first, token=one, cache=size)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="benchmarks/results", help="folder, or '' for none")
    args = parser.parse_args(argv)
    console, rows = Console(), {}
    for name in args.models:
        console.print(f"measuring {name}")
        rows[name] = measure(name, args.repeats)
    result = {"machine": machine(), "tokens": TOKENS, "rows": rows}
    table = [
        (
            name,
            f"{row['parameters'] / 1e6:.1f}M",
            f"{row['training'] * 1e3:.0f} ms",
            f"{TOKENS / row['training']:,.0f}",
            f"{row['prompt'] * 1e3:.0f} ms",
            f"{row['token'] * 1e3:.2f} ms",
            f"{row['cache'] / 2**10:,.0f} KiB",
        )
        for name, row in rows.items()
    ]
    out = Path(args.out) if args.out else None
    write_table(HEADER, table, result, out, console, "models-cpu", __doc__)


if __name__ == "__main__":
    main()
