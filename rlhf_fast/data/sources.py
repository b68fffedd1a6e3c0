"""Where records come from: JSONL, JSON, CSV, parquet, a local folder, or the name of a `datasets` hub data set.

Every source becomes :class:`Records`, a list of dicts that knows where each row was read, so that whoever finds a bad
row later can name its file and line.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import gzip
import io
import json
import logging
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

from rlhf_fast.errors import UserError

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")
LONGEST_NAME = 1000  # characters
# how a file begins that is none of text, and what it is then
FOREIGN = {
    b"\xff\xfe": "is UTF-16 text. Save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text. Save it as UTF-8",
    b"\0\0\xfe\xff": "is UTF-32 text. Save it as UTF-8",
    b"\x1f\x8b": "is compressed with gzip. Give it a name that ends with .gz",
    b"PAR1": "is a parquet file. Give it a name that ends with .parquet",
    b"PK\x03\x04": "is a zip archive (.xlsx is one too). Unpack it, or export its table as .csv",
}
# what `datasets` says of a parquet file without rows
OF_NO_ROWS = ("BatchSize must be greater than 0", "corresponds to no data")
SUFFIXES = (*TEXT_SUFFIXES, *(s + ".gz" for s in TEXT_SUFFIXES), ".parquet")


class BadRow(UserError):
    """One row cannot be used; the text says why. Whoever knows the row's place adds it, or drops the row and counts it."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason  # two or three words, the key of the count of dropped rows

    @property
    def column(self) -> str:
        """The column at fault: what the message names first in backquotes."""
        named = re.search(r"`([^`]+)`", str(self))
        return named[1] if named else ""


class Problem(NamedTuple):
    """A row that cannot be used."""

    where: str  # as ``train.jsonl, line 17``
    column: str
    reason: str  # two or three words
    message: str  # what is wrong, with the value


class Records(list):
    """Rows (dicts) with their origin. Slices and :meth:`select` keep it."""

    def __init__(self, rows: Iterable[dict] = (), source: str = "the data", lines: Sequence[str] | None = None):
        super().__init__(rows)
        self.source = source  # file or data set, for messages
        self._lines = lines  # what to call each row; None: its position, from 1

    def where(self, i: int) -> str:
        """How to name row ``i`` to a person, for example ``train.jsonl, line 17``."""
        return f"{self.source}, {self._lines[i] if self._lines is not None else f'row {i + 1}'}"

    def select(self, indices: Iterable[int]) -> Records:
        """The rows at ``indices``, still named by where they were read."""
        indices = list(indices)
        lines = [self._lines[i] if self._lines is not None else f"row {i + 1}" for i in indices]
        return Records((list.__getitem__(self, i) for i in indices), self.source, lines)

    def __getitem__(self, key):
        if isinstance(key, slice):
            return self.select(range(len(self))[key])
        return super().__getitem__(key)


def load_records(source: Any, split: str | None = None) -> Records:
    """Read a data set wholly.

    Args:
        source: a ``.jsonl``, ``.json``, ``.csv`` (each also ``.gz``) or ``.parquet`` file; a folder of such files or one
            written by ``Dataset.save_to_disk``; a hub name ``owner/name`` or ``owner/name/config``; each of these with
            ``:split`` at its end where wanted. Also a ``datasets.Dataset`` or a list of dicts.
        split: the split to take; ``train`` where there are several and none is named.
    Returns:
        The rows, at least one.
    Raises:
        UserError: nothing there, an unreadable or malformed file (with its line), a missing split, no rows.
    """
    if isinstance(source, (str, Path)):
        records = _load_named(str(source), split)
    else:
        records = _from_object(source, split)
    if not records:
        raise UserError(f"{records.source} holds no rows. Give a data set with at least one.")
    return records


def train_test(records: Sequence[dict], test: float, seed: int = 0) -> tuple[Records, Records]:
    """Hold out ``test`` rows (an int) or that share of them (a float below 1), chosen by ``seed``.

    Returns:
        The remaining rows and the held-out rows, disjoint, both in their original order.
    """
    records = _from_object(records, None)
    held_out = round(test * len(records)) if isinstance(test, float) else test
    if not 0 < held_out < len(records):
        raise UserError(
            f"Cannot hold out {test!r} of the {len(records)} rows of {records.source}: "
            f"give a number of rows from 1 to {len(records) - 1}, or a share between 0 and 1."
        )
    chosen = set(random.Random(seed).sample(range(len(records)), held_out))
    kept = [i for i in range(len(records)) if i not in chosen]
    return records.select(kept), records.select(sorted(chosen))


