"""From records to what trainers take, with a report of everything that was cut or left out."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rlhf_fast.data.batch import Example, Labelled, Preference, Prompt
from rlhf_fast.data.formats import HOW_TO_GO_ON, NormalisedRecords, normalise
from rlhf_fast.data.sources import BadRow, Problem
from rlhf_fast.data.templates import Encoder, token_audit, truncate
from rlhf_fast.errors import UserError

Item = TypeVar("Item", Example, Preference, Labelled, Prompt)

# what reward functions receive under these names comes from the rollout
RESERVED_COLUMNS = ("prompt", "prompts", "completion", "completions", "completion_ids")

# columns that belong to a conversation elsewhere, and would be missed here
UNREAD = ("images", "image", "videos", "video", "audios", "audio", "tools")

TOO_LONG = "no trained token within max_length"
SAME_WHEN_CUT = "responses equal within max_length"
LONG_PROMPT = "prompt longer than max_prompt_length"


@dataclass
class Report:
    """What became of a data set. ``str(report)`` is one line, and one more for each thing a person should know."""

    name: str  # which data set, for example "train"
    source: str
    format: str
    max_length: int | None  # tokens
    rows: int = 0
    kept: int = 0
    tokens: int = 0  # of the kept rows, all responses of a preference counted
    trained_tokens: int = 0
    lengths: array = field(default_factory=lambda: array("I"))  # tokens of every sequence, before truncation
    truncated: int = 0  # kept rows that lost tokens
    tokens_cut: int = 0  # tokens lost to truncation, those of dropped rows included
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    problems: list[Problem] = field(default_factory=list)  # the rows that cannot be used, too long ones aside
    repeated: int = 0  # kept rows whose tokens an earlier one has
    begun: set[int] = field(default_factory=set)  # hashes of the rows' prompts, or of whole texts
    refusal: str | None = None  # why training does not begin; only an audit has a report then
    notes: Counter[str] = field(default_factory=Counter)  # what had to be put right -> rows
    audit: list[str] = field(default_factory=list)  # token_audit's lines
    stop_ids: Sequence[int] = ()  # tokens that end a response
    sha256: str = ""  # of the kept rows' tokens and of which are trained, in order

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, before truncation."""
        return max(self.lengths, default=0)

    @property
    def shortened(self) -> int:
        """Rows that ``max_length`` cut or cost."""
        return self.truncated + sum(self.dropped[reason] for reason in (TOO_LONG, SAME_WHEN_CUT, LONG_PROMPT))

    def lines(self) -> list[str]:
        """The report, a sentence a line, the token audit last."""
        trained = f", {self.trained_tokens:,} trained" if self.trained_tokens else ""
        first = (
            f"{self.name}: {self.kept:,} of {self.rows:,} rows of {self.source} ({self.format}), {self.tokens:,} tokens"
        )
        out = [f"{first}{trained}, longest {self.longest:,}"]
        if self.truncated or self.tokens_cut:
            out.append(
                f"{self.name}: {self.truncated:,} rows truncated to {self.max_length}, {self.tokens_cut:,} tokens cut"
            )
        out += [f"{self.name}: {rows:,} rows dropped: {reason}" for reason, rows in self.dropped.items() if rows]
        if self.repeated:
            out.append(f"{self.name}: {self.repeated:,} rows repeat an earlier row, token for token")
        out += [f"{self.name}: in {rows:,} rows {note}" for note, rows in self.notes.items()]
        return out + self.audit

    def shared_with(self, other: Report) -> str | None:
        """A sentence about the prompts (or texts) that two data sets share, None when there is none: what was trained on
        tells nothing about other data.
        """
        shared = len(self.begun & other.begun)
        what = f"{shared:,} of the {len(other.begun):,} prompts of {other.name} are in {self.name} too"
        return f"{what}: figures of {other.name} will flatter" if shared else None

    def __str__(self) -> str:
        return "\n".join(self.lines())


