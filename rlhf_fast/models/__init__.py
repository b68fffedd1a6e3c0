"""Models: one base in several roles, adapters, scalar heads, packed attention."""

from .load import attach, disable_dropout, load
from .policy import Policy

__all__ = ["Policy", "attach", "disable_dropout", "load"]