# ---------------------------------------------------------------------------------------------- names and folders


def _load_named(name: str, split: str | None) -> Records:
    if len(name) > LONGEST_NAME or "\0" in name:
        raise UserError(f"{brief(name)} is no name of a file, a folder or a data set.")
    path = Path(name).expanduser()
    if not path.exists() and ":" in name:
        head, _, tail = name.rpartition(":")
        if split is not None and split != tail:
            raise UserError(f"Two splits for one data set: {name!r} names {tail!r}, but {split!r} was asked for.")
        name, split, path = head, tail, Path(head).expanduser()
    if path.is_file():
        return _read_file(path, split)
    if path.is_dir():
        return _read_folder(path, split)
    if os.path.lexists(path):
        what = (
            "a link that leads nowhere" if path.is_symlink() else "no file to be read twice, such as a pipe or a device"
        )
        raise UserError(f"{name} is {what}. Give a file.")
    near = _nearest_entry(path)
    forgotten_suffix = "/" not in name and near is not None and near.split(".")[0] == name
    if _looks_like_a_path(name) or forgotten_suffix:
        raise UserError(f"There is no file or folder {name!r}.{_suggest_path(path, near)}")
    return _read_hub(name, split, near)


def _looks_like_a_path(name: str) -> bool:
    suffixes = (*SUFFIXES, ".txt", ".md", ".tsv", ".arrow")
    return name.endswith(suffixes) or name.startswith(("/", ".", "~")) or name.count("/") > 2 or "\\" in name


def _nearest_entry(path: Path) -> str | None:
    """The existing entry of the same folder that is most like ``path``."""
    if not path.parent.is_dir():
        return None
    names = sorted(p.name for p in path.parent.iterdir())
    same_stem = [n for n in names if n.split(".")[0] == path.name and n.endswith(SUFFIXES)]
    near = same_stem or difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return str(path.parent / near[0]) if near else None


def _suggest_path(path: Path, near: str | None) -> str:
    if near is not None:
        return f" Did you mean {near!r}?"
    parent = path.parent
    if parent.is_dir():
        return f" The folder {str(parent)!r} has no such entry."
    while not parent.is_dir():
        parent = parent.parent
    return f" The path exists only as far as {str(parent)!r}."


def _read_file(path: Path, split: str | None) -> Records:
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
    if suffix is None:
        raise UserError(f"{path}: unknown kind of file. Give one of {', '.join(SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes). Give a data set with at least one row.")
    if (what := _foreign(path, suffix)) is not None:
        raise UserError(f"{path} {what}.")
    if suffix == ".parquet":
        return _refuse_split(_read_parquet(path), path, split)
    try:
        with _open_text(path) as file:
            if suffix.startswith(".json") and not suffix.startswith(".jsonl"):
                return _read_json(file, path, split)
            reader = _read_csv if suffix.startswith(".csv") else _read_jsonl
            return _refuse_split(reader(file, path), path, split)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, {_undecodable(path)} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path} is not a complete gzip file ({error}). Write it again.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def _foreign(path: Path, suffix: str) -> str | None:
    """What a file is, and what to do, whose name says that it is text and whose first bytes do not; None where all is well."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if suffix.endswith(".gz"):
        return None if head.startswith(b"\x1f\x8b") else "is not compressed. Give it a name that does not end with .gz"
    if suffix == ".parquet":
        return None
    if head.startswith(b"\xff\xfe\0\0"):
        return FOREIGN[b"\0\0\xfe\xff"]
    for begin, what in FOREIGN.items():
        if head.startswith(begin):
            return what
    pairs = head[: len(head) // 2 * 2]
    half = pairs and not (any(pairs[1::2]) and any(pairs[::2]))  # every second byte is 0
    return FOREIGN[b"\xff\xfe"] if half and any(pairs) else None


def _open_text(path: Path) -> IO[str]:
    opener: Callable[..., IO[str]] = gzip.open if path.suffix == ".gz" else open
    # utf-8-sig: a byte-order mark, as spreadsheets write it, is not part of the first column's name
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _undecodable(path: Path) -> str:
    """The line that is not UTF-8, and the byte in it. Text readers decode in blocks and do not know."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number}: byte {error.start + 1} ({line[error.start : error.start + 1]!r})"
    return "at its end: a character"


