# SPDX-License-Identifier: MIT
"""Triton kernels of the modules. Each is here because `torch.compile` cannot make it, or because it
saves memory in a model that is not compiled. Inside `torch.compile` the torch forms are used
throughout: compiled they keep no more than these kernels.

What autograd keeps for bf16 inputs, bytes per element (measured: `python -m benchmarks.modules`):

| module | torch | compiled | here | |
|---|---|---|---|---|
| gated RMSNorm | 20 | 4 | 4 | `gated_norm.py`: one pass each way instead of a dozen |
| cross entropy | 4 | 2 | 2 | `cross_entropy.py`: no copy of the logits in fp32 |
| linear and cross entropy | 34 | 18 | 10 | `cross_entropy.py`, a chunk of tokens at a time |
| linear and KL | 100 | 34 | 10 | `divergence.py`, in chunks too, in 3 passes instead of 20 |
| RMSNorm, LayerNorm | 8 (CPU) | 2 | | torch has a fused kernel on GPUs |
| SwiGLU and linear | 8 | 6 | | 4 by `swiglu_linear`, which keeps its two inputs |
| l2norm | 4 | 2 | | q and k are normalised by the recurrence's own kernels |
| rotary embedding | 0.25 | 0.25 | | nothing to save; compiled it is one pass |
"""
