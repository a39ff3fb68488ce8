# SPDX-License-Identifier: MIT
"""Dilated attention three ways: the operator, a model, and the names of dilated_attention_pytorch:

python examples/dilated_attention.py
"""

import torch

from dilated_attention_pytorch import RingDilatedAttention
from fla.models import LongNetConfig, LongNetForCausalLM
from fla.ops.dilated_attention import coverage_report, dilated_attention, geometric_schedule


def main() -> None:
    torch.manual_seed(0)
    segments, rates = geometric_schedule(1024, first=256)
    report = coverage_report(segments, rates, heads=4)
    print(f"{segments} by {rates}: {report.pairs:.0f} scores a token and head, dense 1024")

    q, k, v = torch.randn(3, 1, 1000, 4, 32)
    branches = dict(segment_lengths=segments, dilation_rates=rates)
    o = dilated_attention(q, k, v, **branches, causal=True)
    # the same under torchrun, where every process passes its own tokens
    ring = RingDilatedAttention(segments, rates)(q, k, v, is_causal=True)
    print(f"operator and module differ by {(o - ring).abs().max().item():.0e}")

    config = LongNetConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_heads=4, **branches
    )
    model = LongNetForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = (torch.arange(1000) * 7 % 251)[None]
    for step in range(10):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
