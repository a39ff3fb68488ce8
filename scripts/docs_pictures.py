# SPDX-License-Identifier: MIT
"""The pictures of docs/research.md, of models that `make tasks-demo` left:

python -m scripts.docs_pictures runs/tasks docs
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import fla.models  # noqa: F401  registers the architectures
from fla import analysis
from fla.tasks import task_of
from fla.training.checkpoints import require_model


def traced(folder: Path, task: str, length: int) -> list[analysis.Trace]:
    model = AutoModelForCausalLM.from_pretrained(require_model(str(folder)))
    with analysis.trace(model) as found, torch.no_grad():
        model(task_of(task).rows(8, length, seed=1).input_ids[:, :-1], use_cache=False)
    return found


def main(runs: Path, out: Path) -> None:
    recall = traced(runs / "mqar" / "gated_deltanet", "mqar", 24)
    analysis.plot_attention(recall[-1], heads=2).savefig(out / "analysis-attention.png")
    turning = traced(runs / "parity" / "gated_deltanet-allow_neg_eigval=true", "parity", 128)
    plain = traced(runs / "parity" / "gated_deltanet", "parity", 128)
    for name in ("states", "half_lives", "gates", "memory"):
        getattr(analysis, f"plot_{name}")(turning).savefig(out / f"analysis-{name}.png")
    named = [
        replace(x, layer=f"{x.layer.removesuffix('.attn')}, beta below {most}")
        for pair in zip(plain, turning, strict=True)
        for x, most in zip(pair, (1, 2), strict=True)
    ]
    analysis.plot_eigenvalues(named).savefig(out / "analysis-eigenvalues.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
