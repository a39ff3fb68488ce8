# SPDX-License-Identifier: MIT
"""Around a model as transformers' own models have it: loss keywords, collators' boundaries, sharding,
checkpointing, autocast, export, functional transforms."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from fla.models.utils import Cache
from tests.helpers import relative_error
from tests.models.common import MODELS, TINY, ids, make

EVERY = pytest.mark.parametrize("name", MODELS)
HANDING = ("rwkv7", "mom", "hgrn", "hgrn2", "gated_deltanet-experts", "transformer-window-latent")
X = ids(2, 12)


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same_gradients(found, want, rtol=1e-4):
    (loss, grads), (right, rights) = found, want
    assert relative_error(loss, right) < rtol
    assert set(grads) == set(rights)
    for name, grad in rights.items():
        assert relative_error(grads[name], grad) < rtol or grad.abs().max() < 1e-7, name


@pytest.mark.parametrize(
    "fuse", [dict(), dict(fuse_linear_cross_entropy=True), dict(fuse_cross_entropy=False)]
)
def test_the_loss_is_a_sum_over_the_items_of_an_update(fuse):
    model = make("gated_deltanet-experts", **fuse).train()
    labels = X.clone()
    labels[0, 4:] = -100
    rows = [dict(input_ids=X[i : i + 1], labels=labels[i : i + 1]) for i in (0, 1)]
    items = int((labels[:, 1:] != -100).sum())
    plain = make("gated_deltanet", **fuse).train()
    both = gradients(plain, input_ids=X, labels=labels)
    parts = [gradients(plain, **row, num_items_in_batch=torch.tensor(items)) for row in rows]
    total = {n: sum(part[1][n] for part in parts) for n in both[1]}
    assert_same_gradients((sum(part[0] for part in parts), total), both)
    weighted = sum(model(**row, num_items_in_batch=items).loss for row in rows)
    assert weighted.isfinite()


def test_accumulation_of_transformers_trainer(tmp_path):
    """Two batches of a row are one batch of two, as for transformers' Llama."""
    rows = [
        dict(input_ids=X[i], labels=torch.where(torch.arange(12) < n, X[i], -100))
        for i, n in ((0, 12), (1, 4))
    ]
    llama = LlamaForCausalLM(LlamaConfig(**TINY, num_attention_heads=4, num_key_value_heads=2))
    for model in (make("gated_deltanet"), llama):
        trained = []
        for batch, steps in ((2, 1), (1, 2)):
            own = copy.deepcopy(model)
            arguments = TrainingArguments(
                str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
                max_steps=1, learning_rate=0.1, optim="sgd", report_to=[], use_cpu=True, save_strategy="no",
                disable_tqdm=True, max_grad_norm=0.0, lr_scheduler_type="constant",
            )  # fmt: skip
            trainer = Trainer(own, arguments, train_dataset=rows)
            assert trainer.model_accepts_loss_kwargs
            trainer.train()
            trained.append(own)
        for one, two in zip(*(m.parameters() for m in trained), strict=True):
            assert relative_error(two, one) < 1e-4


@EVERY
def test_labels_that_are_all_ignored(name):
    for fuse in (dict(fuse_linear_cross_entropy=True), dict(fuse_cross_entropy=False), dict()):
        model = make(name, **fuse)
        labels = torch.full_like(X, -100)
        loss, grads = gradients(model.train(), input_ids=X, labels=labels, num_items_in_batch=0)
        assert loss == 0 or name in ("mom", "gated_deltanet-experts"), loss
        plain = {n: g for n, g in grads.items() if "gate" not in n}
        assert all(g.isfinite().all() for g in grads.values())
        if not ("mom" in name or "experts" in name):
            assert all(g.abs().max() == 0 for g in plain.values())


def test_a_fused_loss_returns_logits_in_evaluation():
    model = make("gated_deltanet", fuse_linear_cross_entropy=True)
    evaluated, trained = model(input_ids=X, labels=X), model.train()(input_ids=X, labels=X)
    assert evaluated.logits.shape == (2, 12, 64) and trained.logits is None
    assert relative_error(evaluated.loss, trained.loss) < 1e-6


def spans():
    """Rows of 7 and 5 tokens, what transformers' collator makes of them, and their losses, 6 : 4."""
    rows = [X[0, :7], X[1, :5]]
    made = DataCollatorWithFlattening(
        return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt"
    )([dict(input_ids=row.tolist()) for row in rows])
    return rows, made


@pytest.mark.parametrize("name", ["gated_deltanet-hybrid", "mamba2", "rwkv7", "transformer"])
@pytest.mark.parametrize("kept", ["all", "cu_seq_lens", "seq_idx", "position_ids"])
def test_the_keywords_of_transformers_collators(name, kept):
    rows, made = spans()
    model = make(name)
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in rows]
    names = (
        set(made)
        if kept == "all"
        else {"input_ids", "labels", *(n for n in made if n.startswith(kept))}
    )
    loss = model(**{n: x for n, x in made.items() if n in names}).loss
    assert relative_error(loss, (6 * losses[0] + 4 * losses[1]) / 10) < 1e-5


