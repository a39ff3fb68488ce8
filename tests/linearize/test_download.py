# SPDX-License-Identifier: MIT
"""`fla download`, with a hub that is a folder."""

import shutil

import huggingface_hub
import pytest
from transformers import GPT2Config, Qwen3Config

from fla import cli


@pytest.mark.parametrize(
    "config", [Qwen3Config(num_hidden_layers=3), GPT2Config(n_layer=2)], ids=lambda c: c.model_type
)
def test_it_tells_what_came(config, tmp_path, monkeypatch, capsys):
    config.save_pretrained(tmp_path / "hub")
    asked = {}

    def download(name, **options):
        asked.update(name=name, **options)
        shutil.copytree(tmp_path / "hub", options["local_dir"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert cli.main(["download", "some/model", str(tmp_path / "here")]) == 0
    out = capsys.readouterr().out
    assert asked["name"] == "some/model" and "*.safetensors" in asked["allow_patterns"]
    assert (
        f"{config.num_hidden_layers} layers" in out
        and out.count("full_attention") == config.num_hidden_layers
    )
    known = (
        "fla linearize knows this architecture"
        if config.model_type == "qwen3"
        else "does not know 'gpt2'"
    )
    assert known in out


def test_what_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    def download(name, **options):
        raise OSError("no network\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert cli.main(["download", "some/model", str(tmp_path)]) == 1
    assert "'some/model' cannot be downloaded: no network\n" in capsys.readouterr().err
