"""Configuration: a dataclass, filled from a flat YAML file and from ``--key value`` flags, strictly.

A trainer's config is a plain dataclass and inherits from a common one; nothing is registered. The help of a field is the
comment at the end of its line. (jsonargparse was tried: it takes neither ``--reward_funcs a b`` nor a bare ``--packing``,
and its messages span a screen.)
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import re
import shutil
import textwrap
import types
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from rlhf_fast.errors import UserError

C = TypeVar("C")


def parse_config(config_class: type[C], argv: Sequence[str], *, prog: str = "rlhf-fast", description: str = "") -> C:
    """Build a ``config_class`` from ``--config file.yaml`` and ``--key value`` flags; flags win, the last of them too.

    Flags: ``--key value``, ``--key=value``, ``--a_list x y``, a bare ``--switch`` for true; ``-`` for ``_`` is accepted in
    keys. Values are checked against the field's type; nothing is guessed from their look alone.

    Raises:
        UserError: an unknown key (names the nearest valid one), a missing or malformed file, a value of the wrong type.
        SystemExit: after printing the help that ``-h`` or ``--help`` asks for.
    """
    if any(a in ("-h", "--help") for a in argv):
        print(help_text(config_class, prog=prog, description=description))
        raise SystemExit(0)
    flags = _split_flags(argv)
    hints = {f.name: hint for f, hint in _fields(config_class)}
    values: dict[str, Any] = {}
    if "config" in flags and "config" not in hints:
        values |= _read_file(_config_path(flags.pop("config")), hints)
    for key, words in flags.items():
        _check_key(key, hints, f"--{key}", "--")
        values[key] = _parse_flag(key, words, hints[key])
    return build_config(config_class, values)


def build_config(config_class: type[C], values: dict[str, Any]) -> C:
    """Build a ``config_class`` from values that were checked; names what is required and missing."""
    for field, _ in _fields(config_class):
        if field.name not in values and _default(field) is dataclasses.MISSING:
            raise UserError(f"{field.name} is required: give --{field.name}, or {field.name}: in the --config file")
    try:
        return config_class(**values)
    except UserError:
        raise
    except ValueError as error:  # what a config's __post_init__ refuses
        raise UserError(str(error)) from error


def save_config(config: Any, path: Path | str) -> None:
    """Write a config dataclass as the flat YAML that `parse_config` reads back to an equal one."""
    values = {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # under another name first: a run that is killed here must still be one that --config goes on with
    whole = path.with_name(f".{path.name}.tmp")
    whole.write_text(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20))
    whole.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


# --------------------------------------------------------------------------------------------------------------- sources


def _split_flags(argv: Sequence[str]) -> dict[str, list[str]]:
    """``--a 1 --b=2 --c`` -> {"a": ["1"], "b": ["2"], "c": []}."""
    flags: dict[str, list[str]] = {}
    words: list[str] | None = None
    for arg in argv:
        if re.match(r"--[A-Za-z]", arg):
            key, equals, value = arg[2:].partition("=")
            words = flags[key.replace("-", "_")] = [value] if equals else []
        elif re.fullmatch(r"-[A-Za-z]", arg):
            raise UserError(f"unknown option {arg}; options are spelled --key value (--help lists them)")
        elif words is None:
            raise UserError(f"unexpected argument {arg!r}; options are spelled --key value (--help lists them)")
        else:
            words.append(arg)
    return flags


def _config_path(words: list[str]) -> Path:
    if len(words) != 1:
        raise UserError(f"--config takes one YAML file, got {' '.join(words) or 'none'}")
    path = Path(words[0])
    recipe = Path(__file__).parents[1] / "recipes" / f"{path.name.removesuffix('.yaml')}.yaml"
    # a bare name that is no file here is one of the recipes that come with the package
    return recipe if not path.exists() and path.parent == Path() and recipe.is_file() else path


def _read_file(path: Path, hints: dict[str, Any]) -> dict[str, Any]:
    values = read_yaml(path)
    for key in values:
        _check_key(key, hints, f"{path}: {key}", "")
    return {key: _coerce(value, hints[key], f"{path}: {key}") for key, value in values.items()}


def read_yaml(path: Path | str) -> dict[str, Any]:
    """A flat YAML mapping, read safely: plain values only, no key twice, ``1e-5`` is a number.

    Raises:
        UserError: names the file, and the line where it is malformed.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist{_nearby_file(path)}") from None
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold lines of `key: value`, found a {_kind(values)}")
    return values


