# SPDX-License-Identifier: MIT
"""Sequence parallelism as an argument: `build_cp_context` says once which tokens a rank holds, and
operators take the result as `cp_context=`.
"""

from fla._lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "fla.ops.cp.context": ["FLACPContext", "build_cp_context", "get_cp_cu_seqlens"],
        "fla.ops.cp.comm": [
            "all_gather_into_tensor",
            "all_reduce_sum",
            "conv_cp_send_recv_bwd",
            "conv_cp_send_recv_fwd",
            "send_recv_bwd",
            "send_recv_fwd",
        ],
    },
)
