# SPDX-License-Identifier: MIT
"""What an optimizer should do with each parameter of a model, told by the layers, and Muon."""

from fla.optim.muon import Muon
from fla.optim.roles import KINDS, Role, groups, roles

__all__ = ["KINDS", "Muon", "Role", "groups", "roles"]