def _nearby_file(path: Path) -> str:
    siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


class _Loader(yaml.SafeLoader):
    """YAML 1.1's safe subset without its traps: a key given twice is refused, and 1e-5 is a float rather than a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key should be a word, got {key!r}", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    pass


_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+")
_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for _first in "+-.0123456789":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).insert(0, ("tag:yaml.org,2002:float", _FLOAT))
# dates would come back as objects: a run called 2026-01-31 is a string
for _first, _resolvers in _Loader.yaml_implicit_resolvers.items():
    _Loader.yaml_implicit_resolvers[_first] = [r for r in _resolvers if r[0] != "tag:yaml.org,2002:timestamp"]
# the dumper quotes by the same rules, or the string "1e5" would come back as a number
_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _check_key(key: Any, hints: dict[str, Any], place: str, dashes: str) -> None:
    if key not in hints:
        near = nearest(str(key), hints)
        hint = f"did you mean {dashes}{near}?" if near else "--help lists the valid ones"
        raise UserError(f"{place}: unknown setting; {hint}")


def nearest(word: str, choices: Sequence[str] | dict[str, Any]) -> str | None:
    """The choice that ``word`` was probably meant to be, or None when none is near."""
    word = word.lower().replace("-", "_")
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    if not found:
        found = [c for c in choices if word in c.split("_") or (len(word) > 3 and word in c)]
    return found[0] if found else None


# ---------------------------------------------------------------------------------------------------------------- values


def _parse_flag(key: str, words: list[str], hint: Any) -> Any:
    place = f"--{key}"
    if not words:
        if bool in _members(hint):
            return True
        raise UserError(f"{place} needs a value: {type_name(hint)}")
    takes_many = any(get_origin(m) in (list, tuple) or m in (list, tuple) for m in _members(hint))
    if len(words) == 1:
        return _coerce_word(words[0], hint, place)
    if not takes_many:
        raise UserError(f"{place} takes one value ({type_name(hint)}), got {len(words)}: {' '.join(words)}")
    return _coerce([_Word(w) for w in words], hint, place)


class _Word(str):
    """A word of the command line: text until the field's type says otherwise."""


def _coerce_word(word: str, hint: Any, place: str) -> Any:
    members = _members(hint)
    # `--list "[a, b]"` and `--dict "{r: 16}"` are YAML; a bare word for a list is a list of one
    containers = {get_origin(m) or m for m in members}
    if (word[:1] == "[" and containers & {list, tuple}) or (word[:1] == "{" and dict in containers):
        try:
            return _coerce(yaml.load(word, Loader=_Loader), hint, place)
        except yaml.YAMLError:
            raise UserError(f"{place}: {word!r} is not valid YAML; expected {type_name(hint)}") from None
    return _coerce(_Word(word), hint, place)


def _coerce(value: Any, hint: Any, place: str) -> Any:
    """``value`` as the type ``hint``, or a `UserError` that names the key, the value and what was expected."""
    for member in sorted(_members(hint), key=_eagerness):
        try:
            return _convert(value, member, place)
        except _Mismatch:
            continue
    shown = "an empty value" if value == "" else repr(str(value)) if isinstance(value, str) else repr(value)
    raise UserError(f"{place}: expected {type_name(hint)}, got {shown}{_choice_hint(value, hint)}")


