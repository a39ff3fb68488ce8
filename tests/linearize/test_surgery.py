# SPDX-License-Identifier: MIT
"""Teachers of every kind become hybrids of their own weights."""

import pytest
import torch
import transformers

from fla.linearize.surgery import assemble, attention_of, load_teacher, make_linear, student_config
from fla.models import HybridForCausalLM, TransformerConfig, TransformerForCausalLM
from tests.helpers import assert_same

SIZES = dict(vocab_size=31, hidden_size=24, num_hidden_layers=3, intermediate_size=32)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
TEACHERS = {
    "llama": ("Llama", HEADS),
    "llama, multi-query, tied": (
        "Llama",
        HEADS | dict(num_key_value_heads=1, tie_word_embeddings=True),
    ),
    "llama 3 positions": ("Llama", HEADS | dict(rope_parameters=LLAMA3)),
    "qwen2, biases": ("Qwen2", HEADS),
    "qwen2, some windows": (
        "Qwen2",
        HEADS | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "qwen3, wide heads": ("Qwen3", HEADS | dict(head_dim=16)),
    "mistral, window": ("Mistral", HEADS | dict(sliding_window=4)),
    "olmo2": ("Olmo2", HEADS),
}


def make_teacher(name):
    kind, options = TEACHERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for n, p in model.named_parameters():  # biases and norms that matter
        if p.dim() == 1:
            torch.nn.init.normal_(p, float("norm" in n), 0.3)
    return model


def ids(T=12):
    return torch.randint(31, (2, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TEACHERS)
def test_without_a_linear_layer_it_is_the_teacher(name):
    original = make_teacher(name)
    teacher = load_teacher(original)
    student = assemble(teacher, {})
    assert isinstance(student, HybridForCausalLM)
    x = ids()
    with torch.no_grad():
        want, ours = teacher(x).logits, student(x).logits
        assert torch.equal(ours, want)
        assert (ours - original(x).logits).abs().max() < 2e-5


@pytest.mark.parametrize("name", TEACHERS)
def test_every_head_reads_what_the_teachers_does(name):
    """Queries, keys and values of the linear layer are those of the teacher's heads: softmax attention over
    them is the teacher's own."""
    teacher = load_teacher(make_teacher(name))
    x = torch.randn(1, 12, 24)
    for layer in range(3):
        attention, linear = attention_of(teacher, layer), make_linear(teacher, layer)
        seen = {}
        linear.rule.forward = lambda q, k, v, *_, seen=seen: seen.update(q=q, k=k, v=v) or (v, v)
        linear(x)
        o = attention._whole(*seen.values())
        assert_same(attention.o_proj(o.flatten(-2)), attention(x)[0], name, rtol=1e-5)
        assert torch.equal(linear.o_proj.weight, attention.o_proj.weight)
        assert seen["k"].shape == (1, 12, 4, attention.head_dim)


def test_a_hybrid_holds_the_bank_and_the_teacher(tmp_path):
    teacher = load_teacher(make_teacher("qwen3, wide heads"))
    bank = {i: make_linear(teacher, i, dict(rule="kda", window=4)) for i in (0, 2)}
    with torch.no_grad():
        for layer in bank.values():
            for p in layer.parameters():
                p.add_(0.05 * torch.randn_like(p))
    student = assemble(teacher, bank, dict(rule="kda", window=4))
    assert student.config.layer_types == ["linear_attention", "full_attention", "linear_attention"]
    for i, layer in bank.items():
        for n, p in layer.named_parameters():
            assert torch.equal(attention_of(student, i).get_parameter(n), p)
    student.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    x = ids()
    with torch.no_grad():
        assert torch.equal(again(x).logits, student.eval()(x).logits)
        assert not torch.allclose(student(x).logits, teacher(x).logits, atol=1e-3)
    greedy = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(again.generate(x, **greedy), again.generate(x, use_cache=False, **greedy))


def test_what_is_no_teacher_is_refused(tmp_path):
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
    )
    with pytest.raises(
        ValueError,
        match="a 'gpt2', whose attention is not known; expected one of transformer, llama",
    ):
        load_teacher(model)
    gated = TransformerForCausalLM(TransformerConfig(**SIZES, num_heads=4, output_gate=True))
    with pytest.raises(ValueError, match="has an output gate"):
        load_teacher(gated)
    teacher = load_teacher(make_teacher("llama"))
    with pytest.raises(ValueError, match=r"linear layers \[3\] are outside 0..2"):
        student_config(teacher.config, [1, 3])
    with pytest.raises(ValueError, match="rule is 'hyena'; expected one of gated_deltanet"):
        make_linear(teacher, 0, dict(rule="hyena"))
    yarn = transformers.LlamaConfig(
        **SIZES, **HEADS, rope_parameters=dict(rope_type="yarn", factor=2.0, rope_theta=1e4)
    )
    with pytest.raises(
        ValueError, match="rope_type is 'yarn'; expected one of default, linear, llama3"
    ):
        load_teacher(transformers.LlamaForCausalLM(yarn))
