"""From strings and messages to token ids with a mask of what is trained.

Two rules hold everywhere. A sequence is tokenized as a whole and its response begins where it stops agreeing with the
prompt alone, the ids a rollout begins with. And it ends with a trained stop token, the last token a rollout would produce:
nothing that a template writes after it (ChatML's newline) is kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.data.batch import Example
from rlhf_fast.data.sources import BadRow, brief
from rlhf_fast.errors import UserError

Messages = list[dict]

# the markers tell which tokens the assistant wrote; loaders that do not know them would fail, transformers >= 4.42 does
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# needs no token that the vocabulary may lack
PLAIN = (
    "{%- if bos_token %}{{- bos_token }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{- 'Assistant:' }}{%- generation %}{{- ' ' + message['content'] + eos_token }}{%- endgeneration %}{{- '\\n\\n' }}"
    "{%- elif message['role'] in ('system', 'developer') %}{{- message['content'] + '\\n\\n' }}"
    "{%- else %}{{- message['role'] | capitalize + ': ' + message['content'] + '\\n\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"
)
BUILT_IN = {"chatml": CHATML, "plain": PLAIN}

NO_TEMPLATE = "the tokenizer has no chat template: the plain one ('User: ...\\n\\nAssistant: ...') is set on it"
MOVED_BOUNDARY = "the prompt alone is no prefix of prompt and response: the response is taken from where they part"
NO_STOP = "the chat template ends an answer without a stop token: the eos token is appended"
STOP_WITHIN = "the text itself holds a stop token: generation would end there"
DOUBLE_BOS = "the text begins with a second BOS: one is removed"


def encode_prompt(prompt: str | Messages, tokenizer: Any, **options: Any) -> list[int]:
    """The ids a response continues: a string with the tokenizer's BOS, messages with the generation prompt. (P,)"""
    return Encoder(tokenizer, **options).prompt(prompt)


def encode_prompt_completion(
    prompt: str | Messages, completion: str | Messages, tokenizer: Any, *, completion_only: bool = True, **options: Any
) -> Example:
    """Prompt and completion as one sequence. ``options`` are :class:`Encoder`'s. See :meth:`Encoder.prompt_completion`."""
    return Encoder(tokenizer, **options).prompt_completion(prompt, completion, completion_only)


def encode_messages(messages: Messages, tokenizer: Any, *, assistant_only: bool = True, **options: Any) -> Example:
    """A conversation as one sequence. ``options`` are :class:`Encoder`'s. See :meth:`Encoder.messages`."""
    return Encoder(tokenizer, **options).messages(messages, assistant_only)


def encode_text(text: str, tokenizer: Any, **options: Any) -> Example:
    """Running text and a stop token, all trained. ``options`` are :class:`Encoder`'s."""
    return Encoder(tokenizer, **options).text(text)


