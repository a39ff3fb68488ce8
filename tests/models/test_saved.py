# SPDX-License-Identifier: MIT
"""Saved models load where the package is installed but not imported, and where it is."""

import json
import os
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM

from tests.models.common import make

FRESH = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
assert "fla" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
again = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
x = torch.arange(5)[None]
assert type(model).__module__.startswith("fla.models.") and type(again) is type(model)
assert torch.equal(model(x).logits, again(x).logits)
assert model(x).past_key_values is not None
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[2])
"""


def test_a_checkpoint_finds_the_package_by_itself(tmp_path):
    model, first, second = make("gated_deltanet"), tmp_path / "a", tmp_path / "b"
    model.save_pretrained(first)
    command = [sys.executable, "-c", FRESH, str(first), str(second)]
    env = os.environ | dict(HF_MODULES_CACHE=str(tmp_path / "modules"))
    subprocess.run(command, check=True, timeout=200, env=env)
    names = {file.name for file in second.iterdir()}
    assert {file.name for file in first.iterdir()} == names and "modeling_fla.py" in names
    maps = [json.loads((f / "config.json").read_text())["auto_map"] for f in (first, second)]
    assert maps[0] == maps[1]
    x = torch.arange(5)[None]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(second)(x).logits, model(x).logits)
