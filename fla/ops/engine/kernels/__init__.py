# SPDX-License-Identifier: MIT
"""The engine for GPUs in Triton, by stage: `ops.py` and `conv.py` make torch operators of them
and import no Triton, `launch.py` starts the kernels; `scores.py` what happens inside a chunk,
`state.py` what goes from chunk to chunk and out, `gradients.py` their gradients, `vector.py` decay
per channel, `token.py` the token form, `parts.py` what they share; `convolution.py` the short
convolution, `selfcheck.py` what a first use is compared with.
"""
