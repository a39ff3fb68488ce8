# SPDX-License-Identifier: MIT
"""Every parameter has a role, weight decay leaves what it must, Muon steps along each map by itself."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fla.layers as L
from fla import cli
from fla.cli.train import without_muon
from fla.optim import KINDS, Muon, groups, roles
from tests.helpers import relative_error
from tests.models.common import MODELS, ids, make

EVERY = pytest.mark.parametrize("name", MODELS)
X = ids(2, 12)


@EVERY
def test_every_parameter_has_a_role(name):
    model = make(name)
    before = torch.get_rng_state()
    found = roles(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(found) == {n for n, _ in model.named_parameters()}
    assert {role.kind for role in found.values()} <= set(KINDS)
    for parameter, p in model.named_parameters():
        role = found[parameter]
        if role.kind in ("matrix", "gate"):
            assert p.dim() in (2, 3) and (role.kind == "gate" or min(p.shape) > 1), parameter
            assert not role.rows or sum(role.rows) == p.shape[-2], parameter
        if parameter.endswith((".A_log", ".dt_bias", ".bias", "norm.weight")):
            assert not role.decays, parameter
    assert found["lm_head.weight"].kind == "embedding"
    matrices = sum(p.numel() for n, p in model.named_parameters() if found[n].kind == "matrix")
    assert matrices > 0.3 * sum(
        p.numel() for n, p in model.named_parameters() if "embed" not in n and "head" not in n
    )


def test_roles_of_layers():
    found = roles(L.GatedDeltaNet(32, 2, 8, 2))
    assert {n for n, r in found.items() if r.kind == "matrix"} == {
        f"{x}_proj.weight" for x in "qkvgo"
    }
    assert {n for n, r in found.items() if r.kind == "gate"} == {"a_proj.weight", "b_proj.weight"}
    assert {n for n, r in found.items() if r.kind == "decay"} == {"A_log", "dt_bias"}
    assert found["q_conv1d.weight"].kind == "convolution" and found["o_norm.weight"].kind == "norm"
    assert roles(L.Mamba2(hidden_size=32, head_dim=16, state_size=8))["in_proj.weight"].rows == (
        64,
        64,
        8,
        8,
        4,
    )
    gated = roles(L.Attention(32, 4, output_gate=True))
    assert gated["q_proj.weight"].rows == (8,) * 8 and gated["k_proj.weight"].rows == ()


@EVERY
def test_groups_hold_every_parameter_once(name):
    model = make(name)
    parts = groups(model, lr=1e-3, weight_decay=0.2)
    held = [id(p) for part in parts for p in part["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert [part["weight_decay"] for part in parts] == [0.2, 0.0] and parts[0]["lr"] == 1e-3
    frozen = model.requires_grad_(False).get_input_embeddings().weight.requires_grad_()
    assert [p for part in groups(model) for p in part["params"]] == [frozen]


@EVERY
def test_muon_trains_every_model(name, tmp_path):
    model = make(name).train()
    optimizer, losses = Muon(model, lr=3e-3), []
    for _ in range(5):
        loss = model(input_ids=X, labels=X).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = copy.deepcopy(model)
    other = Muon(again, lr=1.0)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for m, o in ((model, optimizer), (again, other)):
        o.zero_grad()
        torch.manual_seed(1)  # Raven's router draws
        m(input_ids=X, labels=X).loss.backward()
        o.step()
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_fused_projection_steps_as_its_maps_apart():
    """By torch's own Muon on each part."""
    fused = nn.ModuleDict(dict(mixer=L.Mamba2(hidden_size=32, head_dim=16, state_size=8)))
    weight = fused["mixer"].in_proj.weight
    rows = roles(fused)["mixer.in_proj.weight"].rows
    before = weight.detach().clone()
    parts = [nn.Parameter(x.detach().clone()) for x in weight.split(rows)]
    grad = torch.randn_like(weight)
    weight.grad = grad.clone()
    for part, g in zip(parts, grad.split(rows), strict=True):
        part.grad = g.clone()
    Muon(fused, lr=0.01).step()
    torch.optim.Muon(parts, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    assert relative_error(weight, torch.cat([p.detach() for p in parts])) < 1e-6
    whole = nn.Parameter(before.clone())
    whole.grad = grad
    torch.optim.Muon([whole], lr=0.01, adjust_lr_fn="match_rms_adamw").step()
    assert relative_error(whole.detach() - before, weight.detach() - before) > 0.1


def test_experts_are_maps_of_their_own():
    model = make("gated_deltanet-experts")
    found = roles(model)
    up = next(n for n in found if n.endswith("gate_up_proj"))
    assert found[up].kind == "matrix" and found[up].rows == (16, 16)


@EVERY
def test_peft_finds_its_targets(name):
    """`target_modules` may be left out: the matrices of the mixers."""
    model = get_peft_model(make(name), LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapted = {n.partition(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
    found = roles(make(name))
    mixers = re.compile(r"layers\.\d+\.(attn|mixer|ska_attn)\.(.*)\.weight")
    wanted = {n for n, role in found.items() if role.kind == "matrix" and mixers.search(n)}
    missed = {n for n in wanted if not any(a.endswith(n.removesuffix(".weight")) for a in adapted)}
    skipped = {"out_proj"} if name in ("mamba", "mamba2", "samba") else set()  # PEFT refuses it
    left = {n.split(".")[-2] for n in missed} - skipped
    assert left <= {"layer1", "layer2", "0", "2", "k_rope"}, missed  # feature maps; mla as a kind
    assert len(adapted) >= len(wanted) / 3


def test_fla_train_with_muon(tmp_path):
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 400)
    small = ["--model_config", "hidden_size=16", "num_hidden_layers=1", "head_dim=8", "num_heads=1"]
    argv = ["train", *small, "--seq_len", "16", "--max_steps", "2", "--use_cpu", "true", "--sample_tokens", "1",
            "--data", str(tmp_path / "text.txt"), "--output_dir", str(tmp_path / "a run"), "--save_steps", "1"]  # fmt: skip
    assert cli.main([*argv, "--optim", "muon"]) == 0
    state = torch.load(tmp_path / "a run" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    kinds = {frozenset(x) for x in state["state"].values()}
    assert (
        frozenset({"momentum_buffer"}) in kinds
        and frozenset({"step", "exp_avg", "exp_avg_sq"}) in kinds
    )


@pytest.mark.parametrize(
    ("flags", "kept", "muon"),
    [
        (["--optim", "muon", "--prompt", "two  words"], ["--prompt", "two  words"], True),
        (["--optim=muon", "--seed", "1"], ["--seed", "1"], True),
        (["--optim", "sgd", "--optim", "muon"], [], True),
        (["--optim", "muon", "--optim", "sgd"], ["--optim", "sgd"], False),
        (["--prompt", "--optim muon is text"], ["--prompt", "--optim muon is text"], False),
    ],
)
def test_muon_is_taken_out_of_the_flags_and_no_other_flag_changes(flags, kept, muon):
    assert without_muon(flags) == (kept, muon)
