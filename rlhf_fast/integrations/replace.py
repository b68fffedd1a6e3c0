"""Exchange one function of another package for one of ours, wherever that package has imported it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

from rlhf_fast.errors import UserError


def check_signature(host: str, name: str, function: Callable, expected: tuple[str, ...]) -> None:
    """Raise UserError unless ``function`` takes exactly the parameters that ours was written for."""
    found = tuple(inspect.signature(function).parameters)
    if found != expected:
        raise UserError(
            f"{host}'s {name} takes ({', '.join(found)}), but rlhf_fast was written for ({', '.join(expected)}); "
            "nothing was changed"
        )


def replace_everywhere(package: str, old: object, new: object) -> int:
    """Set every module attribute of ``package`` that is ``old`` to ``new``; return how many.

    By identity, not by name: ``from utils import f as g`` is found, somebody else's ``f`` is left alone.
    """
    count = 0
    for module_name, module in list(sys.modules.items()):
        if module is None or not f"{module_name}.".startswith(f"{package}."):
            continue
        # vars(), not getattr(): lazy modules would import everything they offer
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)
                count += 1
    return count
