# SPDX-License-Identifier: MIT
"""What the operator pages stand on: the recurrence, its fast forms, boundaries, checks and
dispatch.
"""
