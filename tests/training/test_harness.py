# SPDX-License-Identifier: MIT
"""lm-evaluation-harness on a model of ours: where it is installed, and what is said where it is not."""

import json
import sys

import pytest
import torch

from fla.core.errors import UsageError
from fla.data.tokens import load_tokenizer
from fla.evals.harness import run_harness
from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

TASK = """
task: pins
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""


def make_model():
    torch.manual_seed(0)
    sizes = dict(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_heads=1, head_dim=8)
    return GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**sizes, eos_token_id=1)).eval()


def test_a_task_of_ones_own(tmp_path):
    """Accuracy is that of the model's own likelihoods."""
    pytest.importorskip("lm_eval")
    model, tokenizer = make_model(), load_tokenizer("byte")
    rows = [dict(q=f"{i} is ", label=i % 2, choices=["a", "b"]) for i in range(8)]
    (tmp_path / "pins.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "pins.yaml").write_text(TASK.replace("FILE", str(tmp_path / "pins.jsonl")))
    found = run_harness(model, tokenizer, ["pins"], str(tmp_path))
    right = 0
    for row in rows:
        ids = torch.tensor([[b + 3 for b in row["q"].encode()]])
        z = model(ids).logits[0, -1]
        right += int(z[ord("b") + 3] > z[ord("a") + 3]) == row["label"]
    assert found["pins"]["acc"] == right / 8
    with pytest.raises(UsageError, match=r"\['nothing'\] are not among the harness's tasks"):
        run_harness(model, tokenizer, ["nothing"])


def test_without_the_package_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match="pip install lm-eval"):
        run_harness(None, None, ["pins"])
