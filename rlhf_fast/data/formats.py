"""Recognise the columns of a data set and bring its rows to one canonical form per need.

=============  ===========================================================================================
need           canonical row (other columns are kept)
=============  ===========================================================================================
`sft`          ``{"text"}``, ``{"messages"}`` or ``{"prompt", "completion"}``
`preferences`  ``{"prompt", "responses"}`` (K >= 2, best first), ``margin`` for pairs that have one
`harm`         the same, least harmful first, ``safe`` (K bools) where responses are called safe or not
`prompts`      ``{"prompt"}``; imported answers arrive as the columns ``answer`` and ``solution``
`labelled`     ``{"prompt", "completion", "label"}``, label a bool
=============  ===========================================================================================

A prompt is a string or a list of messages ``{"role", "content"}``; responses are of the prompt's kind. The imports alpaca,
GSM8K, sharegpt and HH transcripts become messages.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_fast.data.sources import BadRow, Problem, Records, brief, load_records
from rlhf_fast.errors import UserError

Row = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "observation": "tool",
}


HOW_TO_GO_ON = "Correct the row, or leave such rows out with bad_rows: drop."


class NormalisedRecords(Records):
    """Canonical rows, what was dropped on the way, and which format was recognised."""

    format: str = ""
    problems: list[Problem]  # of the rows that were left out

    @property
    def dropped(self) -> Counter[str]:
        """How many rows were left out, by reason."""
        return Counter(problem.reason for problem in self.problems)


@dataclass(frozen=True)
class Format:
    """One recognised set of columns: how it is called, what it needs, how a row becomes canonical."""

    name: str
    columns: tuple[tuple[str, ...], ...]  # each group: any one of these columns
    convert: Callable[[Row], Row]

    def matches(self, columns: Sequence[str]) -> bool:
        return all(any(name in columns for name in group) for group in self.columns)

    def __str__(self) -> str:
        return " + ".join(f"`{group[0]}`" for group in self.columns)


def normalise(records: Any, need: str, bad_rows: str = "error") -> NormalisedRecords:
    """Bring every row to the canonical form that ``need`` names (see the table at the top of this file).

    Args:
        records: anything :func:`load_records` takes.
        need: ``sft``, ``preferences``, ``harm``, ``prompts`` or ``labelled``.
        bad_rows: ``error`` stops at the first row with a null, empty or wrongly typed value; ``drop`` leaves such rows
            out and keeps them in ``.problems``; ``audit`` does that, and takes it when no row is left.
    Raises:
        UserError: the columns fit no format, or (``error``) a row is bad, or (``drop``) none is left.
    """
    if bad_rows not in ("error", "drop", "audit"):
        raise UserError(f"bad_rows must be 'error' or 'drop', got {bad_rows!r}.")
    records = load_records(records)
    fmt = recognise(records, need)
    rows, lines, problems = [], [], []
    for i, row in enumerate(records):
        try:
            rows.append(_writable(fmt.convert(row)))
            lines.append(records.where(i).removeprefix(f"{records.source}, "))
        except BadRow as error:
            if bad_rows == "error":
                raise UserError(f"{records.where(i)}: {error} {HOW_TO_GO_ON}") from None
            problems.append(Problem(records.where(i), error.column, error.reason, str(error)))
    if not rows and bad_rows != "audit":
        first = f"{problems[0].where}: {problems[0].message}"
        raise UserError(f"{records.source}: every one of its {len(records)} rows is unusable. The first: {first}")
    result = NormalisedRecords(rows, records.source, lines)
    result.format, result.problems = fmt.name, problems
    return result


def recognise(records: Records, need: str) -> Format:
    """The first format of ``need`` whose columns a row of the data set has, the first such row.

    Raises:
        UserError: none fits; one sentence with what is needed, what was found and the nearest match.
    """
    if need not in NEEDS:
        raise UserError(f"Unknown need {need!r}: choose one of {', '.join(NEEDS)}.")
    columns = list(records[0])
    # the first row may be the odd one out: it is bad then, as any other
    for having in dict.fromkeys(tuple(row) for row in records):
        for fmt in NEEDS[need]:
            if fmt.matches(having):
                return fmt
    accepted = dict.fromkeys(str(fmt) for fmt in NEEDS[need])
    found = ", ".join(f"`{c}`" for c in columns) or "none"
    raise UserError(
        f"{records.source}: {WANTED_BY[need]} needs {', or '.join(accepted)}; "
        f"its columns are {found}.{_nearest(columns, NEEDS[need])}"
    )


def _nearest(columns: list[str], formats: Sequence[Format]) -> str:
    """The renaming that would complete a format, if one letter-close one exists; else what is missing from the closest."""

    def missing(fmt: Format) -> list[str]:
        return [group[0] for group in fmt.columns if not any(name in columns for name in group)]

    # formats that are partly there come first
    partly = sorted((f for f in formats if len(missing(f)) < len(f.columns)), key=lambda f: len(missing(f)))
    for fmt in [*partly, *(f for f in formats if f not in partly)]:
        guesses = {name: difflib.get_close_matches(name, columns, n=1, cutoff=0.8) for name in missing(fmt)}
        if all(guesses.values()):
            return "".join(f" Rename `{guess[0]}` to `{name}`." for name, guess in guesses.items())
    if partly:
        return f" Missing beside what is there: {', '.join(f'`{name}`' for name in missing(partly[0]))}."
    return " Rename the columns to one of these forms."


# ------------------------------------------------------------------------------------------- checks of one value


def _get(row: Row, *names: str) -> tuple[str, Any]:
    """The first of ``names`` that the row has, and its value, which may not be null."""
    for name in names:
        if name in row:
            if row[name] is None:
                raise BadRow(f"null {names[0]}", f"`{name}` is null.")
            return name, row[name]
    has = ", ".join(f"`{c}`" for c in row) or "nothing"
    raise BadRow(f"no {names[0]}", f"`{names[0]}` is missing; the row has {has}.")


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow(f"wrong {name}", f"`{name}` must be a string, got {_describe(value)}.")
    if _blank(value):
        raise BadRow(f"empty {name}", f"`{name}` is empty: {brief(value)}.")
    _encodable(name, value)
    return value


def _blank(text: str) -> bool:
    """Whether there is nothing to see: white space, characters without width, marks of byte order, NULs."""
    return re.search(r"[^\s\0\u200b-\u200f\u2060\ufeff]", text) is None


def _encodable(name: str, text: str) -> None:
    """Half a surrogate pair, as a cut ``\\ud83d\\ude00`` leaves it in JSON, is no text: tokenizers crash on it."""
    odd = re.search("[\ud800-\udfff]", text)
    if odd:
        raise BadRow(f"wrong {name}", f"`{name}` holds half a character, {odd[0]!r}, at position {odd.start()}.")


def _writable(row: Row) -> Row:
    """The row; its other columns go to reward functions, and from there into files."""
    for name, value in row.items():
        _encodable(brief(name), name)
        if isinstance(value, str):
            _encodable(name, value)
    return row


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {brief(value)}"


def _messages(name: str, value: Any) -> list[dict]:
    """A checked, non-empty list of messages with the standard roles; sharegpt's from/value is accepted."""
    if not isinstance(value, list):
        raise BadRow(f"wrong {name}", f"`{name}` must be a list of messages, got {_describe(value)}.")
    if not value:
        raise BadRow(f"empty {name}", f"`{name}` has no messages.")
    return [_message(f"{name}[{i}]", name, m) for i, m in enumerate(value)]


