# SPDX-License-Identifier: MIT
"""What the operator pages stand on: the recurrence, scans, and attention in pieces, each in torch
and, where it pays, in C++ and Triton.
"""