def _refuse_split(records: Records, path: Path, split: str | None) -> Records:
    # the file train.jsonl is the train split; anything else would silently ignore what was asked for
    if split is not None and split not in path.name:
        raise UserError(f"{path} is a single file without splits, but the split {split!r} was asked for. Leave it out.")
    return records


def _read_folder(path: Path, split: str | None) -> Records:
    if any((path / name).exists() for name in ("dataset_dict.json", "state.json", "dataset_info.json")):
        return _read_saved(path, split)
    files = sorted(p for folder in (path, path / "data") for p in folder.glob("*") if p.name.endswith(SUFFIXES))
    if not files:
        raise UserError(f"The folder {path} holds no data files. Expected {', '.join(SUFFIXES)}.")
    wanted = split or ("train" if len(files) > 1 else "")
    chosen = [f for f in files if f.name.split(".")[0].lower().startswith(wanted.lower())]
    if not chosen:
        names = ", ".join(f.name for f in files)
        raise UserError(f"The folder {path} has no file for the split {wanted!r}; it holds {names}. Name one of them.")
    parts = [_read_file(f, None) for f in chosen]
    if len(parts) == 1:
        return parts[0]
    lines = [part.where(i) for part in parts for i in range(len(part))]
    return Records((row for part in parts for row in part), str(path), lines)


def _read_saved(path: Path, split: str | None) -> Records:
    import datasets

    try:
        return _from_object(datasets.load_from_disk(str(path)), split, str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"The folder {path} is not a readable saved data set: {_first_line(error)}") from None


def _read_hub(name: str, split: str | None, near: str | None) -> Records:
    import datasets

    head = name.split("/")
    hub_name, config = ("/".join(head[:2]), head[2]) if len(head) == 3 else (name, None)
    try:
        loaded = datasets.load_dataset(hub_name, config, split=split or None)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        hint = f"Did you mean {near!r}?" if near else "Check the path, or the hub name and the network."
        raise UserError(
            f"{name!r} is no file or folder here, and loading it as a hub data set failed: {_first_line(error)}. {hint}"
        ) from None
    return _from_object(loaded, split, name)


def _from_object(source: Any, split: str | None, name: str = "the data") -> Records:
    if isinstance(source, Records):
        return source
    if isinstance(source, Mapping):  # datasets.DatasetDict, or a dict of lists of rows
        return _from_object(_pick_split(source, split, name), None, name)
    if hasattr(source, "to_list"):
        return Records(source.to_list(), name)
    if isinstance(source, Iterable):
        rows = list(source)
        for i, row in enumerate(rows):
            if not isinstance(row, dict):
                raise UserError(f"{name}, row {i + 1}: expected a dict of columns, got {type(row).__name__}.")
        return Records(rows, name)
    raise UserError(f"Cannot read records from a {type(source).__name__}: give a path, a data set or a list of dicts.")


def _pick_split(splits: Mapping[str, Any], split: str | None, name: str) -> Any:
    wanted = split or ("train" if "train" in splits else next(iter(splits), "train") if len(splits) == 1 else "train")
    if wanted not in splits:
        raise UserError(f"{name} has no split {wanted!r}; it has {', '.join(splits)}. Name one of them.")
    return splits[wanted]


# -------------------------------------------------------------------------------------------------------- readers


def _read_jsonl(file: IO[str], path: Path) -> Records:
    rows, lines = [], []
    complete = "Every line must be one complete JSON object."
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        if not rows and line.lstrip().startswith("["):
            complete += " Or give a list of objects a name that ends with .json."
        try:
            row = _parse(line)
        except json.JSONDecodeError as error:
            start = line.strip()[:60]
            raise UserError(
                f"{path}, line {number}: malformed JSON at column {error.colno} ({error.msg}): {start!r}. {complete}"
            ) from None
        except BadRow as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number}: expected a JSON object, got {_json_type(row)}: {line.strip()[:60]!r}. {complete}"
            )
        rows.append(row)
        lines.append(f"line {number}")
    return Records(rows, str(path), lines)