@EVERY
def test_positions_that_restart_in_a_batch(name):
    model = make(name)
    places = torch.tensor([[*range(5), *range(7)], [*range(3), *range(9)]])
    found = model(input_ids=X, position_ids=places, use_cache=False).logits
    for row, cut in ((0, 5), (1, 3)):
        parts = [
            model(input_ids=part[None], use_cache=False).logits[0]
            for part in (X[row, :cut], X[row, cut:])
        ]
        assert relative_error(found[row], torch.cat(parts)) < 1e-5
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, :2] = mask[1, -2:] = 0
    padded = torch.zeros(2, 14, dtype=torch.long).masked_scatter(mask.bool(), X)
    filled = torch.ones(2, 14, dtype=torch.long).masked_scatter(mask.bool(), places)
    other = model(
        input_ids=padded, attention_mask=mask, position_ids=filled, use_cache=False
    ).logits
    assert relative_error(other[mask.bool()], found.flatten(0, 1)) < 1e-5


CU = torch.tensor([0, 7, 12])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(cu_seq_lens_q=CU, cu_seq_lens_k=torch.tensor([0, 5, 12])), "bound other sequences"),
        (dict(cu_seqlens=CU, position_ids=torch.arange(12)[None]), "bound other sequences"),
        (dict(cu_seqlens=CU, seq_idx=torch.tensor([[0] * 5 + [1] * 7])), "bound other sequences"),
        (dict(cu_seq_lens_q=CU, max_length_q=6), "max_length_q is 6, and the longest sequence"),
        (dict(cu_seq_lens_q=[0, 12]), "cu_seq_lens_q is list; expected a tensor"),
        (dict(position_ids=torch.tensor([[0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 13]])), "jumps to 5 inside a row"),
        (dict(position_ids=torch.arange(5)[None]), r"position_ids has shape \[1, 5\]; expected \[B=1, T=12\]"),
        (dict(position_ids=torch.arange(12.0)[None]), "position_ids is torch.float32; expected integers"),
        (dict(cu_seq_lens=CU), "no argument 'cu_seq_lens'; did you mean cu_seq_lens"),
    ],
)  # fmt: skip
def test_boundaries_that_contradict_each_other(inputs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make("gated_deltanet")(input_ids=X[:1], **inputs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [*HANDING, "gated_deltanet", "rodimus", "mamba"])
def test_checkpointing_hands_values_on(name, reentrant):
    model = make(name).train()
    want = gradients(model, input_ids=X, labels=X, use_cache=False)
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    assert_same_gradients(gradients(model, input_ids=X, labels=X, use_cache=False), want)


@pytest.mark.parametrize("keywords", [dict(use_cache=True), dict(past_key_values=None)])
def test_a_cache_under_checkpointing_is_refused(keywords):
    model = make("gated_deltanet").train()
    model.gradient_checkpointing_enable()
    if "past_key_values" in keywords:
        keywords = dict(past_key_values=Cache(config=model.config))
    with pytest.raises(ValueError, match="gradient checkpointing computes every layer twice"):
        model(input_ids=X, labels=X, **keywords)
    assert model.eval()(input_ids=X, **keywords).logits.shape == (2, 12, 64)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", [*HANDING, "gated_deltanet"])
def test_sharding_that_casts_inputs(name, group):
    """FSDP2 rebuilds every input of a block; what layers hand on comes through."""
    model = make(name).train()
    want = gradients(copy.deepcopy(model), input_ids=X, labels=X)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for policy, rtol in (
        (MixedPrecisionPolicy(), 1e-5),
        (MixedPrecisionPolicy(torch.bfloat16), 0.03),
    ):
        own = copy.deepcopy(model)
        for block in own.get_decoder().layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(own, mesh=mesh, mp_policy=policy)
        loss = own(input_ids=X, labels=X).loss
        loss.backward()
        assert relative_error(loss.detach(), want[0]) < rtol
        assert all(p.grad is not None for n, p in own.named_parameters() if n in want[1])


@EVERY
def test_autocast(name):
    model = make(name).train()
    right = gradients(model, input_ids=X, labels=X)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=X, labels=X).loss
    model.zero_grad()
    loss.backward()
    assert abs(loss - right[0]) < 0.05
    for parameter, value in model.named_parameters():
        assert value.grad is None or value.grad.isfinite().all(), parameter


@EVERY
def test_export_for_any_length(name):
    model = make(name, use_cache=False)
    # a segment's grid of step 2 has more than one token
    length = torch.export.Dim("length", min=3 if "dilated" in name else 2, max=4096)
    if name in ("mom", "deltaformer", "log_linear_mamba2"):
        with pytest.raises(Exception, match="its steps depend on the number of tokens"):
            torch.export.export(
                model, (), dict(input_ids=X), dynamic_shapes=dict(input_ids={1: length})
            )
        return
    program = torch.export.export(
        model, (), dict(input_ids=X), dynamic_shapes=dict(input_ids={1: length})
    )
    x = ids(2, 77)
    assert relative_error(program.module()(input_ids=x).logits, model(input_ids=x).logits) < 1e-4


@EVERY
def test_functional_gradients(name):
    """`torch.func.grad` is autograd's gradient; a forward-mode derivative is right or refused."""
    model = make(name)
    parameters = dict(model.named_parameters())
    want = gradients(model, input_ids=X, labels=X)[1]

    def loss(values):
        return torch.func.functional_call(model, values, (), dict(input_ids=X, labels=X)).loss

    found = torch.func.grad(loss)(parameters)
    for parameter, grad in want.items():
        assert relative_error(found[parameter], grad) < 1e-4 or grad.abs().max() < 1e-7, parameter
    tangents = {n: torch.ones_like(p) for n, p in parameters.items()}
    slope = sum(g.sum() for g in want.values())
    try:
        _, found = torch.func.jvp(loss, (parameters,), (tangents,))
    except (RuntimeError, NotImplementedError):
        return
    assert relative_error(found, slope) < 1e-3
