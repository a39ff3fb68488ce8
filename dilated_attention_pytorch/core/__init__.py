# SPDX-License-Identifier: MIT
"""Factories, configs and pool names."""

from fla._lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "dilated_attention_pytorch.core.config": [
            "DilatedAttentionConfig",
            "DistributedConfig",
            "MemoryPoolConfig",
            "MultiheadConfig",
            "RingAttentionConfig",
            "SparseAttentionConfig",
        ],
        "dilated_attention_pytorch.core.factory": [
            "create_adaptive_sparse_attention",
            "create_block_sparse_attention",
            "create_dilated_attention",
            "create_multihead_dilated_attention",
            "register_attention",
            "register_multihead_attention",
        ],
        "dilated_attention_pytorch.core.pools": [
            "BucketedMemoryPool",
            "EnhancedMemoryPool",
            "FragmentAwareMemoryPool",
            "NUMAAwareMemoryPool",
            "UnifiedMemoryPool",
        ],
    },
)