def _message(where: str, name: str, message: Any) -> dict:
    if not isinstance(message, dict):
        raise BadRow(f"wrong {name}", f"`{where}` must be {{role, content}}, got {_describe(message)}.")
    if "from" in message and "role" not in message:
        message = {"role": message["from"], "content": message.get("value")}
    message = {k: v for k, v in message.items() if v is not None}  # parquet fills absent keys with null
    role = message.get("role")
    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRow(f"wrong {name}", f"`{where}` has the role {role!r}; use one of {', '.join(ROLES)}.")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise BadRow(f"wrong {name}", f"`{where}` has no content.")
    if isinstance(content, list):
        content = message["content"] = _joined(where, name, content)
    if content is not None and not isinstance(content, str):
        raise BadRow(f"wrong {name}", f"the content of `{where}` must be a string, got {_describe(content)}.")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise BadRow(f"wrong {name}", f"the tool_calls of `{where}` must be a list of objects, got {_describe(calls)}.")
    if content is not None and _blank(content) and not calls:
        raise BadRow(f"empty {name}", f"the content of `{where}` ({role}) is empty: {brief(content)}.")
    if content is not None:
        _encodable(where, content)
    return {**message, "role": role}


def _joined(where: str, name: str, parts: list) -> str:
    """The text of a content in parts. Most templates would print the list itself."""
    for part in parts:
        if not (isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)):
            raise BadRow(
                f"wrong {name}",
                f"the content of `{where}` has a part that is no text, which is all we read: {brief(part)}.",
            )
    return "".join(part["text"] for part in parts)