def _read_json(file: IO[str], path: Path, split: str | None) -> Records:
    text = file.read()
    try:
        value = _parse(text)
    except BadRow as error:
        raise UserError(f"{path}: {error}") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several objects, one a line, under the wrong name
            return _refuse_split(_read_jsonl(io.StringIO(text), path), path, split)
        raise UserError(f"{path}, line {error.lineno}: malformed JSON at column {error.colno} ({error.msg}).") from None
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        if not any(isinstance(cell, dict) for cells in value.values() for cell in cells):
            raise UserError(
                f"{path}: expected a list of objects, one a row, got one object of columns: {', '.join(value)}. Write rows "
                "(pandas: orient='records')."
            )
        value, split = _pick_split(value, split or ("data" if "data" in value else None), str(path)), None
    elif isinstance(value, dict):
        raise UserError(
            f"{path}: expected a list of objects, got one object with the keys {', '.join(value) or '(none)'}."
        )
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of objects, got {_json_type(value)}.")
    return _refuse_split(_from_object(value, None, str(path)), path, split)


def _read_csv(file: IO[str], path: Path) -> Records:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(file, strict=True)
    first = 1  # line of the row that is being read
    try:
        header = [h.strip() for h in next(reader, [])]
        if not all(header) or len(set(header)) < len(header):
            raise UserError(f"{path}, line 1: every column needs its own name, got {header}.")
        if len(header) == 1 and (mark := next((m for m in ";\t|" if m in header[0]), None)):
            raise UserError(f"{path}, line 1: its cells are parted by {mark!r}: {header[0]!r}. Save it with commas.")
        rows, lines = [], []
        first = reader.line_num + 1
        for values in reader:
            where, first = f"line {first}", reader.line_num + 1
            if not values:
                continue
            if len(values) != len(header):
                raise UserError(
                    f"{path}, {where}: {len(values)} cells, but the header names {len(header)} columns "
                    f"({', '.join(header)}): {brief(values)}. Quote cells that hold commas or line breaks."
                )
            rows.append({key: _csv_cell(value) for key, value in zip(header, values)})
            lines.append(where)
    except csv.Error as error:
        raise UserError(
            f"{path}, line {first}: malformed CSV ({error} by line {reader.line_num}). Close each quoted cell, and write a "
            'quote within it twice: "".'
        ) from None
    return Records(rows, str(path), lines)


def _csv_cell(cell: str) -> Any:
    """A cell that holds a JSON list (messages, responses, ranking) is that list; all else stays text."""
    if cell.startswith("[") and cell.endswith("]"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def _read_parquet(path: Path) -> Records:
    import datasets

    # a throw-away cache: a changed file must never be answered from an older copy
    with tempfile.TemporaryDirectory() as cache, _quiet(datasets):
        try:
            rows = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True).to_list()
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            why = _first_line(error.__cause__ or error)
            if not any(told in why for told in OF_NO_ROWS):
                raise UserError(f"{path} is not a readable parquet file: {why}.") from None
            rows = []
    return Records(rows, str(path))


@contextlib.contextmanager
def _quiet(datasets: ModuleType) -> Iterator[None]:
    """Inside, ``datasets`` shows no bar for reading a file, and logs no error that we are about to tell."""
    log, shows = logging.getLogger("datasets"), datasets.are_progress_bars_disabled()
    level = log.level
    datasets.disable_progress_bars()
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
        if not shows:
            datasets.enable_progress_bars()


def _parse(text: str) -> Any:
    """JSON, without the keys that are given twice: all but the last would be lost without a word."""
    try:
        return json.loads(text, object_pairs_hook=_one_of_each)
    except (json.JSONDecodeError, BadRow):
        raise
    except RecursionError:
        raise BadRow("too deep", "a value is nested too deeply to be read. Leave it out.") from None
    except ValueError:  # Python reads integers of 4300 digits
        raise BadRow("a long number", "a number has too many digits to be read. Write it as a string.") from None


def _one_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        name = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        values = " and ".join(brief(value) for key, value in pairs if key == name)
        raise BadRow(f"two {name}", f"`{name}` is there twice, as {values}. Leave one of them.")
    return row


def brief(value: Any) -> str:
    """A value as a message shows it: its first 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


# -------------------------------------------------------------------------------------------------------- writing


def write_jsonl(records: Iterable[dict], path: str | Path) -> Path:
    """Write rows as JSONL, one object a line, UTF-8; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in records:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path