class _Mismatch(Exception):
    pass


def _eagerness(member: Any) -> int:
    """The order in which the members of a union try a value: text takes any word, and a list takes what is left."""
    origin = get_origin(member) or member
    order = [Literal, type(None), bool, int, float, dict, Path, str, list, tuple, Any]
    return order.index(origin) if origin in order else len(order)


def _convert(value: Any, kind: Any, place: str) -> Any:
    origin = get_origin(kind) or kind
    text = isinstance(value, str)
    if isinstance(value, _Word) and origin in (int, float, bool, type(None)):
        value = _scalar(value)
    if origin is Any:
        return _anything(value) if isinstance(value, _Word) else value
    if origin is type(None):
        return _expect(value is None or (isinstance(value, str) and value.lower() == "none"), None)
    if origin is Literal:
        return _literal(value, get_args(kind))
    if origin is bool:
        return _expect(isinstance(value, bool), value)
    if origin is int:
        whole = isinstance(value, float) and value.is_integer()  # 1e6 steps
        return _expect((isinstance(value, int) or whole) and not isinstance(value, bool), lambda: int(value))
    if origin is float:
        return _expect(isinstance(value, (int, float)) and not isinstance(value, bool), lambda: float(value))
    if origin is str:
        return _expect(text, lambda: str(value))
    if origin is Path:
        return _expect(text and value != "", lambda: Path(value))
    if origin in (list, tuple):
        return _sequence(value, kind, origin, place)
    if origin is dict:
        args = get_args(kind)
        _expect(isinstance(value, dict), None)
        return {k: _coerce(v, args[1], f"{place}.{k}") for k, v in value.items()} if args else value
    raise TypeError(f"{place}: a config field of type {kind} is not supported")


def _expect(ok: bool, result: Any) -> Any:
    if not ok:
        raise _Mismatch
    return result() if callable(result) else result


def _literal(value: Any, choices: tuple) -> Any:
    for choice in choices:
        given = _scalar(value) if isinstance(value, _Word) and not isinstance(choice, str) else value
        if given == choice and isinstance(given, bool) == isinstance(choice, bool):
            return choice
    raise _Mismatch


def _sequence(value: Any, kind: Any, origin: type, place: str) -> Any:
    args = get_args(kind)
    # one thing where a list may stand is a list of it: `report_to: tensorboard`
    _expect(value is not None and not isinstance(value, dict), None)
    value = value if isinstance(value, list) else [value]
    if not args:
        return origin(str(v) if isinstance(v, _Word) else v for v in value)
    if origin is tuple and args[-1] is not Ellipsis:
        _expect(len(value) == len(args), None)
        return tuple(_coerce(v, a, f"{place}[{i}]") for i, (v, a) in enumerate(zip(value, args)))
    return origin(_coerce(v, args[0], f"{place}[{i}]") for i, v in enumerate(value))


def _anything(word: str) -> Any:
    """A word of the command line where anything may stand: ``{name: length, max: 64}`` is a mapping, ``3`` a number."""
    if word[:1] not in ("{", "["):
        return _scalar(word)
    try:
        return yaml.load(word, Loader=_Loader)
    except yaml.YAMLError:
        return str(word)


def _scalar(word: str) -> Any:
    """A word of the command line as YAML would read it: number, true/false, null, or the text itself."""
    try:
        value = yaml.load(word, Loader=_Loader)
    except yaml.YAMLError:
        return str(word)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(word.lower(), str(word))


def _members(hint: Any) -> tuple:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _choice_hint(value: Any, hint: Any) -> str:
    choices = [c for m in _members(hint) if get_origin(m) is Literal for c in get_args(m) if isinstance(c, str)]
    near = nearest(value, choices) if isinstance(value, str) and choices else None
    return f"; did you mean {near}?" if near else ""


