# SPDX-License-Identifier: MIT
"""The engine for CPUs in C++: `src/` holds the kernels, `library.py` finds and calls them, and one
file per stage makes torch operators of them.
"""
