# SPDX-License-Identifier: MIT
"""Triton kernels of the modules: those that `torch.compile` cannot make, or that save memory in a
model that is not compiled. Inside `torch.compile` the torch forms are used throughout: what it
makes of them keeps no more.

What autograd keeps of bf16 inputs, bytes an element (measured: `python -m benchmarks.modules`):

| module | torch | compiled | here | |
|---|---|---|---|---|
| gated RMSNorm | 20 | 4 | 4 | `gated_norm.py`: one pass each way instead of a dozen |
| cross entropy | 4 | 2 | 2 | `cross_entropy.py`: no copy of the logits in fp32 |
| linear and cross entropy | 34 | 18 | 10 | `cross_entropy.py`, a chunk of tokens at a time |
| linear and KL | 100 | 34 | 10 | `divergence.py`, likewise, in 3 passes instead of 20 |
| RMSNorm, LayerNorm | 8 (CPU) | 2 | | torch has a fused kernel on GPUs |
| SwiGLU and linear | 8 | 6 | | 4 by `swiglu_linear`, which keeps its two inputs |
| l2norm | 4 | 2 | | that of q and k is done by the recurrence's own kernels |
| rotary embedding | 0.25 | 0.25 | | nothing to save; compiled it is one pass |
"""