def prepare_sft(
    records: Any,
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    completion_only: bool = True,
    assistant_only: bool = True,
    allow_truncation: bool = False,
    **options: Any,
) -> tuple[list[Example], Report]:
    """Tokenize text, conversations or prompts with completions for supervised fine-tuning.

    Args:
        records: anything :func:`load_records` takes, in any of the formats of :mod:`rlhf_fast.data.formats`.
        max_length: tokens of a sequence; what lies beyond is cut, and a row without a trained token left is dropped.
        completion_only: train the completion, not the prompt.
        assistant_only: of conversations, train the assistant's messages.
        allow_truncation: take any share of shortened rows; otherwise more than ``max_truncated_share`` is an error.
        options: ``vocab_size``, ``stop_ids``, ``chat_template_kwargs``, ``bad_rows``, ``max_truncated_share`` (0.01),
            ``name`` and ``check``, see :class:`_Preparation`.
    Raises:
        UserError: unusable records, or too many rows too long.
    """
    work = _Preparation(records, "sft", tokenizer, max_length, allow_truncation, "max_length", **options)

    def encode(row: dict) -> Example:
        if "text" in row:
            example = work.encoder.text(row["text"])
        elif "messages" in row:
            example = work.encoder.messages(row["messages"], assistant_only)
        else:
            example = work.encoder.prompt_completion(row["prompt"], row["completion"], completion_only)
        return work.fit([example], row)[0]

    return work.run(encode)


def prepare_preferences(
    records: Any,
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    allow_truncation: bool = False,
    need: str = "preferences",
    **options: Any,
) -> tuple[list[Preference], Report]:
    """Tokenize pairs or rankings: the responses of each row best first, the prompt before each, only responses trained.

    ``need`` ``harm`` takes the least harmful for the best. Other arguments and errors are those of :func:`prepare_sft`. A row is dropped when one of its responses has no token within
    ``max_length``, or when two of them no longer differ there.
    """
    work = _Preparation(records, need, tokenizer, max_length, allow_truncation, "max_length", **options)

    def encode(row: dict) -> Preference:
        responses = work.fit([work.encoder.prompt_completion(row["prompt"], r) for r in row["responses"]], row)
        if len({tuple(r.input_ids) for r in responses}) < len(responses):
            raise BadRow(SAME_WHEN_CUT, "two responses do not differ within max_length.")
        return Preference(responses, row.get("margin"), safe=row.get("safe"))

    return work.run(encode)


def prepare_labelled(
    records: Any, tokenizer: Any, *, max_length: int | None = 1024, allow_truncation: bool = False, **options: Any
) -> tuple[list[Labelled], Report]:
    """Tokenize single responses with a label, only the response trained, each beside a mismatched one: the response of the
    nearest row before it that answers another prompt (the last row is before the first).

    Arguments and errors are those of :func:`prepare_sft`.
    """
    work = _Preparation(records, "labelled", tokenizer, max_length, allow_truncation, "max_length", **options)

    def encode(row: dict) -> Labelled:
        (example,) = work.fit([work.encoder.prompt_completion(row["prompt"], row["completion"])], row)
        return Labelled(example, row["label"], mismatched=example)

    rows, report = work.run(encode)
    parts = [_split(r.example) for r in rows]
    others = _nearest_other([prompt for prompt, _ in parts])
    for row, (prompt, _), other in zip(rows, parts, others):
        ids = [*prompt, *parts[other][1]][: report.max_length]
        row.mismatched = Example(ids, [i >= len(prompt) for i in range(len(ids))])
    return rows, report


def _split(example: Example) -> tuple[list[int], list[int]]:
    """Prompt and response of an example with one of each."""
    start = example.response_mask.index(True)
    return example.input_ids[:start], example.input_ids[start:]


def _nearest_other(prompts: list[list[int]]) -> list[int]:
    """For each row the nearest one before it, round the end, with another prompt; just the one before where there is none.

    Files of labelled responses often hold several to one prompt in a row, and those are no mismatch.
    """
    other = next((i for i in range(-1, -len(prompts), -1) if prompts[i] != prompts[0]), -1) % len(prompts)
    others = []
    for i, prompt in enumerate(prompts):
        if prompt != prompts[i - 1] or prompts[other] == prompt:
            other = (i - 1) % len(prompts)
        others.append(other)
    return others


