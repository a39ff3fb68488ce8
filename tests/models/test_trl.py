# SPDX-License-Identifier: MIT
"""TRL's trainers on our models, as on transformers' Llama: the loss of rows that are padded, packed or laid
out without padding is that of each row alone, weighted by its tokens; DPO makes its reference model."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from fla.data.tokens import load_tokenizer
from tests.helpers import relative_error
from tests.models.common import TINY, make

TOKENS = load_tokenizer("byte")
TEXTS = ["def f(x): return x", "hello", "a longer line of some text", "yes"]
KINDS = pytest.mark.parametrize(
    "kind", ["llama", "gated_deltanet", "gated_deltanet-hybrid", "mamba2", "rwkv7"]
)
QUIET = dict(max_steps=1, report_to=[], use_cpu=True, logging_steps=1, bf16=False, disable_tqdm=True, save_strategy="no",
             gradient_checkpointing=False)  # fmt: skip


def build(kind):
    if kind != "llama":
        return make(kind, vocab_size=len(TOKENS))
    torch.manual_seed(0)
    sizes = TINY | dict(vocab_size=len(TOKENS))
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


@KINDS
@pytest.mark.parametrize(
    "how",
    [
        dict(max_length=64),
        dict(max_length=64, packing=True),
        dict(max_length=None, padding_free=True),
    ],
    ids=["padded", "packed", "padding-free"],
)
def test_the_first_loss_is_that_of_the_rows_apart(kind, how, tmp_path):
    if kind == "llama" and how.get("packing"):
        pytest.skip("transformers' Llama on a CPU has no attention that keeps packed rows apart")
    model, total, count = build(kind).train(), 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([TOKENS(text).input_ids])
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    rows = Dataset.from_dict({"text": TEXTS})
    arguments = SFTConfig(str(tmp_path), per_device_train_batch_size=4, **QUIET, **how)
    trainer = SFTTrainer(build(kind), arguments, train_dataset=rows, processing_class=TOKENS)
    trainer.train()
    assert abs(float(trainer.state.log_history[0]["loss"]) - total / count) < 2e-3


# TRL takes a folder's class from transformers by its name, and transformers has a Mamba2ForCausalLM of its own
@pytest.mark.parametrize("kind", ["llama", "gated_deltanet", "gated_deltanet-hybrid", "rwkv7"])
def test_dpo_makes_its_reference_model(kind, tmp_path):
    build(kind).save_pretrained(tmp_path / "model")
    rows = Dataset.from_dict(
        {"prompt": ["a", "b"], "chosen": ["yes", "good"], "rejected": ["no", "bad"]}
    )
    arguments = DPOConfig(str(tmp_path / "run"), per_device_train_batch_size=2, **QUIET)
    trainer = DPOTrainer(
        str(tmp_path / "model"), args=arguments, train_dataset=rows, processing_class=TOKENS
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert (
        abs(float(trainer.state.log_history[0]["loss"]) - math.log(2)) < 1e-3
    )  # both are one model yet
    assert any(
        relative_error(p, q) > 0 for p, q in zip(trainer.model.parameters(), before, strict=True)
    )
