"""The default rollout engine: continuous batching in this process, on the weights that are being trained."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.rollout.budget import default_budget, merging_fits, out_of_memory
from rlhf_fast.rollout.engine import Request, Sample
from rlhf_fast.rollout.generate import GenerateEngine, context_length, end_of_sequence_ids
from rlhf_fast.rollout.graphs import KeptGraphs
from rlhf_fast.rollout.sampling import draw_seed
from rlhf_fast.rollout.session import Session
from rlhf_fast.rollout.slot_cache import ATTENTION, Decode, Pack, SlotCache

logger = logging.getLogger(__name__)
PREFILL_TOKENS = 4096  # prompt tokens between two steps, unless another number is given


# model -> role -> what the trial of the slots found: architectures do not change
_TRIED: weakref.WeakKeyDictionary[Any, dict[str, str | None]] = weakref.WeakKeyDictionary()


def engine_for(
    policy: Any,
    tokenizer: Any = None,
    *,
    role: str = "policy",
    slots: int = 128,
    max_tokens: int | None = None,
    merge_lora: bool | None = False,
    progress: Callable[[int], None] | None = None,
    longest: int | None = None,
) -> SlotEngine | GenerateEngine:
    """The slot engine where ``policy``'s architecture can use it; else ``transformers.generate``, and one line says why.

    Args are those of :class:`SlotEngine`; of ``GenerateEngine`` ``slots`` is the batch size, and it never merges LoRA.
    ``longest`` is the most tokens of a prompt and its continuation, if that is known: see :func:`slot_refusal`.
    """
    reason = slot_refusal(policy, role, longest)
    if reason is None:
        options = {"max_tokens": max_tokens, "merge_lora": merge_lora, "progress": progress}
        return SlotEngine(policy, tokenizer, role=role, slots=slots, **options)
    logger.warning("rollouts run through transformers.generate instead of the slot engine: %s", reason)
    return GenerateEngine(policy, tokenizer, role=role, max_batch_size=slots, progress=progress)


def slot_refusal(policy: Any, role: str = "policy", longest: int | None = None) -> str | None:
    """Why the slots cannot write with this model; None when they can, which four tokens have shown.

    Their logits are compared with those of transformers' own attention, once per model and role: architectures keep state and
    change attention in more ways than anyone could list. Positions that are scaled by the length of what is read (LongRoPE)
    four tokens cannot show; the slots, where the short and the long stand side by side, write no longer sequences with them.

    Args:
        longest: tokens of the longest sequence that will be asked for; None: as many as the model's context.
    Raises:
        RuntimeError: there is not enough memory for the trial.
    """
    context, steady = context_length(policy.model), steady_length(policy.model)
    if steady is not None and (longest or context or steady + 1) > steady:
        return f"its positions change for all sequences beside one of more than {steady:,} tokens"
    tried = _TRIED.setdefault(policy.model, {})
    if role not in tried:
        tried[role] = _trial(policy, role)
    return tried[role]


def steady_length(model: Any) -> int | None:
    """Most tokens of a sequence whose positions do not depend on how long it, or one beside it, gets; None: any number.

    transformers chooses LongRoPE's factors, and dynamic NTK's base, by the largest position of a whole pass.
    """
    config = model.config.get_text_config()
    context, found = context_length(model), []
    given = getattr(config, "rope_parameters", None) or {}
    for rope in [given, *(x for x in given.values() if isinstance(x, dict))]:  # of the model, or of each kind of layer
        kind = rope.get("rope_type", "")
        if kind == "longrope":
            found.append(rope.get("original_max_position_embeddings") or context or 1)
        elif "dynamic" in kind:
            found.append(context or 1)
    limit = min(found, default=None)
    return None if limit is None or (context is not None and limit >= context) else limit


def _trial(policy: Any, role: str) -> str | None:
    try:
        mine, theirs = _four_tokens(policy, role)
    # a model's own code and the launch of a kernel may raise anything
    except Exception as error:
        if out_of_memory(error):
            raise
        return (str(error).splitlines() or [type(error).__name__])[0]
    difference, norm = float((mine - theirs).norm()), float(theirs.norm())
    # NaN passes: a model that has diverged is no matter of architecture, and sampling says so in its own words
    if difference > 0.05 * norm:
        return f"its logits behind a few tokens differ from transformers' by {difference / norm:.0%}"
    return None


@torch.no_grad()
def _four_tokens(policy: Any, role: str) -> tuple[Tensor, Tensor]:
    """(V,) float32 logits behind four tokens: three prefilled and one decoded by the slots, and by transformers."""
    with policy.generation_model(role, ATTENTION) as model:
        size = model.get_input_embeddings().num_embeddings
        ids = torch.tensor([[(3 + 7 * i) % size for i in range(4)]], device=model.device)
        places = torch.arange(4, device=model.device)
        cache, pack = SlotCache(), Pack([3], model.device)
        cache.resize(1, 4)
        model(input_ids=ids[:, :3], position_ids=places[None, :3], use_cache=False, work=pack)
        cache.write(pack, places[:3], torch.zeros_like(places[:3]), places[:3])
        work = Decode(cache, places[3:], 4)
        mine = model(input_ids=ids[:, 3:], position_ids=places[None, 3:], use_cache=False, work=work).logits
    with policy.generation_model(role) as model:
        theirs = model(input_ids=ids, position_ids=places[None], use_cache=False).logits
    return mine[0, -1].float(), theirs[0, -1].float()


class SlotEngine:
    """Continue prompts with the policy itself, any number of requests over a fixed number of slots.

    A slot that becomes free takes the next sample at once. All samples of a prompt share one prefill, short prompts are
    prefilled side by side without padding, and long ones in chunks between the steps of the others. Samples are drawn as by
    ``GenerateEngine``, with the same random numbers: a seeded request gives the same tokens whatever the number of slots
    and whatever else is written, up to float rounding of the logits.

    Args:
        policy: gives ``generation_model(role, attention)``, a context manager with the Hugging Face model in eval mode and
            that attention in every layer.
        tokenizer: of the policy; needed for stop strings. None takes ``policy.tokenizer``.
        role: which weights of the policy write.
        slots: most samples written at once.
        max_tokens: most tokens whose keys and values are held, in the slots and of prompts that wait for one; fewer slots are
            used where samples may become too long for it. None: what the memory that is free when a session begins allows,
            see :mod:`rlhf_fast.rollout.budget`.
        prefill_tokens: most prompt tokens computed between two steps of the samples being written.
        merge_lora: write with the adapter merged into the base weights, which come back bit for bit when the session is
            closed. A token then costs one product a layer instead of three; the adapted weights are held twice meanwhile, and
            log-probabilities differ from training's by the rounding of the merged weights, which is nothing to speak of in
            float32 and some 1e-3 of each weight in bfloat16. None merges where that is cheap, see :func:`.budget.merging_fits`. A base in
            4 bit, variants of LoRA and layers with a shared weight are never merged; asked to, one line says so. Not run on a
            GPU so far.
        progress: called with the number of samples finished so far, whenever some have.
    """

    capabilities = frozenset({"token_ids", "logprobs", "seed", "n", "stop", "sleep"})

    def __init__(
        self,
        policy: Any,
        tokenizer: Any = None,
        *,
        role: str = "policy",
        slots: int = 128,
        max_tokens: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        merge_lora: bool | None = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        for name, value in (("slots", slots), ("max_tokens", max_tokens), ("prefill_tokens", prefill_tokens)):
            if value is not None and value < 1:
                raise UserError(f"generation: {name} must be at least 1, got {value}.")
        self.policy, self.role = policy, role
        self.tokenizer = policy.tokenizer if tokenizer is None else tokenizer
        self.slots, self.max_tokens, self.prefill_tokens = slots, max_tokens, prefill_tokens
        self.merge_lora, self.progress = merge_lora, progress
        self.version = 0
        self.cache, self.graphs = SlotCache(), KeptGraphs(slots)
        self._open = self._told = False

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Continue every request; entry i holds the ``n`` samples of request i.

        A prompt and its samples never exceed the model's context: what does not fit ends as "length".

        Raises:
            UserError: a prompt fills the model's context, or a sample would not fit into ``max_tokens``.
            RuntimeError: the model's logits are not finite.
        """
        requests = list(requests)
        seeds = [draw_seed() if r.seed is None else r.seed for r in requests]
        samples: list[list[Sample | None]] = [[None] * r.n for r in requests]
        done = 0
        with self.session() as session:
            # longest first: memory peaks at once, and neighbours in the slots are of similar length
            for i in sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids)):
                session.add(requests[i], key=i, seed=seeds[i])
            while not session.idle:
                finished = [w for w in session.step() if w.sample.finish_reason]
                for writing in finished:
                    samples[writing.key][writing.index] = writing.sample
                done += len(finished)
                if finished and self.progress:
                    self.progress(done)
        return samples

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A scheduler to drive by hand, see :mod:`rlhf_fast.rollout.session`; the model is as before once it is closed.

        Raises:
            RuntimeError: another one is open.
        """
        self._refuse_while_open("open a second session")
        self._open = True
        try:
            merging = self._merging()
            with self.policy.generation_model(self.role, ATTENTION, **merging) as model:
                yield Session(
                    model,
                    self.tokenizer,
                    self.cache,
                    self.graphs.of(model, self.cache, (self.role, merging.get("merge_lora", False))),
                    slots=self.slots,
                    max_tokens=self._capacity(),
                    prefill_tokens=self.prefill_tokens,
                    context=min((n for n in (context_length(model), steady_length(model)) if n), default=None),
                    eos_ids=end_of_sequence_ids(model, self.tokenizer),
                    version=self.version,
                )
        finally:
            self._open = False

    def _capacity(self) -> int | None:
        """Most tokens of this session."""
        if self.max_tokens is not None:
            return self.max_tokens
        budget = default_budget(self.policy, self.slots, self.prefill_tokens, self.cache.nbytes)
        if budget is not None and not self._told:
            logger.info("rollouts: %s", budget)
            self._told = True
        return None if budget is None else budget.tokens

    def _merging(self) -> dict[str, bool]:
        """What to ask of the policy for this session."""
        if self.merge_lora is False:
            return {}
        reason = self.policy.merge_refusal(self.role)
        if reason is None:
            return {"merge_lora": self.merge_lora or merging_fits(self.policy, self.role, self.max_tokens)}
        if self.merge_lora:
            logger.warning("rollouts run with the adapter beside the base, not merged: %s", reason)
            self.merge_lora = False  # said once
        return {}

    def update(self, adapter_dir: str | Path | None, version: int) -> None:
        """Note the version of the weights, which are the policy's own and need no copying."""
        self._refuse_while_open("change weights")
        if adapter_dir is not None:
            raise UserError(f"This engine writes with the policy's own weights and cannot load {adapter_dir}.")
        self.version = version

    def reset_cache(self) -> None:
        """Nothing to do: no keys or values outlive a session."""

    def sleep(self) -> None:
        """Give the memory of keys and values back. The next session makes it again."""
        self._refuse_while_open("sleep")
        self.graphs.clear()
        self.cache = SlotCache()
        if torch.cuda.is_initialized():  # what is cached is nobody else's
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Nothing to do."""

    def _refuse_while_open(self, action: str) -> None:
        if self._open:
            raise RuntimeError(f"cannot {action} while a session of this engine is open")