def prepare_prompts(
    records: Any,
    tokenizer: Any,
    *,
    max_prompt_length: int | None = None,
    allow_truncation: bool = False,
    **options: Any,
) -> tuple[list[Prompt], Report]:
    """Tokenize prompts for reinforcement learning; every other column goes to the reward functions.

    A prompt longer than ``max_prompt_length`` tokens is dropped, never cut: a cut question has another answer. Other
    arguments and errors are those of :func:`prepare_sft`.
    """
    work = _Preparation(
        records, "prompts", tokenizer, max_prompt_length, allow_truncation, "max_prompt_length", **options
    )
    # a column that only some rows have reaches rewards as None in the others
    columns = list(dict.fromkeys(key for row in work.rows for key in row if key not in RESERVED_COLUMNS))

    def encode(row: dict) -> Prompt:
        ids = work.encoder.prompt(row["prompt"])
        work.report.lengths.append(len(ids))
        if max_prompt_length is not None and len(ids) > max_prompt_length:
            raise BadRow(LONG_PROMPT, f"`prompt` has {len(ids)} tokens.")
        work.report.tokens += len(ids)
        given = {key: row.get(key) for key in columns}
        for key, value in given.items():
            if isinstance(value, float) and math.isnan(value):  # as pandas writes a cell that is empty
                given[key] = None
                work.encoder.notes[f"`{key}` is NaN, taken as missing"] += 1
        return Prompt(ids, row["prompt"], given)

    return work.run(encode)


