# SPDX-License-Identifier: MIT
"""The names of the package `dilated_attention_pytorch`, on `fla`'s operators: each really computes
what its name says, and its page says what differs.
"""

from fla._lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "dilated_attention_pytorch.adaptive": [
            "AdaptiveConfig",
            "AdaptiveSparsityTrainer",
            "BlockSparseAdaptive",
            "ImportanceScorer",
            "create_adaptive_block_sparse",
        ],
        "dilated_attention_pytorch.block_sparse": [
            "BlockSparseHierarchical",
            "BlockSparseOptimized",
            "BlockSparseRingDilatedAttention",
            "BlockSparseRingDistributedDilatedAttention",
            "BlockSparseRingMultiheadDilatedAttention",
            "BlockSparseTorchSparse",
            "DistributedSparseConfig",
            "DistributedSparsePattern",
            "HierarchicalConfig",
            "create_hierarchical_attention",
            "get_hierarchical_presets",
        ],
        "dilated_attention_pytorch.core.config": ["RingAttentionConfig"],
        "dilated_attention_pytorch.core.factory": [
            "create_adaptive_sparse_attention",
            "create_block_sparse_attention",
            "create_dilated_attention",
            "create_multihead_dilated_attention",
        ],
        "dilated_attention_pytorch.dilated_attention": [
            "DilatedAttention",
            "DistributedImprovedDilatedAttention",
            "DistributedImprovedMultiheadDilatedAttention",
            "ImprovedDilatedAttention",
            "ImprovedMultiheadDilatedAttention",
            "MultiheadDilatedAttention",
        ],
        "dilated_attention_pytorch.long_net": ["LongNet", "LongNetLM"],
        "dilated_attention_pytorch.patterns": [
            "PatternConfig",
            "PatternOptimizer",
            "PatternQualityAnalyzer",
            "PatternType",
            "SparsePatternConfig",
            "SparsePatternGenerator",
        ],
        "dilated_attention_pytorch.ring": [
            "RingDilatedAttention",
            "RingDilatedAttentionProduction",
            "RingDilatedAttentionV2",
            "RingDilatedAttentionV2Collective",
            "RingDilatedAttentionV2Flash",
            "create_production_ring_attention",
        ],
        "dilated_attention_pytorch.transformer": [
            "DilatedTransformerDecoderLayer",
            "DilatedTransformerEncoderLayer",
        ],
    },
)
