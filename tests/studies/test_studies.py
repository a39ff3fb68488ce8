# SPDX-License-Identifier: MIT
"""Studies: what they read, what they leave behind, and the ablated rule against its loop."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from fla import cli
from fla.core.errors import UsageError
from fla.layers import GatedDeltaNet
from fla.models import Cache
from fla.models.ablation import PARTS, AblatedGatedDeltaNet
from fla.studies import AblatedGatedDeltaNetConfig, AblatedGatedDeltaNetForCausalLM, load, run_study
from fla.studies.report import power_law
from tests.helpers import assert_same, matrix
from tests.models.common import TINY, ids
from tests.processes import run

SIZES = dict(hidden_size=32, head_dim=8, num_heads=2, expand_v=1.0)
QUICK = "tokens: 1024\nbatch_tokens: 256\nseq_len: 64\nhidden_size: 32\nlayers: 2\nhead_dim: 16\nscored: 2000\n"


def literal(layer, x):
    """The rule token by token, without what is left out."""
    q, k, v = (getattr(layer, f"{n}_proj")(x) for n in "qkv")
    q, k, v = (getattr(layer, f"{n}_conv1d")(y)[0] for n, y in zip("qkv", (q, k, v), strict=True))
    q, k, v = (y.unflatten(-1, (2, 8)) for y in (q, k, v))
    if "l2norm" in layer.without:
        q, k = q * 8**-0.5, k * 8**-0.5
    else:
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    g = -layer.A_log.exp() * F.softplus(layer.a_proj(x) + layer.dt_bias)
    beta = layer.b_proj(x).sigmoid()
    S, out = x.new_zeros(x.shape[0], 2, 8, 8), []
    for t in range(x.shape[1]):
        S = S if "decay" in layer.without else g[:, t, :, None, None].exp() * S
        read = 0 if "delta" in layer.without else torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - read))
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) * 8**-0.5)
    return layer.finish(torch.stack(out, 1), x)


@pytest.mark.parametrize(
    "without", [[], *([p] for p in PARTS), list(PARTS)], ids=lambda p: "+".join(p) or "none"
)
def test_an_ablated_layer_is_its_loop(without):
    torch.manual_seed(0)
    layer = AblatedGatedDeltaNet(**SIZES, without=without).double()
    x = torch.randn(2, 21, 32, dtype=torch.float64)
    assert_same(layer(x)[0], literal(layer, x), "o", 1e-10)
    if not without:
        whole = GatedDeltaNet(**SIZES).double()
        whole.load_state_dict(layer.state_dict())
        assert_same(layer(x)[0], whole(x)[0], "nothing left out")


def test_an_ablated_model_decodes_as_it_reads():
    torch.manual_seed(0)
    config = AblatedGatedDeltaNetConfig(**TINY, num_heads=2, head_dim=8, without=["delta"])
    model, x = AblatedGatedDeltaNetForCausalLM(config).double().eval(), ids(2, 9)
    whole = model(x).logits
    cache, steps = Cache(config=config), []
    for t in range(9):
        steps.append(model(x[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    assert_same(torch.cat(steps, 1), whole, "decoding", 1e-6)
    with pytest.raises(ValueError, match="without holds gate"):
        AblatedGatedDeltaNet(**SIZES, without=["gate"])


def test_a_power_law_is_found_through_noise():
    sizes = np.geomspace(1e4, 1e7, 8)
    noise = 1 + 1e-3 * np.sin(np.arange(8))
    E, _, alpha = power_law(list(sizes), list((0.7 + 30 * sizes**-0.35) * noise))
    assert abs(E - 0.7) < 0.1 and alpha == pytest.approx(0.35, abs=0.05)
    assert power_law([1e3, 1e4], [2.0, 1.0])[0] == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: scaling\n", "a list 'cells'"),
        ("kind: sclaing\ncells: []\n", "kind is 'sclaing'"),
        ("kind: scaling\ntokns: 3\ncells: []\n", "did you mean 'tokens'"),
        ("kind: scaling\ncells: [{name: a}]\n", "needs a name and a model"),
        ("kind: scaling\ncells: [{name: a, model: gla, layer: 2}]\n", "did you mean 'layers'"),
        (
            "kind: scaling\ncells: [{name: a, model: gla}, {name: a, model: gla}]\n",
            "occur twice",
        ),
    ],
)
def test_wrong_studies_are_refused(text, message, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        load(tmp_path / "s.yaml")
    with pytest.raises(UsageError, match="does not exist"):
        load(tmp_path / "other.yaml")


def test_a_wrong_model_is_found_before_any_trains(tmp_path):
    cells = "cells: [{name: a, model: gla}, {name: b, model: gla, fields: {expand: 3}}]\n"
    (tmp_path / "s.yaml").write_text(f"kind: scaling\n{QUICK}{cells}")
    with pytest.raises(UsageError, match="'gla' has no field expand"):
        run_study(load(tmp_path / "s.yaml"), tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind",
    matrix(
        [("scaling",), ("ablation",), ("hybrid",), ("long_context",)],
        lambda kind: kind in ("scaling", "long_context"),
    ),
)
def test_a_study_runs_by_one_command_and_keeps_finished_cells(kind, tmp_path):
    cells = (
        "cells: [{name: small one, model: gla}, {name: b, model: transformer, hidden_size: 64}]\n"
    )
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_text("".join(f"{i} and {j}\n" for j in range(900)))
    text = f"data: {tmp_path / 'text'}\nlengths: [64, 128]\n"
    (tmp_path / "s.yaml").write_text(f"kind: {kind}\n{QUICK}{text}{cells}")
    command = ["study", str(tmp_path / "s.yaml"), "--output_dir", str(tmp_path)]
    if kind == "scaling":
        run("-m", "fla.cli", *command, check=True)
    else:
        assert cli.main(command) == 0
    assert "| small one |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").stat().st_size > 5000
    (cell,) = tmp_path.glob("small-one-*/results.json")
    row, when = json.loads(cell.read_text()), cell.stat().st_mtime_ns
    assert ("long" in row) == (kind == "long_context") and row["bits_per_byte"] > 0
    if kind != "scaling":
        return
    assert cli.main(command) == 0 and cell.stat().st_mtime_ns == when
    assert cli.main([*command, "--set", "seed=1"]) == 0
    seeds = {
        json.loads(x.read_text())["settings"]["seed"]
        for x in tmp_path.glob("small-one-*/results.json")
    }
    assert seeds == {0, 1}  # both are kept
