# SPDX-License-Identifier: MIT
"""The functions of the packages `causal_conv1d` and `mamba_ssm`, with their published signatures,
on the operators of this package: any device, with gradients. `fla.provide()` offers them under the
packages' names.
"""
