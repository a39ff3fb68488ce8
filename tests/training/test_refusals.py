# SPDX-License-Identifier: MIT
"""What a command refuses is one line and exit code 2, before anything is trained; what breaks while it
runs is one line too."""

import fcntl
import os

import pytest

from fla import cli

MODEL = ["--model_config", "hidden_size=16", "num_hidden_layers=1", "head_dim=8", "num_heads=1"]
TRAIN = ["train", *MODEL, "--seq_len", "16", "--max_steps", "1", "--use_cpu", "true"]
FLAGS = {
    "seq_len": ["0", "-5", "1", "x"], "per_device_train_batch_size": ["0", "-1"],
    "learning_rate": ["nan", "-1", "inf"], "gradient_accumulation_steps": ["0"], "sample_tokens": ["0", "-1"],
    "seed": ["-1"], "max_steps": ["0", "-3"], "num_train_epochs": ["-1", "0"], "max_minutes": ["0", "nan"],
    "save_steps": ["0", "-2"], "logging_steps": ["0"], "warmup_steps": ["-1"], "max_grad_norm": ["-1"],
    "weight_decay": ["-0.1", "nan"], "report_to": ["nosuch"], "optim": ["nosuch", "adamw_bnb_8bit"],
    "use_liger_kernel": ["true"], "resume_from_checkpoint": ["/no/such"], "save_strategy": ["nosuch"],
    "data": [""], "nosuch": ["3"], "adam_beta1": ["1.5"], "save_total_limit": ["0"],
}  # fmt: skip
CONFIGS = (
    "num_heads=0",
    "num_hidden_layers=-1",
    "num_hidden_layers=1.5",
    "head_dim=0",
    "vocab_size=0",
    "norm_eps=-1",
)


def refused(capsys, *argv: str) -> str:
    """The one line a command says, with exit code 2."""
    assert cli.main([str(x) for x in argv]) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("fla ")]
    assert len(lines) == 1 and "Traceback" not in said.err, said.err
    return lines[0]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("def f(x):\n    return x\n" * 400)
    return path


@pytest.mark.parametrize(("flag", "value"), [(f, v) for f, values in FLAGS.items() for v in values])
def test_flags_of_train(text, tmp_path, capsys, flag, value):
    source = [] if flag == "data" else ["--data", text]
    line = refused(capsys, *TRAIN, *source, "--output_dir", tmp_path / "run", f"--{flag}={value}")
    assert flag in line
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("field", CONFIGS)
def test_fields_of_the_model(text, tmp_path, capsys, field):
    argv = ["train", "--model_config", *MODEL[1:], field, *TRAIN[len(MODEL) + 1 :], "--data", text]
    assert field.partition("=")[0] in refused(capsys, *argv, "--output_dir", tmp_path / "run")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "text.txt").write_text("def f(x):\n    return x\n" * 400)
    argv = [
        *TRAIN,
        "--data",
        str(folder / "text.txt"),
        "--output_dir",
        str(folder / "run"),
        "--sample_tokens",
        "1",
    ]
    assert cli.main(argv) == 0
    return folder / "run"


@pytest.mark.parametrize(
    "argv",
    [
        ("generate", "MODEL", "--max_new_tokens", "-5"), ("generate", "MODEL", "--max_new_tokens", "0"),
        ("generate", "MODEL", "--temperature", "-1"), ("generate", "MODEL", "--top_p", "0"),
        ("generate", "MODEL", "--top_p", "5"), ("generate", "MODEL", "--device", "nosuch"),
        ("generate", "MODEL", "--seed", "x"), ("eval", "MODEL", "--length", "0"),
        ("eval", "MODEL", "--length", "-5"), ("eval", "MODEL", "--bucket", "-3"), ("eval", "MODEL", "--bucket", "0"),
        ("eval", "MODEL", "--recall", "-1"), ("eval", "MODEL", "--device", "nosuch"),
        ("task", "mqar", "--steps", "0"), ("task", "mqar", "--learning_rate", "nan"),
        ("preprocess", "stdlib", "OUT", "--workers", "0"), ("preprocess", "stdlib", "OUT", "--characters", "-1"),
        ("warm-up", "gla", "--layers", "0"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_flags_of_the_other_commands(model, tmp_path, capsys, argv):
    places = {"MODEL": model, "OUT": tmp_path / "out"}
    assert argv[-2].strip("-") in refused(capsys, *(places.get(x, x) for x in argv))


def test_folders_that_cannot_be_written(text, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", "/proc/nosuch"):
        line = refused(capsys, *TRAIN, "--data", text, "--output_dir", folder)
        assert "--output_dir" in line and "cannot be written" in line


def test_a_folder_that_another_run_writes(text, tmp_path, capsys):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(os.getpid()))
        lock.flush()
        line = refused(capsys, *TRAIN, "--data", text, "--output_dir", tmp_path)
    assert f"being written by another run (process {os.getpid()})" in line


def test_a_full_disk(text, tmp_path, capsys, monkeypatch):
    """torch says `inline_container` when a file could not be written to its end."""
    import torch

    def save(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", save)
    assert cli.main([*TRAIN, "--data", str(text), "--output_dir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "could not be written to" in said and "MB are free" in said and "Traceback" not in said


def test_files_that_are_left_out_are_named(text, tmp_path, capsys):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "good.txt").write_text("text\n" * 2000)
    (folder / "latin.txt").write_bytes("café\n".encode("latin-1"))
    argv = [*TRAIN, "--data", folder, "--output_dir", tmp_path / "run", "--sample_tokens", "1"]
    assert cli.main([str(x) for x in argv]) == 0
    assert "1 files of" in (said := capsys.readouterr().err) and "latin.txt (not UTF-8)" in said
