# SPDX-License-Identifier: MIT
"""The `fla` command as users run it: train, kill, resume, generate, eval, doctor, and wrong input."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import fla
from fla import cli
from fla.training.callbacks import FlaTrainer
from fla.training.card import shown_command
from fla.training.checkpoints import damage, newest_whole
from fla.training.run import RunArguments, prepare_model
from tests import processes

SMALL = [
    "--model_config", "hidden_size=16", "num_hidden_layers=2", "num_heads=1", "head_dim=8", "intermediate_size=16",
    "--seq_len", "32", "--per_device_train_batch_size", "2", "--sample_tokens", "8", "--warmup_steps", "0",
    "--logging_steps", "1", "--save_steps", "4", "--max_steps", "8", "--use_cpu", "true",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(8):
        (folder / f"{i}.py").write_text(
            "".join(f"def f{j}(x):\n    return x + {i * j}\n" for j in range(40))
        )
    return str(folder)


def train(text, folder, *flags):
    return cli.main(["train", *SMALL, "--data", text, "--output_dir", str(folder), *flags])


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert train(text, folder) == 0
    return folder


def losses(folder):
    state = json.loads((newest_whole(folder) / "trainer_state.json").read_text())
    return {log["step"]: log["loss"] for log in state["log_history"] if "loss" in log}


def test_a_run_leaves_everything_behind(trained):
    result = json.loads((trained / "results.json").read_text())
    assert result["steps"] == 8 and result["tokens"] == 8 * 64
    assert 0 < result["bits_per_byte"] < 9 and set(result["compressed"]) == {"gzip -9", "xz -9"}
    assert (trained / "loss.png").stat().st_size > 5000
    assert (trained / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((trained / "logs").rglob("events.out.tfevents.*"))
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ  # the next run has its own
    assert set(losses(trained)) == set(range(1, 9))
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(trained)
    ids = tokenizer("def ", return_tensors="pt", add_special_tokens=False).input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= 7


def test_a_run_writes_a_model_card(text, trained):
    card = ModelCard.load(trained / "README.md")
    assert card.data.to_dict() == dict(library_name="transformers", pipeline_tag="text-generation",
        tags=["fla", "linear-attention", "gated_deltanet"])  # fmt: skip
    result = json.loads((trained / "results.json").read_text())
    rows = dict(re.findall(r"^\| (.*?) \| (.*?) \|$", card.text, re.MULTILINE))
    want = {
        "architecture": "`gated_deltanet`", "parameters": f"{result['parameters']:,}", "steps": "8",
        "layers": "2 linear attention", "width": "16", "tokens": "512", "data": f"`{text}`",
        "this model": f"{result['bits_per_byte']:.3f}", "gzip -9": f"{result['compressed']['gzip -9']:.3f}",
        "fla": fla.__version__, "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    assert {name: rows[name] for name in want} == want
    assert "fla train --model_config hidden_size=16 num_hidden_layers=2" in card.text
    home = str(Path.home())  # no path but those that were given
    assert home not in card.text.replace(text, "").replace(str(trained), "")
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    space = {}
    exec(code, space)
    assert space["model"].num_parameters() == result["parameters"]


def test_a_model_card_shows_no_secret():
    shown = shown_command(["--hub_token", "hf_one", "--hub_token=hf_two", "--tokenizer", "byte"])
    assert "hf_" not in shown and "--tokenizer byte" in shown


def test_resumed_equals_uninterrupted(text, trained, tmp_path):
    folder = tmp_path / "b"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "checkpoint-8")
    assert train(text, folder, "--resume", "true") == 0
    assert losses(folder) == losses(trained)
    for name, value in load_file(trained / "model.safetensors").items():
        assert torch.equal(value, load_file(folder / "model.safetensors")[name]), name


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(text, trained, tmp_path, capsys):
    folder = tmp_path / "b"
    shutil.copytree(trained, folder)
    weights = folder / "checkpoint-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert train(text, folder, "--resume", "true") == 0
    assert (
        "checkpoint-8 is damaged (model.safetensors is not what was saved"
        in capsys.readouterr().err
    )
    assert losses(folder) == losses(trained)


HARM = {
    "missing": lambda p, other: p.unlink(),
    "empty": lambda p, other: p.write_bytes(b""),
    "cut short": lambda p, other: p.write_bytes(p.read_bytes()[:-1]),
    "a bit flipped": lambda p, other: p.write_bytes(
        bytes([p.read_bytes()[0] ^ 1]) + p.read_bytes()[1:]
    ),
    "zeros": lambda p, other: p.write_bytes(bytes(p.stat().st_size)),
    "another file": lambda p, other: p.write_bytes(other.read_bytes()),
    "a folder": lambda p, other: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("harm", HARM)
def test_damage_to_every_file_is_recognised(trained, tmp_path, harm):
    copy = tmp_path / "checkpoint-8"
    shutil.copytree(trained / "checkpoint-8", copy)
    assert damage(copy) is None
    files = sorted(p for p in copy.rglob("*") if p.is_file())
    assert len(files) > 8
    for file in files:
        kept = file.read_bytes()
        HARM[harm](file, files[0] if file != files[0] else files[1])
        assert file.name in damage(copy)
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        file.write_bytes(kept)
    assert damage(copy) is None


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_damaged_model_is_not_loaded(trained, tmp_path, capsys, harm, name):
    copy = tmp_path / "model"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("checkpoint-*", "logs"))
    HARM[harm](copy / name, copy / "results.json")
    assert cli.main(["generate", str(copy), "--prompt", "x", "--max_new_tokens", "1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and (name in said or "no config.json" in said), said


def test_weights_that_are_missing_or_no_numbers(trained, tmp_path, capsys):
    for change, message in (
        (
            lambda w: w.pop("model.layers.0.attn.o_proj.weight"),
            "lacks the weights model.layers.0.attn.o_proj",
        ),
        (
            lambda w: w["lm_head.weight"].fill_(float("nan")),
            "holds NaN or infinity in lm_head.weight",
        ),
        (lambda w: w.update(more=torch.zeros(2)), "holds weights that its model has not: more"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(3, 3)}), "lm_head.weight"),
    ):
        copy = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("checkpoint-*", "logs"))
        (copy / "checksums.txt").unlink()
        weights = load_file(copy / "model.safetensors")
        change(weights)
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
        assert cli.main(["generate", str(copy), "--prompt", "x", "--max_new_tokens", "1"]) == 2
        assert message in capsys.readouterr().err


def start(text, folder, *flags):
    options = (*SMALL, "--data", text, "--output_dir", folder, *flags)
    return processes.start("-m", "fla.cli", "train", *options)


def wait_for_checkpoint(folder, process):
    deadline = time.monotonic() + 120
    while newest_whole(Path(folder), warn=lambda m: None) is None:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_interrupted_then_resumed(text, tmp_path, how):
    folder = tmp_path / "run"
    process = start(text, folder, "--max_steps", "100000", "--save_steps", "5")
    wait_for_checkpoint(folder, process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=120)
    if how == signal.SIGINT:
        assert process.returncode == 130, errors
        assert (
            "stopping after this step" in errors
            and "The same command with --resume true continues" in errors
        )
    at = newest_whole(folder)
    step = int(at.name.split("-")[1])
    again = start(
        text, folder, "--max_steps", str(step + 2), "--save_steps", "5", "--resume", "true"
    )
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert f"step {step + 1}/{step + 2}" in output and "step 1/" not in output


def test_the_curve_of_byte_tokens_is_in_bits_per_byte(text, trained, tmp_path, monkeypatch):
    """By default, and going on from a folder whose tokenizer is that of bytes."""
    drawn = []
    monkeypatch.setattr("fla.training.run.plot_loss", lambda *args: drawn.append(args[3]))
    assert train(text, tmp_path / "a", "--max_steps", "1") == 0
    on = ["--model", str(trained), *SMALL[SMALL.index("--seq_len") :], "--max_steps", "1"]
    assert cli.main(["train", *on, "--data", text, "--output_dir", str(tmp_path / "b")]) == 0
    assert drawn == [True, True]


def test_a_time_budget_ends_the_run_with_a_result(text, tmp_path, capsys):
    assert train(text, tmp_path / "r", "--max_steps", "100000", "--max_minutes", "0.02") == 0
    result = json.loads((tmp_path / "r" / "results.json").read_text())
    said = f"0.02 minutes of --max_minutes are over: stopped at step {result['steps']} of 100000"
    assert said in capsys.readouterr().err
    assert (
        0 < result["steps"] < 100000
        and newest_whole(tmp_path / "r").name == f"checkpoint-{result['steps']}"
    )


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_a_run_that_breaks_stops_and_keeps_its_last_good_checkpoint(
    what, text, tmp_path, capsys, monkeypatch
):
    """Poison the loss, or the weights behind a last finite loss, at step 4."""
    original = Trainer.training_step

    def poisoned(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        if self.state.global_step < 3:
            return loss
        if what == "loss":
            return loss * torch.nan
        next(model.parameters()).grad.fill_(torch.nan)
        return loss

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    assert train(text, tmp_path / "r", "--save_steps", "1", "--max_grad_norm", "0") == 1
    message = capsys.readouterr().err
    what = "the loss is not a number at" if what == "loss" else "the weights are not numbers after"
    kept = newest_whole(tmp_path / "r")
    assert f"{what} step 4; the last good checkpoint is {kept}" in message
    assert kept.name == "checkpoint-3"
    assert all(v.isfinite().all() for v in load_file(kept / "model.safetensors").values())


def test_generate_streams_text(trained, capsys):
    assert (
        cli.main(
            [
                "generate",
                str(trained),
                "--prompt",
                "def f",
                "--max_new_tokens",
                "12",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    sampled = capsys.readouterr().out
    assert sampled.startswith("def f") and len(sampled) > 6
    greedy = [
        "generate",
        str(trained),
        "--temperature",
        "0",
        "--max_new_tokens",
        "9",
        "--device",
        "cpu",
    ]
    assert cli.main(greedy) == 0
    first = capsys.readouterr().out
    assert cli.main(greedy) == 0
    assert capsys.readouterr().out == first


def figures_of(out):
    rows = [line.split("│") for line in out.splitlines() if line.count("│") == 3]
    return {row[1].strip(): row[2].strip() for row in rows}


def test_eval_by_several_processes_is_that_of_one(trained, text, capsys):
    options = ["eval", str(trained), "--data", text, "--length", "32", "--bucket", "16"]
    assert cli.main([*options, "--device", "cpu"]) == 0
    alone = figures_of(capsys.readouterr().out)
    environment = {"ACCELERATE_USE_CPU": "true"}
    command = ("-m", "fla.cli", *options, "--device", "cpu")
    said = "".join(processes.run_ranks(2, *command, env=environment))
    together = figures_of(said)
    assert together == alone and "perplexity at 16..31" in alone
    assert said.count("bits per byte, gzip") == 1


def test_eval_without_a_tokenizer_takes_a_named_one(trained, text, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(trained / name, bare / name)
    options = ["--data", text, "--device", "cpu"]
    assert cli.main(["eval", str(bare), *options]) == 2
    assert "has no tokenizer; pass --tokenizer with 'byte'" in capsys.readouterr().err
    assert cli.main(["eval", str(bare), *options, "--tokenizer", "byte"]) == 0
    named = figures_of(capsys.readouterr().out)
    assert cli.main(["eval", str(trained), *options]) == 0
    assert figures_of(capsys.readouterr().out) == named
    assert cli.main(["eval", str(bare), *options, "--tokenizer", "no/such"]) == 2
    assert "'no/such' cannot be loaded" in capsys.readouterr().err


def test_eval_of_tasks_says_what_a_checkpoint_lacks(trained, capsys):
    options = ["eval", str(trained), "--tasks"]
    assert cli.main([*options, "parity"]) == 0
    assert "160 tokens" in capsys.readouterr().out
    assert cli.main([*options, "coppy"]) == 2
    assert "did you mean 'copy'" in capsys.readouterr().err


def test_eval_scores_by_position(trained, text, capsys):
    flags = [
        "--data",
        text,
        "--length",
        "32",
        "--bucket",
        "16",
        "--device",
        "cpu",
        "--recall",
        "30",
    ]
    assert cli.main(["eval", str(trained), *flags]) == 0
    out = capsys.readouterr().out
    result = json.loads((trained / "results.json").read_text())
    for part in (
        f"{result['bits_per_byte']:.4f}",
        "perplexity at 0..15",
        "perplexity at 16..31",
        "gzip -9",
        "recall, multi: exact answers",
    ):
        assert part in out


def test_doctor_tells_versions_operators_and_consumers(capsys, no_interpreter):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for part in (
        "torch",
        "recurrence.chunk",
        "not triton: the Triton kernels are for GPU tensors, not for cpu",
        "qwen3_next",
        "fla (fla.ops.gated_delta_rule",
    ):
        assert part in out


def test_config_files_and_flags(text, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: delta_net\nmodel_config: [hidden_size=16, num_hidden_layers=1, num_heads=2]\ndata: {text}\n"
        "seq_len: 32\nmax_steps: 3\nsample_tokens: 4\nuse_cpu: true\n"
    )
    folder = tmp_path / "r"
    assert (
        cli.main(["train", "--config", str(file), "--output_dir", str(folder), "--max_steps", "2"])
        == 0
    )
    assert json.loads((folder / "results.json").read_text())["steps"] == 2
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["model_type"] == "delta_net"
        and config["hidden_size"] == 16
        and config["vocab_size"] == 259
    )
    assert cli.main(["train", "--config", str(file), "--output_dir", str(folder)]) == 2
    assert "already holds checkpoints; add --resume" in capsys.readouterr().err


def test_weight_decay_leaves_norms_biases_and_decay_rates_alone(tmp_path):
    from tests.models.common import make

    model = make("gated_deltanet-hybrid")
    trainer = FlaTrainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    decayed = {
        name.split(".")[-2:][0] if name.endswith("weight") else name
        for name in trainer.get_decay_parameter_names(model)
    }
    assert not any("norm" in name or "A_log" in name or "bias" in name for name in decayed)
    assert {"q_proj", "a_proj", "q_conv1d", "gate_proj", "lm_head"} <= decayed


def test_scores_on_the_way(text, tmp_path):
    folder = tmp_path / "r"
    assert train(text, folder, "--eval_strategy", "steps", "--eval_steps", "4") == 0
    history = json.loads((newest_whole(folder) / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in history if "eval_loss" in log] == [4, 8]


def test_going_on_from_a_saved_model(text, trained, tmp_path):
    flags = [
        "--data",
        text,
        "--output_dir",
        str(tmp_path / "r"),
        "--model",
        str(trained),
        "--max_steps",
        "1",
    ]
    assert cli.main(["train", *SMALL[SMALL.index("--seq_len") :], *flags]) == 0
    assert train(text, tmp_path / "s", "--model", str(trained)) == 2
    AutoModelForCausalLM.from_pretrained(trained).bfloat16().save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(trained).save_pretrained(tmp_path / "half")
    run = RunArguments(model=str(tmp_path / "half"))
    assert {p.dtype for p in prepare_model(run)[0]().parameters()} == {torch.float32}


def test_going_on_takes_the_tokenizer_of_the_checkpoint(text, trained, tmp_path, capsys):
    words = ["<s>", "def", "return", "x", "+"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "x"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>").save_pretrained(tmp_path / "t")
    more = ["--tokenizer", str(tmp_path / "t")]
    assert train(text, tmp_path / "a", *more) == 0
    rest = SMALL[SMALL.index("--seq_len") :]
    on = ["train", *rest, "--data", text, "--model", str(tmp_path / "a"), "--output_dir"]
    assert cli.main([*on, str(tmp_path / "b")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "b").get_vocab() == {
        word: i for i, word in enumerate(words)
    }
    assert cli.main([*on, str(tmp_path / "c"), "--tokenizer", "byte"]) == 2
    assert "it has 259 tokens, and checkpoint" in capsys.readouterr().err
    for file in (tmp_path / "a").glob("tokenizer*"):
        file.unlink()
    assert cli.main([*on, str(tmp_path / "d")]) == 2
    assert "has no tokenizer; pass --tokenizer" in capsys.readouterr().err


def test_the_example_of_going_on(text, trained, tmp_path):
    flags = ["--model", str(trained), "--data", text, "--output_dir", str(tmp_path / "on")]
    short = ["--max_steps", "2", "--sample_tokens", "4", "--seq_len", "32", "--use_cpu", "true"]
    assert cli.main(["train", "--config", "examples/continue.yaml", *flags, *short]) == 0
    assert json.loads((tmp_path / "on" / "results.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tran"], "'tran' is not a command"),
        (["train", "--data", "/no/such/corpus"], "'/no/such/corpus' does not exist"),
        (["train", "--data", "EMPTY"], "holds no text"),
        (
            ["train", "--data", "TEXT", "--model", "gated_delta_net"],
            "did you mean 'gated_deltanet'? Registered: abc",
        ),
        (
            ["train", "--data", "TEXT", "--model_config", "hiden_size=8"],
            "no field 'hiden_size'; did you mean 'hidden_size'?",
        ),
        (
            ["train", "--data", "TEXT", "--model_config", "hidden_size"],
            "'hidden_size' is not of the form name=value",
        ),
        (["train", "--data", "TEXT", "--model_config", "num_heads=five"], "num_heads"),
        (
            ["train", "--data", "TEXT", "--tokenizer", "/no/tokenizer"],
            "'/no/tokenizer' cannot be loaded",
        ),
        (["train", "--config", "/no/file.yaml"], "'/no/file.yaml' does not exist"),
        (["train", "--config"], "--config needs a file"),
        (["train", "--no_such_flag", "1"], "no_such_flag"),
        (["generate", "/no/checkpoint"], "'/no/checkpoint' does not exist"),
        (["eval", "EMPTY"], "has no config.json"),
        (["generate", "HALF"], "is damaged: model.safetensors cannot be read"),
        (["generate", "NOWEIGHTS"], "has no model.safetensors: it was not written to the end"),
    ],
)
def test_wrong_usage_is_one_message_and_exit_code_2(argv, message, text, trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("half", "noweights"):
        shutil.copytree(
            trained, tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-*", "logs")
        )
    weights = tmp_path / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "noweights" / "model.safetensors").unlink()
    places = {
        "TEXT": text,
        "EMPTY": str(tmp_path / "empty"),
        "HALF": str(tmp_path / "half"),
        "NOWEIGHTS": str(tmp_path / "noweights"),
    }
    argv = [places.get(a, a) for a in argv]
    if argv[0] == "train":
        argv += ["--output_dir", str(tmp_path / "out")]
    try:
        code = cli.main(argv)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_help_is_a_line_per_command_and_loads_nothing():
    code = "import sys; from fla.cli import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *lines, loaded = done.stdout.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed == list(cli.COMMANDS) and loaded == "False"
    assert all(line == line.rstrip() and len(line) < 80 for line in lines)
    whole = processes.run("-m", "fla.cli")
    assert whole.returncode == 0 and whole.stdout.splitlines() == lines


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command, capsys):
    said = []
    for argv in ([command, "--help"], ["help", command]):
        with pytest.raises(SystemExit) as exit:
            cli.main(argv)
        assert exit.value.code == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].startswith(f"usage: fla {command} [-h]")


def test_the_version_is_told(capsys):
    assert cli.main(["--version"]) == cli.main(["version"]) == 0
    assert capsys.readouterr().out == f"fla {fla.__version__}\n" * 2


def test_an_unknown_command_is_one_line(capsys):
    assert cli.main(["lineraize"]) == cli.main(["help", "lineraize"]) == 2
    line = "fla: 'lineraize' is not a command; did you mean 'linearize'? fla --help lists them all"
    assert capsys.readouterr().err == f"{line}\n" * 2