def _prompt(value: Any) -> str | list[dict]:
    return _messages("prompt", value) if isinstance(value, list) else _string("prompt", value)


def _response(name: str, value: Any, prompt: str | list[dict]) -> str | list[dict]:
    """A response of the prompt's kind: a bare string after a list of messages is the assistant's."""
    if isinstance(prompt, str):
        if isinstance(value, list):
            raise BadRow(
                f"wrong {name}", f"`{name}` is a list of messages, but `prompt` is a string. Use one kind for both."
            )
        return _string(name, value)
    if isinstance(value, str):
        return [{"role": "assistant", "content": _string(name, value)}]
    messages = _messages(name, value)
    if messages[0]["role"] != "assistant":
        raise BadRow(f"wrong {name}", f"`{name}` must begin with the assistant, not with {messages[0]['role']!r}.")
    return messages


def _weight(row: Row) -> Row:
    weight = row.get("weight")
    if weight is None:
        return {}
    weight = _number("weight", weight)
    if weight < 0:
        raise BadRow("wrong weight", f"`weight` must not be negative, got {weight}.")
    return {"weight": weight}


def _number(name: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"wrong {name}", f"`{name}` must be a finite number, got {_describe(value)}.")
    return number


def _rest(row: Row, *used: str) -> Row:
    return {k: v for k, v in row.items() if k not in used}


# --------------------------------------------------------------------------------------------------- sft and prompts


def _text(row: Row) -> Row:
    return {"text": _string("text", _get(row, "text")[1]), **_rest(row, "text"), **_weight(row)}


def _conversation(row: Row) -> Row:
    name, value = _get(row, "messages", "conversations", "conversation")
    messages = _messages(name, value)
    if not any(m["role"] == "assistant" for m in messages):
        raise BadRow("no assistant", f"`{name}` has no assistant message, so nothing to learn.")
    return {"messages": messages, **_rest(row, name), **_weight(row)}


def _prompt_completion(row: Row) -> Row:
    prompt = _prompt(_get(row, "prompt")[1])
    name, value = _get(row, "completion", "response")
    return {
        "prompt": prompt,
        "completion": _response(name, value, prompt),
        **_rest(row, "prompt", name),
        **_weight(row),
    }


def _alpaca(row: Row) -> Row:
    asked = _string("instruction", _get(row, "instruction")[1])
    given = row.get("input")
    if given is not None and not isinstance(given, str):
        raise BadRow("wrong input", f"`input` must be a string, got {_describe(given)}.")
    _encodable("input", given or "")
    content = f"{asked}\n\n{given}" if given and given.strip() else asked
    output = _string("output", _get(row, "output")[1])
    rest = _rest(row, "instruction", "input", "output")
    return {**_chat_pair(content, output), **rest, **_weight(row)}


def _question_answer(row: Row) -> Row:
    question = _string("question", _get(row, "question")[1])
    answer = _string("answer", _get(row, "answer")[1])
    return {**_chat_pair(question, answer), **_rest(row, "question", "answer"), **_weight(row)}


def _chat_pair(user: str, assistant: str) -> Row:
    return {
        "prompt": [{"role": "user", "content": user}],
        "completion": [{"role": "assistant", "content": assistant}],
    }


def _best_response(convert: Callable[[Row], Row]) -> Callable[[Row], Row]:
    """SFT on preference data learns the preferred response."""

    def best(row: Row) -> Row:
        row = convert(row)
        return {"completion": row["responses"][0], **_rest(row, "responses", "margin"), **_weight(row)}

    return best


def final_answer(text: str) -> str | None:
    """The number after the last ``####``, as GSM8K writes it, without thousands separators. None without the mark."""
    _, mark, tail = text.rpartition("####")
    return tail.strip().replace(",", "") or None if mark else None


def _only_prompt(row: Row) -> Row:
    return {"prompt": _prompt(_get(row, "prompt")[1]), **_rest(row, "prompt")}


def _question_prompt(row: Row) -> Row:
    """A question; its worked solution becomes `answer` (the final number, or all of it) and `solution`."""
    question = _string("question", _get(row, "question")[1])
    solution = _string("answer", _get(row, "answer")[1])
    answer = final_answer(solution)
    if answer is None and "####" in solution:
        raise BadRow("empty answer", "`answer` has nothing after its `####`.")
    columns = {"answer": answer or solution, "solution": solution}
    return {"prompt": [{"role": "user", "content": question}], **columns, **_rest(row, "question", "answer")}


