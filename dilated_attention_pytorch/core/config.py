# SPDX-License-Identifier: MIT
"""What the factories take, as dataclasses. A field that cannot be honoured raises where it is set,
one that can change nothing warns.
"""

from dataclasses import dataclass, field

import torch

from dilated_attention_pytorch._arguments import check_dropout, no_effect, no_pool, refuse
from fla.ops.dilated_attention import branches


@dataclass
class DilatedAttentionConfig:
    """Arguments of `DilatedAttention`. `device` and `dtype` are those that inputs must have; where
    absent any do, and nothing moves by itself.
    """

    segment_lengths: list[int] = field(default_factory=lambda: [2048, 4096, 8192])
    dilation_rates: list[int] = field(default_factory=lambda: [1, 2, 4])
    dropout: float = 0.0
    use_tf32: bool = True
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        branches(owner, self.segment_lengths, self.dilation_rates, heads=1)
        check_dropout(owner, self.dropout)


@dataclass
class MultiheadConfig:
    """Arguments of `MultiheadDilatedAttention`, without the arguments of its attention."""

    embed_dim: int = 768
    num_heads: int = 12
    bias: bool = True
    layer_norm: bool = True
    layer_norm_eps: float = 1e-5
    gamma_init: float = 1.0
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None


@dataclass
class RingAttentionConfig(DilatedAttentionConfig):
    """Arguments of `RingDilatedAttentionProduction`. Its backward keeps q, k, v, the result and its
    log-sum-exp alone, so checkpointing has nothing to save; precision follows the inputs.
    """

    ring_size: int | None = None
    use_gradient_checkpointing: bool = True
    use_memory_pool: bool = False
    memory_pool_size: int = 10
    enable_error_recovery: bool = False
    mixed_precision: bool = False
    log_memory_usage: bool = False
    attention_scale: float | None = None
    block_size: int = 1024
    use_checkpointing: bool = True
    max_cached_buffers: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            "RingAttentionConfig", "a failed rank ends the others with an error; restart with "
            "torchrun --max-restarts", enable_error_recovery=self.enable_error_recovery,
        )  # fmt: skip
        refuse(
            "RingAttentionConfig", "use torch.autocast around the model",
            mixed_precision=self.mixed_precision,
        )  # fmt: skip
        no_pool(
            "RingAttentionConfig", use_memory_pool=(self.use_memory_pool, False),
            memory_pool_size=(self.memory_pool_size, 10),
            log_memory_usage=(self.log_memory_usage, False),
            max_cached_buffers=(self.max_cached_buffers, 50),
        )  # fmt: skip
        no_effect(
            "RingAttentionConfig", "a ring's blocks are its ranks' tokens, and only inputs and "
            "results are kept", block_size=(self.block_size, 1024),
            use_checkpointing=(self.use_checkpointing, True),
            use_gradient_checkpointing=(self.use_gradient_checkpointing, True),
        )  # fmt: skip


@dataclass
class SparseAttentionConfig(DilatedAttentionConfig):
    """Arguments of `create_block_sparse_attention` as a dataclass: `sparsity_ratio` is the share of
    pairs kept at most, and `None` lets the sizes decide.
    """

    pattern_type: str = "dilated_sparse"
    sparsity_ratio: float | None = None
    block_size: int = 128


@dataclass
class DistributedConfig:
    """The name alone: no class here takes it, since torchrun says which processes there are, and
    `sequence_parallel=True` that they hold a sequence together. Sharding of parameters is torch's
    (FSDP2) or DeepSpeed's, through transformers' `Trainer`, and is refused here.
    """

    world_size: int | None = None
    rank: int | None = None
    backend: str = "nccl"
    sequence_parallel: bool = False
    model_parallel: bool = False
    pipeline_parallel: bool = False
    zero_stage: int = 0

    def __post_init__(self) -> None:
        refuse(
            "DistributedConfig", "shard parameters through transformers' Trainer (FSDP2)",
            model_parallel=self.model_parallel, pipeline_parallel=self.pipeline_parallel,
            zero_stage=self.zero_stage or None,
        )  # fmt: skip


@dataclass
class MemoryPoolConfig:
    """Fields of a memory pool that does not exist: torch's allocator is one (`core.pools`)."""

    hot_cache_size: int = 50
    hot_cache_threshold: int = 10
    allow_buffer_slicing: bool = True
    cleanup_threshold_mb: float = 100.0
    max_pool_size_mb: float = 1024.0
    enable_statistics: bool = True
    device: torch.device | str | None = None
