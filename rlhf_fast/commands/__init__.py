"""The commands that do not train, one file each with ``main(argv)``. `Parser` is argparse with our manners."""

from __future__ import annotations

import argparse
import json
import re
from difflib import get_close_matches
from typing import Any, NoReturn

from rlhf_fast.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are `UserError`, with the nearest option named; no abbreviations."""

    def __init__(self, prog: str, description: str, **options):
        super().__init__(
            prog=f"rlhf-fast {prog}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (--?[\w-]+)", message)
        known = [option for action in self._actions for option in action.option_strings]
        near = get_close_matches(unknown[1], known, n=1) if unknown else []
        hint = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
        raise UserError(f"{self.prog}: {message}; {hint}")


def json_mapping(text: str) -> dict[str, Any]:
    """An option's value that is a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"is not valid JSON ({error.msg} at character {error.pos})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"should be a JSON object, got {text}")
    return value
