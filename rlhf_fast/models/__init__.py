"""Models: one base in several roles, adapters, scalar heads, packed attention."""

import logging

# bitsandbytes misses a kernel of the hub for a layout that Adapters turns off, and says so when peft first imports it
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from .load import attach, disable_dropout, load  # noqa: E402
from .policy import Policy  # noqa: E402

__all__ = ["Policy", "attach", "disable_dropout", "load"]
