# SPDX-License-Identifier: MIT
"""`fla linearize` as users run it: the whole, one stage, killed and resumed, compared, planned, and wrong input."""

import json
import re
import shutil
from dataclasses import asdict

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from fla import cli
from fla.data.tokens import load_tokenizer
from fla.linearize.export import NATIVE
from tests.linearize.common import make_config, write_text
from tests.processes import kill_once, run, run_ranks, start

EVERYTHING = dict(uniform=True, scratch=True, control=0.5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    load_tokenizer("byte").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    text = folder / "text"
    text.mkdir()
    config = make_config(write_text(text), linear=NATIVE, report=EVERYTHING)
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config) | dict(export="qwen3_5")))
    return str(folder / "config.yaml")


def linearize(*arguments):
    return cli.main(["linearize", *map(str, arguments)])


@pytest.fixture(scope="module")
def whole(teacher, config_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    assert linearize(teacher, out, "--config", config_file) == 0
    return out


def test_everything_is_there(whole, teacher):
    report = (whole / "conversion_report.md").read_text()
    for name in (
        "teacher",
        "after surgery",
        "after alignment",
        "after distillation",
        "uniform placement",
        "from scratch",
        "control",
    ):
        assert f"| {name}" in report
    for picture in ("layer_scores.png", "alignment.png", "costs.png"):
        assert (whole / picture).read_bytes()[:4] == b"\x89PNG" and picture in report
    kinds = json.loads((whole / "config.json").read_text())["layer_types"]
    scores = json.loads((whole / "layer_scores.json").read_text())
    assert [i for i, kind in enumerate(kinds) if kind != "linear_attention"] == scores["softmax"]
    assert len(scores["rounds"]) == 2
    measured = {p.stem: json.loads(p.read_text()) for p in (whole / "report").glob("*.json")}
    assert measured["teacher"]["kl"] < 1e-6 < measured["after_distillation"]["kl"]
    assert measured["after_distillation"]["kl"] < measured["after_surgery"]["kl"]


def test_the_result_loads_and_generates(whole):
    tokenizer = AutoTokenizer.from_pretrained(whole)
    ids = tokenizer("abc ", return_tensors="pt", add_special_tokens=False).input_ids
    greedy = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    found = []
    for folder, kind in ((whole, "HybridForCausalLM"), (whole / "qwen3_5", "Qwen3_5ForCausalLM")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model).__name__ == kind
        found.append(model.eval().generate(ids, **greedy))
    assert torch.equal(*found)
    assert linearize.__name__ and cli.main(["generate", str(whole), "--max_new_tokens", "3"]) == 0


def test_what_is_done_is_not_done_again(whole, teacher, config_file, capsys):
    before = (whole / "model.safetensors").stat().st_mtime_ns
    assert linearize(teacher, whole, "--config", config_file) == 0
    assert "distill: done" in capsys.readouterr().out
    assert (whole / "model.safetensors").stat().st_mtime_ns == before


def test_other_options_or_another_teacher_are_refused(
    whole, teacher, config_file, tmp_path, capsys
):
    assert linearize(teacher, whole, "--config", config_file, "--set", "align.lr=1") == 2
    assert "stage 'align' was begun with other options (align)" in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path)
    load_tokenizer("byte").save_pretrained(tmp_path)
    assert linearize(tmp_path, whole, "--config", config_file) == 2
    assert "holds a conversion of another teacher" in capsys.readouterr().err


def test_a_run_that_is_killed_goes_on(teacher, config_file, tmp_path):
    """Killed in the alignment without warning, it ends with the bits of a run that was not."""
    changes = [
        "--set",
        "align.tokens=3200",
        "align.save=1",
        "align.check=64",
        "export=library",
        "linear={}",
    ]
    folder = tmp_path / "a"
    command = ("-m", "fla.cli", "linearize", teacher, folder, "--config", config_file, "--stage")
    run(*command, "calibrate", *changes, check=True)
    saved = folder / "align/progress_000.pt"
    kill_once(start(*command, "align", *changes), saved.exists)
    assert saved.exists() and not list((tmp_path / "a/align").glob("layer_*.json"))
    for name in "ab":
        for stage in ("calibrate", "align"):
            assert (
                linearize(
                    teacher, tmp_path / name, "--config", config_file, "--stage", stage, *changes
                )
                == 0
            )
    for i in range(3):
        file = f"align/layer_{i:03}.safetensors"
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_teachers_tokens_from_disk(teacher, config_file, tmp_path):
    changes = [
        "distill.top_k=8",
        "select.method=uniform",
        "report.uniform=false",
        "report.scratch=false",
        "report.control=0",
    ]
    assert linearize(teacher, tmp_path, "--config", config_file, "--set", *changes) == 0
    assert (tmp_path / "distill/teacher/ids.npy").exists()
    assert (tmp_path / "conversion_report.md").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("align.layers=[1,9]",), r"align.layers: \[9\] are outside 0..2"),
        (("distill.top_k=8", "distill.hidden_weight=0.5"), "hidden_weight=0.5 needs the teacher's"),
    ],
)
def test_options_that_cannot_be(change, said, teacher, config_file, tmp_path, capsys):
    assert linearize(teacher, tmp_path, "--config", config_file, "--set", *change) == 2
    assert re.search(said, capsys.readouterr().err)