class _Preparation:
    """One pass over a data set: canonical rows, an encoder, and the report that both fill.

    Args:
        name: what to call the data set in the report.
        vocab_size: rows of the model's embedding; larger ids are refused.
        stop_ids: ``generation_config.eos_token_id``, one or several.
        chat_template_kwargs: variables for the chat template.
        bad_rows: ``error``, ``drop`` or ``audit``, see :func:`rlhf_fast.data.formats.normalise`. An audit gives a report in
            any case, whose ``refusal`` is what would have been raised.
        max_truncated_share: share of rows that may be cut or dropped for their length without ``allow_truncation``.
        check: called with each canonical row; raises BadRow where an algorithm cannot use it.
    """

    def __init__(
        self,
        records: Any,
        need: str,
        tokenizer: Any,
        max_length: int | None,
        allow_truncation: bool,
        limit: str,
        *,
        name: str = "train",
        vocab_size: int | None = None,
        stop_ids: int | Iterable[int] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        bad_rows: str = "error",
        max_truncated_share: float = 0.01,
        check: Callable[[dict], None] = lambda row: None,
    ):
        if max_length is not None and max_length < 2:
            raise UserError(f"{limit} must be at least 2 tokens, got {max_length}.")
        self.rows: NormalisedRecords = normalise(records, need, bad_rows)
        self.encoder = Encoder(tokenizer, stop_ids, chat_template_kwargs, vocab_size)
        self.report = Report(name, self.rows.source, self.rows.format, max_length)
        self.report.rows = len(self.rows) + len(self.rows.problems)
        self.report.dropped.update(self.rows.dropped)
        self.report.problems += self.rows.problems
        self.report.stop_ids = self.encoder.stop_ids
        self._limit, self._bad_rows, self._check = limit, bad_rows, check
        self._first_cut: str | None = None
        self._allowed = 1.0 if allow_truncation else max_truncated_share

    def fit(self, examples: list[Example], row: dict) -> list[Example]:
        """Cut a row's sequences to the maximal length and count them.

        Raises:
            BadRow: a sequence has no trained token left.
        """
        report = self.report
        cut = 0
        fitted = []
        for example in examples:
            example.weight = row.get("weight", 1.0)
            report.lengths.append(len(example))
            fitted.append(truncate(example, report.max_length))
            cut += 0 if report.max_length is None else max(len(example) - report.max_length, 0)
        report.tokens_cut += cut
        if None in fitted:
            raise BadRow(TOO_LONG, f"no trained token lies within max_length {report.max_length}.")
        report.truncated += bool(cut)
        report.tokens += sum(map(len, fitted))
        report.trained_tokens += sum(sum(e.response_mask) for e in fitted)
        return fitted

    def run(self, encode: Callable[[dict], Item]) -> tuple[list[Item], Report]:
        """Encode every row; drop what is too long, and what is bad where that was asked for."""
        report, items, seen, digest = self.report, [], set(), hashlib.sha256()
        for i, row in enumerate(self.rows):
            self.encoder.notes.clear()
            try:
                self._check(row)
                item = encode(row)
            except BadRow as error:
                self._leave_out(error, self.rows.where(i))
                self._note_length(i)
                continue
            except UserError as error:
                raise UserError(f"{self.rows.where(i)}: {error}") from None
            for part in examples_of(item) or [item]:
                part.where = self.rows.where(i)
                digest.update(array("q", [len(part.input_ids), *part.input_ids]).tobytes())
                digest.update(bytes(getattr(part, "response_mask", ())))
            items.append(item)
            self._note_length(i)
            report.notes.update(self.encoder.notes.keys())
            report.notes.update(f"`{name}` is not read: models see text alone" for name in UNREAD if _holds(row, name))
            whole, start = _hashes(item)
            report.repeated += whole in seen
            seen.add(whole)
            report.begun.add(start)
        report.kept, report.sha256 = len(items), digest.hexdigest()
        # after the rows, which may have had to set a chat template
        encoder = self.encoder
        report.audit = token_audit(encoder.tokenizer, vocab_size=encoder.vocab_size, stop_ids=encoder.stop_ids)
        report.refusal = self._refusal()
        if report.refusal and self._bad_rows != "audit":
            raise UserError(report.refusal)
        return items, report

    def _leave_out(self, error: BadRow, where: str) -> None:
        if error.reason not in (TOO_LONG, SAME_WHEN_CUT, LONG_PROMPT):
            if self._bad_rows == "error":
                raise UserError(f"{where}: {error} {HOW_TO_GO_ON}") from None
            self.report.problems.append(Problem(where, error.column, error.reason, str(error)))
        self.report.dropped[error.reason] += 1

    def _note_length(self, i: int) -> None:
        """Keep where the first row stands that lost something."""
        if self._first_cut is None and self.report.shortened:
            self._first_cut = self.rows.where(i).removeprefix(f"{self.report.source}, ")

    def _refusal(self) -> str | None:
        report = self.report
        share = report.shortened / report.rows
        if share > self._allowed:
            return (
                f"{report.source}: {report.shortened} of {report.rows} rows ({share:.1%}) are longer than {self._limit} "
                f"{report.max_length} (first {self._first_cut}; the longest has {report.longest} tokens), more than the {self._allowed:.1%} that may "
                f"be cut or dropped. Raise {self._limit}, or set allow_truncation: true."
            )
        return None if report.kept else f"{report.source}: no row is left. Dropped: {dict(report.dropped)}."


def _holds(row: dict, name: str) -> bool:
    """Whether a row has media or tools in a column; a string there is a name of something else."""
    return isinstance(row.get(name), (list, dict, bytes)) and bool(row[name])


def _hashes(item: Item) -> tuple[int, int]:
    """Of all tokens of a row, and of those before the first trained one (of a text: of all)."""
    if isinstance(item, Prompt):
        whole = start = tuple(item.input_ids)
    else:
        first, *others = examples_of(item)
        whole = (*first.input_ids, -1, *(i for e in others for i in (*e.input_ids, -1)))
        if isinstance(item, Labelled):
            whole = (*whole, item.label)
        trained = first.response_mask.index(True)
        start = tuple(first.input_ids[:trained] if trained > 1 else first.input_ids)
    return hash(whole), hash(start)


def examples_of(item: Item) -> list[Example]:
    """The sequences of a row: one, of a preference one for each response; of a prompt none."""
    if isinstance(item, Preference):
        return item.responses
    return [item] if isinstance(item, Example) else [item.example] if isinstance(item, Labelled) else []
