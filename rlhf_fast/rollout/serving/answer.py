"""What a call is answered with, in the dialect of OpenAI's completions and chat API with vLLM's additions: samples to JSON.

Looked up in vLLM's response schema: ``token_ids``, ``prompt_token_ids`` and ``stop_reason`` of a choice are its additions.
As there, ``token_ids`` holds every sampled token, stop strings and EOS included, and ``text`` ends before them. Here
log-probabilities are always those of the whole vocabulary at the sampling temperature (with no filters what vLLM calls
``processed_logprobs``), and alternatives to the sampled token are not computed: ``top_logprobs`` is null.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_fast.rollout.engine import Request, Sample

from .protocol import Call


@dataclass
class TextStream:
    """The text of one sample while its tokens come in: no half characters, nothing of a stop string that is cut later."""

    tokenizer: Any
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_reason: str | None = None  # the stop string that ended the sample
    _ids: list[int] = field(default_factory=list)
    _text: str = ""
    _sent: int = 0  # characters handed out
    _seen: int = 0  # tokens whose text is in _text
    _context: int = 0  # first token decoded along, as the text of a token depends on its neighbour

    def push(self, ids: Sequence[int], finish_reason: str | None = None) -> str:
        """The text that is certain after ``ids``; all that is left once there is a ``finish_reason``."""
        self._ids.extend(ids)
        self._decode(final=finish_reason is not None)
        end = len(self._text) - self._held_back()
        if finish_reason is not None:
            end = self._end(finish_reason)
        new, self._sent = self._text[self._sent : end], max(self._sent, end)
        return new

    def _decode(self, final: bool) -> None:
        before = self._plain(self._ids[self._context : self._seen])
        after = self._plain(self._ids[self._context :])
        if after.endswith("\ufffd") and not final:
            return
        self._text += after[len(before) :]
        self._context, self._seen = self._seen, len(self._ids)

    def _plain(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        lengths = (size for s in self.stop for size in range(1, len(s) + 1) if self._text.endswith(s[:size]))
        return max(lengths, default=0)

    def _end(self, finish_reason: str) -> int:
        found = [(at, s) for s in self.stop if finish_reason == "stop" and (at := self._text.find(s)) >= 0]
        if not found:
            return len(self._text)
        at, self.stop_reason = min(found)
        return at + len(self.stop_reason) * self.include_stop


def model_card(name: str, root: str, parent: str | None) -> dict[str, Any]:
    """An entry of ``/v1/models``; an adapter's parent is the model it belongs to."""
    return {"id": name, "object": "model", "owned_by": "rlhf_fast", "root": root, "parent": parent}


def usage(call: Call, new_tokens: int) -> dict[str, int]:
    prompt = sum(len(r.prompt_ids) for r in call.requests)
    return {"prompt_tokens": prompt, "completion_tokens": new_tokens, "total_tokens": prompt + new_tokens}


@dataclass(frozen=True)
class Answer:
    """What all parts of one answer have in common."""

    id: str
    created: int
    model: str
    call: Call
    tokenizer: Any

    def whole(self, groups: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        """The answer in one piece; groups[i] are the samples of request i."""
        choices = []
        for request, samples in zip(self.call.requests, groups):
            for sample in samples:
                text = self.text_stream(request)
                written = text.push(sample.ids, sample.finish_reason)
                choice = self._choice(len(choices), request, sample, written, whole=True)
                choices.append({**choice, "stop_reason": text.stop_reason})
        tokens = sum(len(s.ids) for samples in groups for s in samples)
        kind = "chat.completion" if self.call.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": usage(self.call, tokens)}

    def chunk(self, index: int, request: Request, part: Sample, text: TextStream, first: bool) -> dict[str, Any]:
        """One server-sent event: the tokens of ``part`` are new; its finish_reason is "" while more may come."""
        written = text.push(part.ids, part.finish_reason or None)
        choice = self._choice(index, request, part, written, whole=False, first=first)
        if part.finish_reason:
            choice["stop_reason"] = text.stop_reason
        return {**self._head("chat.completion.chunk" if self.call.chat else "text_completion"), "choices": [choice]}

    def usage_chunk(self, new_tokens: int) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.call.chat else "text_completion"
        return {**self._head(kind), "choices": [], "usage": usage(self.call, new_tokens)}

    def text_stream(self, request: Request) -> TextStream:
        return TextStream(self.tokenizer, request.stop, self.call.include_stop)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(
        self, index: int, request: Request, part: Sample, written: str, *, whole: bool, first: bool = True
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": part.finish_reason or None, "logprobs": None}
        if not self.call.chat:
            choice["text"] = written
        elif whole:
            choice["message"] = {"role": "assistant", "content": written}
        else:
            choice["delta"] = {"role": "assistant", "content": written} if first else {"content": written}
        if self.call.logprobs:
            choice["logprobs"] = self._chat_logprobs(part) if self.call.chat else self._logprobs(part)
        if self.call.token_ids:
            choice["token_ids"] = part.ids
            choice["prompt_token_ids"] = list(request.prompt_ids) if first else None
        return choice

    def _logprobs(self, part: Sample) -> dict[str, Any]:
        tokens = [self.tokenizer.decode([t]) for t in part.ids]
        offsets = list(itertools.accumulate(map(len, tokens[:-1]), initial=0))
        return {"tokens": tokens, "token_logprobs": part.logprobs, "top_logprobs": None, "text_offset": offsets}

    def _chat_logprobs(self, part: Sample) -> dict[str, Any]:
        rows = []
        for token, logprob in zip(part.ids, part.logprobs):
            text = self.tokenizer.decode([token])
            rows.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
        return {"content": rows}
