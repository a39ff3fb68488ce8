# SPDX-License-Identifier: MIT
"""The whole student trained on the teacher's distribution over next tokens, on transformers'
Trainer: so FSDP, `torchrun`, mixed precision, resuming and trackers are its.

    loss = kl_weight D(teacher, student) + ce_weight CE
           + hidden_weight mean_l |h_l - h'_l|^2 / |h_l|^2

D is one of `fla.modules.fused_linear_divergence`, in chunks, so no logits are held. Linear layers
learn at `lr_mixer`, all else at `lr_rest`: constant after a warm-up, then a cosine to a tenth over
the last 15 %.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments

from fla.core.errors import UsageError
from fla.core.layout import SequenceLayout
from fla.data.tokens import collate
from fla.layers.linearized import LinearizedAttention
from fla.linearize.config import Config
from fla.linearize.data import Ordered, Text
from fla.linearize.teacher import TopTokens
from fla.models.decoder import next_tokens
from fla.modules.fused_linear_divergence import fused_linear_divergence
from fla.modules.losses import Divergence, Head
from fla.training.callbacks import FlaTrainer, say
from fla.training.checkpoints import newest_whole, seal
from fla.training.run import make_trainer, output_folder, run_trainer

LAST, LOW = 0.15, 0.1  # the last share of the steps is a cosine down to this share of the rate


def collate_with_places(blocks: list[dict[str, Any]]) -> dict[str, Tensor]:
    """`collate`, and the number of every block as `places`."""
    return collate(blocks) | {"places": torch.tensor([b["place"] for b in blocks])}


def gathered(weight: Tensor) -> Tensor:
    """The whole of a weight that FSDP has sharded."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


class InOrder(FlaTrainer):
    """Reads the data in the order it comes; linear layers learn at a rate of their own."""

    lr_mixer: float | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(data)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self.lr_mixer is not None:
            own: Any = model or self.model
            linear = [m for m in own.modules() if isinstance(m, LinearizedAttention)]
            mixers = {id(p) for m in linear for p in m.parameters()}
            decay = set(self.get_decay_parameter_names(own))
            groups: dict[tuple[bool, bool], list[Tensor]] = {}
            for name, p in own.named_parameters():
                if p.requires_grad:
                    groups.setdefault((id(p) in mixers, name in decay), []).append(p)
            kind, values = self.get_optimizer_cls_and_kwargs(self.args, own)
            self.optimizer = kind(
                [
                    dict(
                        params=p,
                        lr=self.lr_mixer if mixer else self.args.learning_rate,
                        weight_decay=self.args.weight_decay if decays else 0.0,
                    )
                    for (mixer, decays), p in groups.items()
                ],
                **values,
            )
        return super().create_optimizer(model) if model is not None else super().create_optimizer()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = {n: x for n, x in inputs.items() if n != "places"}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class Distiller(InOrder):
    """The trainer whose loss is the divergence from a teacher."""

    def __init__(
        self,
        *args: Any,
        teacher: Any,
        config: Config,
        top: TopTokens | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # this loss is a mean, whatever the model's would be
        self.teacher, self.top, self.config = teacher, top, config
        d = config.distill
        self.lr_mixer = d.lr_mixer
        self.divergence = Divergence(d.divergence, d.temperature, 0.5, d.kl_weight, d.ce_weight)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, bounds = inputs["input_ids"], inputs["cu_seqlens"]
        output = model(
            input_ids=ids, cu_seqlens=bounds, output_hidden_states=True, use_cache=False,
            logits_to_keep=1,
        )  # fmt: skip
        states = output.hidden_states
        layout = SequenceLayout.resolve(1, ids.shape[1], cu_seqlens=bounds)
        labels = next_tokens(inputs["labels"], layout) if self.divergence.ce_weight else None
        inner = self.accelerator.unwrap_model(model)
        head = Head(gathered(inner.lm_head.weight))
        teacher, theirs = self.taught(inputs)
        loss, _ = fused_linear_divergence(states[-1], head, teacher, labels, None, self.divergence)
        weight = self.config.distill.hidden_weight
        if weight:
            loss = loss + weight * relative_errors(states[1:-1], theirs[1:-1])
        return (loss, output) if return_outputs else loss

    def taught(self, inputs: dict) -> tuple[Any, Any]:
        """The teacher's outputs for a batch, and its hidden states if it ran."""
        if self.top is not None:
            return self.top.of(inputs), None
        with torch.no_grad():
            output = self.teacher.model(
                inputs["input_ids"],
                cu_seqlens=inputs["cu_seqlens"],
                output_hidden_states=self.config.distill.hidden_weight > 0,
                use_cache=False,
            )
        head = Head(self.teacher.lm_head.weight.detach())
        return (output.last_hidden_state, head), output.hidden_states


def relative_errors(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Tensor:
    """The mean of the layers' relative squared errors."""
    rows = [
        (a.float() - b.float()).square().sum() / b.float().square().sum().clamp(min=1e-12)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return torch.stack(rows).mean()


def arguments(
    config: Config, folder: Path, batches: int, lr: float, warmup: int, batch: int
) -> TrainingArguments:
    """TrainingArguments of a stage of `batches` batches; `config.trainer` overrides them."""
    accumulated = int(config.trainer.get("gradient_accumulation_steps", 1))
    steps = -(-batches // (accumulated * int(os.environ.get("WORLD_SIZE", "1"))))
    values: dict[str, Any] = dict(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=lr,
        warmup_steps=min(warmup, max(1, steps // 5)),
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs=dict(num_decay_steps=max(1, int(steps * LAST)), min_lr_ratio=LOW),
        weight_decay=config.distill.weight_decay,
        adam_beta2=0.95,
        logging_steps=max(1, min(20, steps // 10)),
        save_steps=config.distill.save,
        save_total_limit=2,
        report_to=["tensorboard"],
        seed=config.data.seed,
    )
    return TrainingArguments(**values | config.trainer)


def train_stage(
    student: Any,
    tokenizer: Any,
    text: Text,
    args: TrainingArguments,
    console: Console,
    kind: Any = InOrder,
) -> bool:
    """Train a student from its newest whole checkpoint on and save it in its folder; False if
    the user stopped it.
    """
    folder = output_folder(args)
    student.requires_grad_(True).train()
    blocks = Ordered(text, args.max_steps * args.gradient_accumulation_steps * args.world_size)
    trainer, interruption = make_trainer(
        args, student, blocks, console, kind=kind, processing_class=tokenizer,
        data_collator=collate_with_places,
    )  # fmt: skip
    run_trainer(trainer, interruption, newest_whole(folder, warn=say))
    if interruption.asked:
        return False
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(str(folder))
    if trainer.is_world_process_zero():
        seal(folder)
    return True


def distill(
    student: Any,
    teacher: Any,
    tokenizer: Any,
    text: Text,
    config: Config,
    folder: Path,
    console: Console,
) -> bool:
    """Run the stage; False if the user stopped it."""
    d = config.distill
    if d.top_k and d.hidden_weight:
        raise UsageError(
            f"distill: hidden_weight={d.hidden_weight} needs the teacher's hidden states, which "
            f"top_k={d.top_k} does not keep; set one of them to 0"
        )
    args = arguments(config, folder, config.steps(d.tokens), d.lr_rest, d.warmup, config.data.batch)
    top = TopTokens(folder / "teacher", teacher, tokenizer, text, d.top_k) if d.top_k else None
    kind = partial(Distiller, teacher=teacher, config=config, top=top)
    return train_stage(student, tokenizer, text, args, console, kind)
