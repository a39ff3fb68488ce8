# SPDX-License-Identifier: MIT
"""The one recurrence: its equation, the forms in torch, and what calls them."""
