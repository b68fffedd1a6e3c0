"""Plain values on their way between a sandbox and its parent: what comes out is data, checked, and nothing else."""

from __future__ import annotations

import json
import marshal
import math
from typing import Any

ORDERED = {"list": list, "tuple": tuple}
HASHED = {"set": set, "frozenset": frozenset}


class Malformed(ValueError):
    """A line from a sandbox that is no message of ours."""


def frame(value: Any) -> bytes:
    """A trusted, plain value for a guest: 8 hexadecimal digits of length, then ``marshal``."""
    try:
        data = marshal.dumps(value, 2)  # version 2 is the same for every Python 3
    except ValueError as error:
        raise Malformed(str(error)) from None
    return b"%08x" % len(data) + data


def message(line: bytes) -> list[Any]:
    """A guest's line: its kind, and its decoded parts.

    Raises:
        Malformed: anything but a list that starts with a word, of values as ``guest.encoded`` writes them.
    """
    try:
        kind, *parts = json.loads(line)
        if not isinstance(kind, str):
            raise Malformed("no kind")
        return [kind, *map(decode, parts)]
    except (ValueError, TypeError, RecursionError, MemoryError, OverflowError) as error:
        raise Malformed(f"{type(error).__name__}: {error}") from None


def decode(node: Any) -> Any:
    """The plain value that ``guest.encoded`` wrote."""
    if node is None or isinstance(node, bool):
        return node
    if not isinstance(node, list):
        raise Malformed(f"unexpected {type(node).__name__}")
    kind, *parts = node
    if kind in ORDERED:
        return ORDERED[kind](map(decode, parts))
    if kind in HASHED:
        return HASHED[kind](_keys(parts))
    if kind == "dict":
        return dict(zip(_keys([key for key, _ in parts]), [decode(value) for _, value in parts]))
    if kind == "complex":
        return complex(*map(float.fromhex, parts))
    (text,) = parts
    match kind:
        case "int":
            return int(text, 16)
        case "float":
            return float.fromhex(text)
        case "str":
            return bytes.fromhex(text).decode("utf-8", "surrogatepass")
        case "bytes":
            return bytes.fromhex(text)
    raise Malformed(f"unexpected {kind!r}")


def _keys(nodes: list[Any]) -> list[Any]:
    """Decoded keys of a set or dictionary; numbers chosen to share one hash would take quadratic time, and are refused."""
    keys = [decode(node) for node in nodes]
    if 2 * len(set(map(hash, keys))) < len(keys):
        raise Malformed("keys that collide")
    return keys


def same(got: Any, wanted: Any) -> bool:
    """Whether two plain values are equal, types included: 1, 1.0 and True differ, and so do (1,) and [1].

    Floats may differ by 1e-9, relative or absolute; NaN equals NaN.
    """
    if type(got) is not type(wanted):
        return False
    if isinstance(got, float):
        return math.isclose(got, wanted, rel_tol=1e-9, abs_tol=1e-9) or (math.isnan(got) and math.isnan(wanted))
    if isinstance(got, (list, tuple)):
        return len(got) == len(wanted) and all(map(same, got, wanted))
    if isinstance(got, dict):
        return _typed(got) == _typed(wanted) and all(same(value, wanted[key]) for key, value in got.items())
    if isinstance(got, (set, frozenset)):
        return _typed(got) == _typed(wanted)
    return got == wanted


def _typed(keys: Any) -> set[tuple[type, Any]]:
    return {(type(key), key) for key in keys}
