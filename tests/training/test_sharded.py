# SPDX-License-Identifier: MIT
"""`fla train --sequence_parallel`: two processes learn what one does."""

import json

import pytest
from safetensors.torch import load_file

from fla import cli
from fla.training.checkpoints import newest_whole
from tests.processes import run_ranks

SMALL = [
    "--model_config", "hidden_size=16", "num_hidden_layers=2", "num_heads=1", "head_dim=8", "intermediate_size=16",
    "attn={layers: [1], num_heads: 2}",
    "--seq_len", "33", "--per_device_train_batch_size", "3", "--sample_tokens", "8", "--warmup_steps", "0",
    "--logging_steps", "1", "--save_steps", "100", "--max_steps", "6", "--use_cpu", "true",
    "--gradient_accumulation_steps", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(8):
        lines = (f"def f{j}(x):\n    return x + {i * j}\n" for j in range(40))
        (folder / f"{i}.py").write_text("".join(lines))
    return str(folder)


def losses(folder):
    state = json.loads((newest_whole(folder) / "trainer_state.json").read_text())
    return [log["loss"] for log in state["log_history"] if "loss" in log]


def test_two_processes_learn_what_one_does(text, tmp_path):
    """Tokens that do not go up, documents that lie on both, a softmax layer, accumulation."""
    flags = ["train", *SMALL, "--data", text, "--train_sampling_strategy", "sequential"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main([*flags, "--output_dir", str(one)]) == 0
    run_ranks(2, "-m", "fla.cli", *flags, "--output_dir", two, "--sequence_parallel", "true")
    assert losses(two) == pytest.approx(losses(one), abs=2e-4)
    found, want = (load_file(folder / "model.safetensors") for folder in (two, one))
    for name, x in want.items():
        assert (found[name] - x).abs().max() < 2e-4, name
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    assert results[0]["tokens"] == results[1]["tokens"] == 6 * 2 * 99


def test_one_process_is_refused(text, tmp_path, capsys):
    flags = ["train", *SMALL, "--data", text, "--output_dir", str(tmp_path)]
    assert cli.main([*flags, "--sequence_parallel", "true"]) == 2
    assert "launch several with torchrun" in capsys.readouterr().err