def _alpaca_prompt(row: Row) -> Row:
    row = _alpaca(row)
    return {"answer": row["completion"][0]["content"], **_rest(row, "completion")}


def _conversation_prompt(row: Row) -> Row:
    """All that comes before the last assistant message; a conversation that ends with the user is taken whole."""
    name, value = _get(row, "messages", "conversations", "conversation")
    messages = _messages(name, value)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise BadRow("empty prompt", f"`{name}` has nothing before the assistant's message.")
    return {"prompt": messages, **_rest(row, name)}


def _preference_prompt(row: Row) -> Row:
    return _rest(_pair(row), "responses", "margin")


# ------------------------------------------------------------------------------------------------------ preferences


def parse_transcript(text: str) -> list[dict]:
    r"""Split an HH transcript, ``"\n\nHuman: ...\n\nAssistant: ..."``, into messages.

    Raises:
        BadRow: it does not begin with a turn.
    """
    parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", text if text.startswith("\n\n") else text.lstrip("\n"))
    if len(parts) < 3 or parts[0].strip():
        raise BadRow("wrong transcript", f"expected turns '\\n\\nHuman: ...\\n\\nAssistant: ...', got {text[:40]!r}.")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[parts[i]], "content": parts[i + 1].strip()} for i in range(1, len(parts), 2)]


def _is_transcript(text: str) -> bool:
    return text.lstrip("\n").startswith("Human:") and "\n\nAssistant:" in text


def _pair(row: Row) -> Row:
    """prompt/chosen/rejected, or chosen/rejected with the prompt in their shared beginning."""
    chosen, rejected = _get(row, "chosen")[1], _get(row, "rejected")[1]
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, (str, list)):
            raise BadRow(f"wrong {name}", f"`{name}` must be a string or a list of messages, got {_describe(value)}.")
    if type(chosen) is not type(rejected):
        names = ("chosen", "rejected") if isinstance(chosen, list) else ("rejected", "chosen")
        raise BadRow(
            "wrong responses",
            f"`{names[0]}` and `{names[1]}` must both be strings or both lists of messages, got "
            f"{_describe(row[names[0]])} and {_describe(row[names[1]])}.",
        )
    prompt = row.get("prompt")
    if isinstance(chosen, str) and prompt is None and _is_transcript(chosen) and _is_transcript(rejected):
        chosen, rejected = parse_transcript(chosen), parse_transcript(rejected)
    # a prompt column beside whole conversations only repeats their first user message
    whole = isinstance(chosen, list) and bool(chosen) and _messages("chosen", chosen[:1])[0]["role"] != "assistant"
    if prompt is None or (whole and isinstance(prompt, str)):
        prompt, chosen, rejected = _split_shared(chosen, rejected)
    prompt = _prompt(prompt)
    responses = [_response("chosen", chosen, prompt), _response("rejected", rejected, prompt)]
    if responses[0] == responses[1]:
        raise BadRow("identical responses", "`chosen` and `rejected` are identical, so nothing is preferred.")
    out = {
        "prompt": prompt,
        "responses": responses,
        **_rest(row, "prompt", "chosen", "rejected", "margin"),
        **_weight(row),
    }
    return out if row.get("margin") is None else {**out, "margin": _number("margin", row["margin"])}


def _pair_with_prompt(row: Row) -> Row:
    """Of a data set with prompts, where a row without one is a mistake: no beginning that its responses share is one."""
    _get(row, "prompt")
    return _pair(row)


def _split_shared(chosen: str | list, rejected: str | list) -> tuple[Any, Any, Any]:
    """The shared prompt and the two rests."""
    if isinstance(chosen, list):
        chosen, rejected = _messages("chosen", chosen), _messages("rejected", rejected)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if isinstance(chosen, str):
        shared = _word_start(chosen, rejected, shared)
    elif shared < min(len(chosen), len(rejected)) and chosen[shared]["role"] != "assistant":
        raise BadRow("split at the user", f"`chosen` and `rejected` differ already in message {shared} (user).")
    if chosen[shared:] == rejected[shared:]:
        raise BadRow("identical responses", "`chosen` and `rejected` are identical, so nothing is preferred.")
    if not shared:
        raise BadRow("no shared prompt", "there is no `prompt`, and `chosen` and `rejected` share no beginning.")
    if shared == min(len(chosen), len(rejected)):
        raise BadRow("empty response", "one of `chosen` and `rejected` is only the beginning of the other.")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _word_start(chosen: str, rejected: str, shared: int) -> int:
    """Where the word begins in which two texts part, its leading space included, as tokenizers like it."""
    if chosen == rejected:
        return shared
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    return shared - 1 if shared and chosen[shared - 1] == " " else shared


