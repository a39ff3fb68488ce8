# SPDX-License-Identifier: MIT
"""Training: text in, packed tokens with boundaries, transformers' Trainer, checkpoints that survive
a kill.
"""