def type_name(hint: Any) -> str:
    """A type in the words of an error or of the help: ``number``, ``true/false``, ``a | b``, ``list of text``."""
    names = {int: "whole number", float: "number", bool: "true/false", str: "text", Path: "path", type(None): "none"}
    origin, args = get_origin(hint) or hint, get_args(hint)
    if len(_members(hint)) > 1:
        return " or ".join(dict.fromkeys(type_name(m) for m in sorted(_members(hint), key=lambda m: m is type(None))))
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (list, tuple):
        return f"list of {type_name(args[0])}" if args and args[0] is not Any else "list"
    if origin is dict:
        return "mapping"
    return names.get(origin, "anything" if origin is Any else str(getattr(origin, "__name__", origin)))


def _kind(value: Any) -> str:
    return {list: "list", str: "single text"}.get(type(value), "single value")


# ------------------------------------------------------------------------------------------------------------------ help


def help_text(config_class: type, *, prog: str, description: str = "") -> str:
    """Every setting with its type, meaning and default, grouped by the class that defines it, the nearest class first."""
    width = min(shutil.get_terminal_size((110, 24)).columns, 120)
    lines = [f"usage: {prog} [--config FILE.yaml] [--key value ...]", ""]
    if description:
        lines += [description, ""]
    lines += ["A YAML file holds the same keys, one `key: value` a line; flags override it."]
    hints = {f.name: (f, hint) for f, hint in _fields(config_class)}
    owners = _owners(config_class)
    for owner in [c for c in config_class.__mro__ if c in owners.values()]:
        lines += ["", f"{_summary(owner)}:"]
        for name in [n for n, o in owners.items() if o is owner and n in hints]:
            lines += _help_entry(*hints[name], field_comments(owner).get(name, ""), width)
    return "\n".join(lines)


def _help_entry(field: dataclasses.Field, hint: Any, comment: str, width: int) -> list[str]:
    head = f"  --{field.name}"
    default = _default(field)
    shown = "required" if default is dataclasses.MISSING else f"default {_show(default)}"
    body = f"{comment} ({type_name(hint)}; {shown})" if comment else f"({type_name(hint)}; {shown})"
    indent = " " * 34
    text = textwrap.wrap(body, max(width - len(indent), 30), break_long_words=False, break_on_hyphens=False)
    if len(head) >= len(indent) - 1:
        return [head, *(indent + t for t in text)]
    return [head.ljust(len(indent)) + text[0], *(indent + t for t in text[1:])]


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "empty"
    return f"{value:g}" if isinstance(value, float) else str(value) or "empty"


def _summary(owner: type) -> str:
    """The heading of a group: the first sentence of the class's docstring, or its name."""
    doc = owner.__dict__.get("__doc__") or ""
    # dataclasses write a signature where there is no docstring
    if not doc or doc.startswith(f"{owner.__name__}("):
        return owner.__name__
    return f"{owner.__name__}: {doc.strip().splitlines()[0].rstrip('.')}"


def _fields(config_class: type) -> list[tuple[dataclasses.Field, Any]]:
    hints = get_type_hints(config_class)
    return [(f, hints[f.name]) for f in dataclasses.fields(config_class) if f.init]


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _owners(config_class: type) -> dict[str, type]:
    """Field name -> the class nearest to ``config_class`` that defines it."""
    owners: dict[str, type] = {}
    for owner in reversed(config_class.__mro__):
        owners |= dict.fromkeys(inspect.get_annotations(owner), owner)
    return owners


@cache
def field_comments(owner: type) -> dict[str, str]:
    """Field name -> the comment that ends its line in the class's source."""
    try:
        lines = textwrap.dedent(inspect.getsource(owner)).splitlines()
    except (OSError, TypeError):  # defined interactively
        return {}
    body = ast.parse("\n".join(lines)).body[0].body
    comments = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            tail = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
            if "#" in tail:
                comments[node.target.id] = tail.partition("#")[2].strip()
    return comments