def _ranked(row: Row) -> Row:
    """prompt/responses/ranking to responses best first.

    ``ranking`` gives each response's rank, 1 = best. A permutation of 0..K-1 is read as the order instead: the indices of
    the responses, best first.
    """
    prompt = _prompt(_get(row, "prompt")[1])
    responses, ranking = _get(row, "responses")[1], _get(row, "ranking")[1]
    if not isinstance(responses, list) or len(responses) < 2:
        raise BadRow("wrong responses", f"`responses` must be a list of two or more, got {_describe(responses)}.")
    if not isinstance(ranking, list) or len(ranking) != len(responses):
        raise BadRow(
            "wrong ranking",
            f"`ranking` must give one rank for each of the {len(responses)} responses, got {_describe(ranking)}.",
        )
    responses = [_response(f"responses[{i}]", r, prompt) for i, r in enumerate(responses)]
    ranks = [_rank(value) for value in ranking]
    if sorted(ranks) == list(range(len(ranks))):
        order = ranks
    elif len(set(ranks)) < len(ranks):
        raise BadRow("tied ranks", f"`ranking` {ranking} has a tie, and a ranked loss needs a strict order.")
    elif sorted(ranks) == list(range(1, len(ranks) + 1)):
        order = sorted(range(len(ranks)), key=ranks.__getitem__)
    else:
        raise BadRow("wrong ranking", f"`ranking` must be a permutation of 1..{len(ranks)} (1 = best), got {ranking}.")
    ordered = [responses[i] for i in order]
    if any(a == b for i, a in enumerate(ordered) for b in ordered[:i]):
        raise BadRow("identical responses", "two of the `responses` are identical, so neither is preferred.")
    return {"prompt": prompt, "responses": ordered, **_rest(row, "prompt", "responses", "ranking"), **_weight(row)}


def _rank(value: Any, name: str = "ranking") -> int:
    number = _number(name, value)
    if number != int(number):
        raise BadRow(f"wrong {name}", f"`{name}` must be made of whole numbers, got {value!r}.")
    return int(number)


def _labelled(row: Row) -> Row:
    row = _prompt_completion(row)
    return {**row, "label": _truth("label", _get(row, "label")[1])}


def _truth(name: str, value: Any) -> bool:
    words = {"true": True, "false": False, "1": True, "0": False}
    truth = words.get(value.strip().lower(), value) if isinstance(value, str) else value
    if truth not in (0, 1):
        raise BadRow(f"wrong {name}", f"`{name}` must be true or false, got {_describe(value)}.")
    return bool(truth)


# ------------------------------------------------------------------------------- helpfulness and harmlessness apart


def _two_labels(label: str) -> Callable[[Row], Row]:
    """Two responses and which is ``better``, which ``safer``, as their index: ours, or the columns of PKU-SafeRLHF."""

    def convert(row: Row) -> Row:
        prompt = _prompt(_get(row, "prompt")[1])
        theirs = "responses" not in row
        columns = ("response_0", "response_1") if theirs else ("responses",)
        given = [_get(row, name)[1] for name in columns] if theirs else _get(row, "responses")[1]
        if not isinstance(given, list) or len(given) != 2:
            raise BadRow("wrong responses", f"`responses` must be a list of two, got {_describe(given)}.")
        responses = [_response(f"responses[{i}]", r, prompt) for i, r in enumerate(given)]
        if responses[0] == responses[1]:
            raise BadRow("identical responses", "the two `responses` are identical, so neither is preferred.")
        names = {x: f"{x}_response_id" if theirs else x for x in ("better", "safer")}
        best = _rank(_get(row, names[label])[1], names[label])
        if best not in (0, 1):
            raise BadRow(f"wrong {label}", f"`{names[label]}` must be 0 or 1, the index of a response, got {best}.")
        safe = [row.get(f"is_response_{i}_safe") for i in (0, 1)] if theirs else row.get("safe")
        out = {"prompt": prompt, "responses": [responses[best], responses[1 - best]]}
        if label == "safer" and (safe := _safety(safe, 2)):
            out["safe"] = [safe[best], safe[1 - best]]
        used = ("prompt", *columns, *names.values(), "safe", "is_response_0_safe", "is_response_1_safe")
        return {**out, **_rest(row, *used), **_weight(row)}

    return convert