def common_prefix_length(a: Sequence, b: Sequence) -> int:
    """How many first elements two sequences share."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def truncate(example: Example, max_length: int | None) -> Example | None:
    """The first ``max_length`` tokens; None when none of them is trained."""
    if max_length is None or len(example) <= max_length:
        return example
    mask = example.response_mask[:max_length]
    return Example(example.input_ids[:max_length], mask, example.weight) if any(mask) else None


def set_chat_template(tokenizer: Any, template: str) -> None:
    """Give ``tokenizer`` a chat template: ``chatml``, ``plain``, the path of a Jinja file, or Jinja text.

    Raises:
        UserError: no such file or name, or ``chatml`` where the vocabulary lacks its two tokens.
    """
    if template == "chatml":
        missing = [t for t in ("<|im_start|>", "<|im_end|>") if t not in tokenizer.get_vocab()]
        if missing:
            raise UserError(
                f"The chatml template needs {' and '.join(missing)} in the vocabulary. Use 'plain' instead."
            )
    text = BUILT_IN.get(template)
    if text is None and "{" in template:
        text = template
    if text is None:
        if not Path(template).is_file():
            raise UserError(f"No chat template {template!r}: give {', '.join(BUILT_IN)}, a Jinja file or Jinja text.")
        text = Path(template).read_text(encoding="utf-8")
    tokenizer.chat_template = text


class Encoder:
    """Encodes many rows with one tokenizer; ``notes`` counts what it had to put right.

    Args:
        tokenizer: a transformers tokenizer.
        stop_ids: the ids that end a generation, ``generation_config.eos_token_id`` (one or several); default the
            tokenizer's eos token.
        chat_template_kwargs: variables for the chat template, for example ``{"enable_thinking": False}``.
        vocab_size: rows of the model's embedding; an id beyond them is refused here instead of failing on the device.
    Raises:
        UserError: neither an eos token nor ``stop_ids``: nothing could ever end a response.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: int | Iterable[int] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        vocab_size: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.stop_ids = _stop_list(tokenizer, stop_ids)
        self.eos_id = tokenizer.eos_token_id if tokenizer.eos_token_id in self.stop_ids else self.stop_ids[0]
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.vocab_size = vocab_size
        self._stop_texts = [t for t in tokenizer.convert_ids_to_tokens(self.stop_ids) if t]
        self.notes: Counter[str] = Counter()
        self._last_prompt: tuple[Any, list[int]] = (None, [])  # the responses of a preference share theirs

    # ------------------------------------------------------------------------------------------------ public forms

    def text(self, text: str) -> Example:
        """Running text and a stop token; every token after the first is trained."""
        self._look_within(text)
        ids = self._ended(self._plain(text))
        return self._example(ids, [True] * len(ids))

    def prompt(self, prompt: str | Messages) -> list[int]:
        """The ids a response continues. (P,)"""
        if prompt is not self._last_prompt[0]:
            ids = self._plain(prompt) if isinstance(prompt, str) else self._chat(prompt, add_generation_prompt=True)[0]
            if not ids:
                raise BadRow("empty prompt", f"`prompt` has no tokens: {brief(prompt)}.")
            self._check_range(ids)
            self._last_prompt = (prompt, ids)
        return list(self._last_prompt[1])

    def prompt_completion(
        self, prompt: str | Messages, completion: str | Messages, completion_only: bool = True
    ) -> Example:
        """Prompt and completion as one sequence, the completion trained (all of it when not ``completion_only``).

        Of a completion that is a conversation itself only the assistant's messages are trained.
        """
        prompt_ids = self.prompt(prompt)
        self._look_within(completion)
        if isinstance(prompt, str):
            ids = self._ended(self._plain(prompt + completion))
            start = self._boundary(prompt_ids, ids)
        elif len(completion) > 1 and completion_only:
            return self.messages([*prompt, *completion], first=len(prompt))
        else:
            ids = self._chat([*prompt, *completion])[0]
            start = self._boundary(prompt_ids, ids)
            ids = self._cut_after_stop(ids, start)
        start = start if completion_only else 0
        return self._example(ids, [i >= start for i in range(len(ids))])

    def messages(self, messages: Messages, assistant_only: bool = True, first: int = 0) -> Example:
        """A conversation as one sequence; the assistant's messages from message ``first`` on are trained.

        They are known from the template's ``{% generation %}`` markers or, where it has none, by rendering the conversation
        up to each of them. The stop token after each is trained.

        Raises:
            BadRow: not one assistant token was found.
        """
        self._look_within(messages[first:])
        if not assistant_only:
            ids = self._cut_after_stop(self._chat(messages)[0], 0)
            return self._example(ids, [True] * len(ids))
        if self._has_markers():
            ids, mask = self._chat(messages, return_assistant_tokens_mask=True)
        else:
            ids, mask = self._mask_by_message(messages)
        if first:
            start = self._boundary(self._chat(messages[:first], add_generation_prompt=True)[0], ids)
            mask = [m and i >= start for i, m in enumerate(mask)]
        if not any(mask):
            raise BadRow(
                "no assistant tokens",
                f"the chat template marks not one token as the assistant's. The last of `messages`: {brief(messages[-1])}.",
            )
        mask = self._train_stops(ids, mask)
        end = max(i for i, m in enumerate(mask) if m) + 1
        ids, mask = ids[:end], mask[:end]
        if ids[-1] not in self.stop_ids:
            self.notes[NO_STOP] += 1
            ids, mask = [*ids, self.eos_id], [*mask, True]
        return self._example(ids, mask)

    # ------------------------------------------------------------------------------------------------------- steps

    def _plain(self, text: str) -> list[int]:
        """Ids with the tokenizer's BOS but without the EOS that some tokenizers add."""
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        if ids and ids[-1] == self.tokenizer.eos_token_id and not text.endswith(self.tokenizer.eos_token):
            ids.pop()
        return self._one_bos(ids)

    def _one_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            self.notes[DOUBLE_BOS] += 1
            return ids[1:]
        return ids

    def _chat(self, messages: Messages, **options: Any) -> tuple[list[int], list[bool]]:
        """Ids and, if asked for, the mask of the template's generation markers."""
        if not self.tokenizer.chat_template:
            set_chat_template(self.tokenizer, "plain")
            self.notes[NO_TEMPLATE] += 1
        try:
            # return_dict=True by name: its default changed between versions of transformers
            out = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, **options, **self.chat_template_kwargs
            )
        except Exception as error:
            # jinja2 belongs to the tokenizer, not to this layer: known by where it comes from
            if not type(error).__module__.startswith("jinja2"):
                raise
            raise BadRow(
                "refused by template",
                f"the chat template refuses these messages: {error}. The last of `messages`: {brief(messages[-1])}.",
            ) from None
        ids = self._one_bos(list(out["input_ids"]))
        mask = [bool(m) for m in out.get("assistant_masks", [])]
        return ids, mask[len(mask) - len(ids) :] if mask else []

    def _has_markers(self) -> bool:
        if not getattr(self.tokenizer, "is_fast", False):  # the markers are characters; only fast tokenizers map them
            return False
        template = self.tokenizer.chat_template or PLAIN
        template = template if isinstance(template, str) else self.tokenizer.get_chat_template()
        return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    def _mask_by_message(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Each assistant message lies between the rendering before it and the rendering that ends with it."""
        ids = self._chat(messages)[0]
        mask = [False] * len(ids)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._boundary(self._chat(messages[:i], add_generation_prompt=True)[0] if i else [], ids)
            upto = self._chat(messages[: i + 1])[0]
            end = common_prefix_length(upto, ids)
            stops = [t for t in range(start, len(ids)) if ids[t] in self.stop_ids]
            if end == len(upto):
                end = max([t + 1 for t in stops if t < end], default=end)
            elif stops:
                # templates that shorten earlier turns (reasoning dropped) render a last turn differently
                end = stops[0] + 1
            else:
                raise BadRow(
                    "unclear turns", "the chat template renders earlier turns anew; give it {% generation %} markers."
                )
            mask[start:end] = [True] * (end - start)
        return ids, mask

    def _train_stops(self, ids: list[int], mask: list[bool]) -> list[bool]:
        """Markers often stop short of the stop token: without it a model never learns to end."""
        ends = [i for i in range(1, len(ids)) if mask[i - 1] and not mask[i] and ids[i] in self.stop_ids]
        mask = list(mask)
        for i in ends:
            mask[i] = ids[i - 1] not in self.stop_ids
        return mask

    def _boundary(self, prompt_ids: list[int], ids: list[int]) -> int:
        start = common_prefix_length(prompt_ids, ids)
        if start < len(prompt_ids):
            self.notes[MOVED_BOUNDARY] += 1
        return start

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] in self.stop_ids else [*ids, self.eos_id]

    def _cut_after_stop(self, ids: list[int], start: int) -> list[int]:
        """Up to the last stop token from ``start`` on; with an eos token where the template writes none."""
        last = max((i for i in range(start, len(ids)) if ids[i] in self.stop_ids), default=None)
        if last is not None:
            return ids[: last + 1]
        self.notes[NO_STOP] += 1
        return [*ids, self.eos_id]

    def _check_range(self, ids: list[int]) -> None:
        if self.vocab_size is not None and ids and max(ids) >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"The token {token!r} has the id {max(ids)}, but the model embeds only {self.vocab_size} ids: "
                "the tokenizer belongs to another model, or the embedding was not resized."
            )

    def _example(self, ids: list[int], mask: list[bool]) -> Example:
        self._check_range(ids)
        if mask:
            mask[0] = False  # nothing precedes it, so nothing predicts it
        return Example(ids, mask)

    def _look_within(self, said: str | Messages) -> None:
        """Note a stop token that somebody wrote into what is learned: ``<|im_end|>`` in an answer is one to the tokenizer."""
        texts = [said] if isinstance(said, str) else [m.get("content") for m in said if m["role"] == "assistant"]
        if any(stop in (text or "").rstrip().removesuffix(stop) for stop in self._stop_texts for text in texts):
            self.notes[STOP_WITHIN] += 1


def _stop_list(tokenizer: Any, stop_ids: int | Iterable[int] | None) -> list[int]:
    stops = [stop_ids] if isinstance(stop_ids, int) else list(stop_ids or ())
    if not stops and tokenizer.eos_token_id is not None:
        stops = [tokenizer.eos_token_id]
    if not stops:
        raise UserError(
            "The tokenizer has no eos token, so no response could ever end. Set one, for example "
            "tokenizer.eos_token = '<|endoftext|>', and save the tokenizer with the model."
        )
    return stops


# -------------------------------------------------------------------------------------------------------- token audit


def token_audit(
    tokenizer: Any, *, vocab_size: int | None = None, stop_ids: int | Iterable[int] | None = None
) -> list[str]:
    """What a person should know about a tokenizer before a run: a summary line, then one line for each finding.

    Args:
        vocab_size: rows of the model's embedding, if known.
        stop_ids: ``generation_config.eos_token_id``, if known.
    Raises:
        UserError: there is no eos token.
    """
    encoder = Encoder(tokenizer, stop_ids)
    size = len(tokenizer)
    findings = []
    if vocab_size is not None and size > vocab_size:
        findings.append(
            f"the tokenizer has {size} tokens but the model embeds only {vocab_size}: an id from {vocab_size} on stops the run"
        )
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in encoder.stop_ids:
        findings.append(
            f"the eos token {tokenizer.eos_token!r} ({tokenizer.eos_token_id}) is not among the model's stop ids "
            f"{sorted(encoder.stop_ids)}: responses are trained to end with {_show(tokenizer, encoder.eos_id)}"
        )
    plain = list(tokenizer("a", verbose=False)["input_ids"])
    if tokenizer.bos_token_id is not None and plain[:2] == [tokenizer.bos_token_id] * 2:
        findings.append(f"the tokenizer writes {tokenizer.bos_token!r} twice: one is removed")
    if tokenizer.chat_template:
        findings += _audit_template(tokenizer, encoder, plain)
    return [_summary(tokenizer, encoder), *findings]


def _summary(tokenizer: Any, encoder: Encoder) -> str:
    eos = ", ".join(_show(tokenizer, i) for i in sorted(encoder.stop_ids))
    pad = "none (not needed: batches are packed)"
    if tokenizer.pad_token_id is not None:
        pad = _show(tokenizer, tokenizer.pad_token_id)
        pad += " = eos (harmless: masks come from lengths)" if tokenizer.pad_token_id in encoder.stop_ids else ""
    bos = _show(tokenizer, tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else "none"
    chat = "no chat template"
    if tokenizer.chat_template:
        chat = "chat template with" + ("" if encoder._has_markers() else "out") + " assistant markers"
    return f"tokens: vocabulary {len(tokenizer)}, stop {eos}, pad {pad}, bos {bos}, {chat}"


def _audit_template(tokenizer: Any, encoder: Encoder, plain: list[int]) -> list[str]:
    findings = []
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    try:
        raw = list(tokenizer.apply_chat_template([user], tokenize=True, return_dict=True)["input_ids"])
        prompt = encoder._chat([user], add_generation_prompt=True)[0]
        whole = encoder._chat([user, assistant])[0]
    except BadRow as error:
        return [f"a plain exchange of user and assistant fails: {error}"]
    bos = tokenizer.bos_token_id
    if bos is not None and raw[:2] == [bos, bos]:
        findings.append(f"the chat template writes {tokenizer.bos_token!r} twice: one is removed")
    elif bos is not None and (raw[:1] == [bos]) != (plain[:1] == [bos]):
        there, not_there = ("chats", "plain text") if raw[:1] == [bos] else ("plain text", "chats")
        findings.append(f"{tokenizer.bos_token!r} begins {there} but not {not_there}: do not mix the two kinds of rows")
    if prompt == encoder._one_bos(raw):
        findings.append("the chat template ignores add_generation_prompt: a response must produce its own role header")
    start = common_prefix_length(prompt, whole)
    if start < len(prompt):
        findings.append(MOVED_BOUNDARY)
    if not any(i in encoder.stop_ids for i in whole[start:]):
        end = tokenizer.decode(whole[start:])
        findings.append(
            f"the chat template ends an answer with {end[end.find('b') + 1 :]!r}, which is no stop token: "
            f"{_show(tokenizer, encoder.eos_id)} is appended; if generation should end there, make it the eos token"
        )
    return findings


def _show(tokenizer: Any, token_id: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens(token_id)!r} ({token_id})"
