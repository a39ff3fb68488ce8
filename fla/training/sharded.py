# SPDX-License-Identifier: MIT
"""Training on sequences that lie on all processes: `fla train --sequence_parallel true`."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from fla.distributed import sequence_parallel, shard_sequence
from fla.distributed.context import split_evenly
from fla.training.callbacks import FlaTrainer


class ShardedTrainer(FlaTrainer):
    """All processes read the same batches, and each works on its own tokens of them. What wraps the
    model averages gradients over the processes; here they add up.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.ranks_a_batch = self.args.world_size

    def get_train_dataloader(self) -> DataLoader:
        data: Any = self.train_dataset
        options: dict[str, Any] = {}
        if not isinstance(data, IterableDataset):
            sampler = self._get_train_sampler(data)
            if isinstance(sampler, RandomSampler):  # which draws differently on every process
                seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
                generator = torch.Generator().manual_seed(seed)
                sampler = RandomSampler(data, generator=generator)
            options = dict(sampler=sampler, drop_last=self.args.dataloader_drop_last)
        return DataLoader(
            data,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            **options,
        )

    def training_step(self, model, inputs, *args: Any, **kwargs: Any) -> torch.Tensor:
        total = inputs["input_ids"].shape[1]
        own = {name: shard_sequence(inputs[name]) for name in ("input_ids", "labels")}
        with sequence_parallel(lengths=split_evenly(total, self.args.world_size)):
            return super().training_step(model, inputs | own, *args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, *rest = found if return_outputs else (found,)
        times = self.args.world_size
        loss = times * loss - (times - 1) * loss.detach()
        return (loss, *rest) if return_outputs else loss
