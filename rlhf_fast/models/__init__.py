"""Models: one base in several roles, adapters, scalar heads, packed attention."""

import logging

# bitsandbytes misses a kernel of the hub for a layout that Adapters turns off, and says so when peft first imports it
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from .load import attach, disable_dropout, load
from .policy import Policy

__all__ = ["Policy", "attach", "disable_dropout", "load"]
