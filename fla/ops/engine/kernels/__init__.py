# SPDX-License-Identifier: MIT
"""The engine for GPUs in Triton, by stage. `operators.py` makes torch operators of the kernels, and
`support.py` tells where they run; both import no Triton. `launch.py` starts the kernels of the
recurrence: `scores.py` (inside a chunk), `state.py` (from chunk to chunk, and out), `gradients.py`,
`vector.py` (decay per channel), `token.py` and `unit.py` (norms of q and k). `convolution.py`,
`scan.py` and `selective.py` hold a stage each with its launcher; `parts.py` is what they share.
"""
