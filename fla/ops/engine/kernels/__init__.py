# SPDX-License-Identifier: MIT
"""The engine for GPUs in Triton, by stage. `ops.py`, `conv.py` and `vector_scan.py` make torch
operators of the kernels and import no Triton; `launch.py` starts them. `scores.py`: what happens
inside a chunk; `state.py`: what goes from chunk to chunk and out; `gradients.py`: their gradients;
`vector.py`: decay per channel; `token.py`: the token form; `convolution.py`, `scan.py`: the short
convolution and the vector scan; `parts.py`: what they share; `selfcheck.py`: what a first use is
compared with.
"""
