# SPDX-License-Identifier: MIT
"""Helpers for packed sequences and chunks under the names that other software imports, in plain
torch, differentiable where they take values. Nothing is remembered between calls.
"""

from fla._lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "fla.ops.utils.constant": ["RCP_LN2"],
        "fla.ops.utils.cumsum": [
            "chunk_global_cumsum",
            "chunk_global_cumsum_scalar",
            "chunk_global_cumsum_vector",
            "chunk_local_cumsum",
            "chunk_local_cumsum_scalar",
            "chunk_local_cumsum_vector",
        ],
        "fla.ops.utils.index": [
            "get_max_num_splits",
            "prepare_chunk_indices",
            "prepare_chunk_indices_static",
            "prepare_chunk_offsets",
            "prepare_cu_seqlens_from_lens",
            "prepare_cu_seqlens_from_mask",
            "prepare_lens",
            "prepare_lens_from_mask",
            "prepare_position_ids",
            "prepare_sequence_ids",
            "prepare_split_cu_seqlens",
            "prepare_token_indices",
        ],
        "fla.ops.utils.matrix": [
            "addmm",
            "logsumexp_fwd",
            "matmul",
            "softmax_bwd",
            "softmax_fwd",
            "softplus",
            "solve_tril",
        ],
        "fla.ops.utils.packing": ["mean_pooling", "pack_sequence", "unpack_sequence"],
        "fla.ops.utils.sinkhorn": ["naive_sinkhorn", "sinkhorn"],
    },
)