def test_comparison(teacher, config_file, tmp_path, capsys):
    call = (
        teacher,
        tmp_path,
        "--config",
        config_file,
        "--compare",
        "gla,retnet",
        "--set",
        "export=library",
        "linear={}",
    )
    assert linearize(*call) == 0
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert sorted(line.split(" | ")[0].strip("| ") for line in lines[4:]) == ["gla", "retnet"]
    assert linearize(*call[:4], "--compare", "gla,hyena") == 2
    assert "['hyena'] are not among gated_deltanet" in capsys.readouterr().err


def test_a_plan_needs_no_weights(config_file, tmp_path, capsys):
    Qwen3Config(num_hidden_layers=28, tie_word_embeddings=True).save_pretrained(tmp_path)
    assert linearize(tmp_path, "none", "--dry_run", "--memory", "300") == 0
    out = capsys.readouterr().out
    assert "28 layers" in out and "distill" in out and "600.0 M" in out
    assert linearize(tmp_path, "none", "--dry_run", "--memory", "10") == 1
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "align.los=mse"], "there is no 'align.los'; did you mean 'loss'?"),
        (["--set", "align.loss=l3"], "align.loss is 'l3'; expected one of l2, mse"),
        (["--set", "linear.rule=hyena"], "rule is 'hyena'; expected one of"),
        (["--set", "align.lr=fast"], "align.lr is 'fast'; a number"),
        (["--set", "align"], "'align' is not of the form"),
        (["--set", "data.source=/nowhere"], "'/nowhere' does not exist"),
        (["--stage", "polish"], "--stage: 'polish' is not one of calibrate, align"),
        (["--stage", "select"], "stage 'calibrate' comes first"),
        (["--set", "linear.rope=true"], "it cannot be a Qwen3.5 model: linear has rope=True"),
        (["--config", "nothing.yaml"], "'nothing.yaml' does not exist"),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_wrong_input(arguments, said, teacher, config_file, tmp_path, capsys):
    file = [] if "--config" in arguments else ["--config", config_file]
    assert linearize(teacher, tmp_path, *file, *arguments) == 2
    assert said in capsys.readouterr().err


def test_no_teacher(tmp_path, capsys):
    assert linearize(tmp_path / "nothing", tmp_path) == 2
    assert "teacher" in capsys.readouterr().err


def test_distillation_in_two_processes(whole, teacher, config_file, tmp_path):
    """On half the steps each."""
    shutil.copytree(whole, tmp_path / "out")
    state = json.loads((tmp_path / "out/state.json").read_text())
    for stage in ("distill", "long", "report"):
        del state["done"][stage], state["begun"][stage]
    (tmp_path / "out/state.json").write_text(json.dumps(state))
    shutil.rmtree(tmp_path / "out/distill")
    (tmp_path / "out/model.safetensors").unlink()
    options = ("--config", config_file, "--stage", "distill")
    run_ranks(2, "-m", "fla.cli", "linearize", teacher, tmp_path / "out", *options)
    assert (tmp_path / "out/model.safetensors").exists()
    history = json.loads((tmp_path / "out/distill/checkpoint-4/trainer_state.json").read_text())
    assert history["global_step"] == 4  # eight batches
    assert "distill" in json.loads((tmp_path / "out/state.json").read_text())["done"]


def test_what_runs_in_one_process_says_so(teacher, config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert linearize(teacher, tmp_path, "--config", config_file, "--stage", "calibrate") == 2
    assert "stage 'calibrate' runs in one process" in capsys.readouterr().err
