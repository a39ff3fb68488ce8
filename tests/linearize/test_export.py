# SPDX-License-Identifier: MIT
"""Students as transformers' own Qwen3.5."""

import subprocess
import sys

import pytest
import torch
import transformers

from fla.linearize.export import NATIVE, obstacle, to_qwen3_5
from fla.linearize.surgery import assemble, load_teacher, make_linear
from tests.linearize.test_surgery import ids, make_teacher


def make_student(kind="qwen3, wide heads", **changes):
    teacher = load_teacher(make_teacher(kind))
    options = NATIVE | changes
    bank = {i: make_linear(teacher, i, options) for i in (0, 2)}
    with torch.no_grad():
        for layer in bank.values():
            for p in layer.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return assemble(teacher, bank, options).eval()


def test_logits_are_equal_and_it_loads_without_us(tmp_path):
    student = make_student()
    native = to_qwen3_5(student)
    assert type(native).__name__ == "Qwen3_5ForCausalLM"
    x = ids()
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    with torch.no_grad():
        want = student(x).logits
        assert (native(x).logits - want).abs().max() < 2e-5 * want.abs().max()
        padded = native(x, attention_mask=mask).logits - student(x, attention_mask=mask).logits
        assert padded[mask.bool()].abs().max() < 2e-5 * want.abs().max()
    native.save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['fla'] = None; import torch, transformers;"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval();"
        f"print(type(model).__name__, model.generate(torch.tensor({x[:1].tolist()}), max_new_tokens=5,"
        " do_sample=False, pad_token_id=0)[0, -5:].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    new = student.generate(x[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)[
        0, -5:
    ].tolist()
    assert done.stdout.strip() == f"Qwen3_5ForCausalLM {new}"


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("qwen3, wide heads", dict(rope=True), "linear has rope=True; Qwen3.5 wants rule="),
        ("qwen2, biases", {}, "q/k norms per head, no biases"),
    ],
)
def test_what_does_not_fit_is_said(kind, changes, said):
    student = make_student(kind, **changes)
    assert said in obstacle(student.config)
    with pytest.raises(ValueError, match="export: it cannot be a Qwen3"):
        to_qwen3_5(student)


def test_tied_embeddings_stay_tied():
    original = make_teacher("qwen3, wide heads")
    config = transformers.Qwen3Config(**original.config.to_dict() | dict(tie_word_embeddings=True))
    teacher = load_teacher(transformers.Qwen3ForCausalLM(config))
    student = assemble(teacher, {0: make_linear(teacher, 0, NATIVE)}, NATIVE)
    native = to_qwen3_5(student)
    assert native.lm_head.weight.data_ptr() == native.model.embed_tokens.weight.data_ptr()
    with torch.no_grad():
        assert (native(ids()).logits - student.eval()(ids()).logits).abs().max() < 1e-4