def _safety(value: Any, count: int) -> list[bool] | None:
    """Whether each of ``count`` responses is safe, where somebody said."""
    if value is None or (isinstance(value, list) and value and all(v is None for v in value)):
        return None
    if not isinstance(value, list) or len(value) != count:
        raise BadRow(
            "wrong safe", f"`safe` must say true or false of each of {count} responses, got {_describe(value)}."
        )
    return [_truth("safe", v) for v in value]


def _safe_pair(row: Row) -> Row:
    """chosen is the safer; ``safe`` is of [chosen, rejected]."""
    out = _pair(_rest(row, "safe"))
    safe = _safety(row.get("safe"), 2)
    return out if safe is None else {**out, "safe": safe}


def _safe_pair_with_prompt(row: Row) -> Row:
    _get(row, "prompt")
    return _safe_pair(row)


def _safe_ranking(row: Row) -> Row:
    """Rank 1 is the safest; ``safe`` is in the order of the responses."""
    out = _ranked(_rest(row, "safe"))
    safe = _safety(row.get("safe"), len(out["responses"]))
    if safe is None:
        return out
    given = [_response("responses", r, out["prompt"]) for r in row["responses"]]
    return {**out, "safe": [safe[given.index(r)] for r in out["responses"]]}


# ----------------------------------------------------------------------------------------------------------- tables

_TEXT = (("text",),)
_CHAT = (("messages", "conversations", "conversation"),)
_PAIRED = (("prompt",), ("completion", "response"))
_ALPACA = (("instruction",), ("output",))
_QA = (("question",), ("answer",))
_CHOSEN = (("prompt",), ("chosen",), ("rejected",))
_IMPLICIT = (("chosen",), ("rejected",))
_RANKED = (("prompt",), ("responses",), ("ranking",))
_LABELLED = (*_PAIRED, ("label",))
_TWO_LABELS = (("prompt",), ("responses",), ("better",), ("safer",))
_PKU = (("prompt",), ("response_0",), ("response_1",), ("better_response_id",), ("safer_response_id",))

# in order: the first whose columns are all there is taken
NEEDS: dict[str, tuple[Format, ...]] = {
    "sft": (
        Format("messages", _CHAT, _conversation),
        Format("prompt and completion", _PAIRED, _prompt_completion),
        Format("text", _TEXT, _text),
        Format("preferences: the chosen response", _CHOSEN, _best_response(_pair_with_prompt)),
        Format("preferences: the chosen response", _IMPLICIT, _best_response(_pair)),
        Format("rankings: the best response", _RANKED, _best_response(_ranked)),
        Format("alpaca", _ALPACA, _alpaca),
        Format("question and answer", _QA, _question_answer),
    ),
    "preferences": (
        Format("pairs", _CHOSEN, _pair_with_prompt),
        Format("pairs with a shared prompt", _IMPLICIT, _pair),
        Format("rankings", _RANKED, _ranked),
        Format("two labels: the better response", _TWO_LABELS, _two_labels("better")),
        Format("PKU-SafeRLHF: the better response", _PKU, _two_labels("better")),
    ),
    "harm": (
        Format("pairs, the safer chosen", _CHOSEN, _safe_pair_with_prompt),
        Format("pairs with a shared prompt, the safer chosen", _IMPLICIT, _safe_pair),
        Format("rankings, the safest first", _RANKED, _safe_ranking),
        Format("two labels: the safer response", _TWO_LABELS, _two_labels("safer")),
        Format("PKU-SafeRLHF: the safer response", _PKU, _two_labels("safer")),
    ),
    "prompts": (
        Format("prompts", (("prompt",),), _only_prompt),
        Format("pairs: their prompts", _IMPLICIT, _preference_prompt),
        Format("messages", _CHAT, _conversation_prompt),
        Format("question and answer", _QA, _question_prompt),
        Format("alpaca", _ALPACA, _alpaca_prompt),
    ),
    "labelled": (Format("labelled completions", _LABELLED, _labelled),),
}

WANTED_BY = {
    "sft": "supervised fine-tuning",
    "preferences": "training on preferences",
    "harm": "training a cost model",
    "prompts": "reinforcement learning",
    "labelled": "training on labelled completions",
}
