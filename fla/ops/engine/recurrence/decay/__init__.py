# SPDX-License-Identifier: MIT
r"""What decay does inside one chunk: to products of rows and columns, on entry, and on leaving.

A chunk reads with *left* rows x_i (queries, and erase keys) and writes with *right* rows y_j
(keys). With D_ij the decay from the write of token j to the read of token i, channel by channel,

    scores_ij = sum_k x_ik D_ijk y_jk            enter_i = decay from the chunk's start to read i
    leave_j = decay from write j to the chunk's end        last = decay over the whole chunk

A left row reads the state in one of three ways:

    AFTER_WRITE     after its own token's write:             D_ij covers j < t <= i, for j <= i
    AFTER_DECAY     after its own token's decay, not its write:       the same, for j < i
    BEFORE_DECAY    before its own token's decay:            D_ij covers j < t < i,  for j < i

The queries read AFTER_WRITE, or BEFORE_DECAY with `read_before`; the erase keys AFTER_DECAY, or
BEFORE_DECAY with `erase_before`.

`ScalarDecay` (`scalar.py`) holds D as one matrix. `VectorDecay` (`vector.py`) never forms a
difference of cumulative decays: see there.
"""
