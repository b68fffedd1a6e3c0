"""The default rollout engine: continuous batching in this process, on the weights that are being trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.rollout.engine import Request, Sample
from rlhf_fast.rollout.generate import GenerateEngine, context_length, end_of_sequence_ids
from rlhf_fast.rollout.sampling import draw_seed
from rlhf_fast.rollout.session import Session
from rlhf_fast.rollout.slot_cache import ATTENTION, Decode, Pack, SlotCache

logger = logging.getLogger(__name__)


def engine_for(
    policy: Any,
    tokenizer: Any = None,
    *,
    role: str = "policy",
    slots: int = 128,
    max_tokens: int | None = None,
    merge_lora: bool | None = False,
    progress: Callable[[int], None] | None = None,
) -> SlotEngine | GenerateEngine:
    """The slot engine where ``policy``'s architecture can use it; else ``transformers.generate``, and one line says why.

    Args are those of :class:`SlotEngine`; of ``GenerateEngine`` ``slots`` is the batch size, and it never merges LoRA.
    """
    reason = slot_refusal(policy, role)
    if reason is None:
        options = {"max_tokens": max_tokens, "merge_lora": merge_lora, "progress": progress}
        return SlotEngine(policy, tokenizer, role=role, slots=slots, **options)
    logger.warning("rollouts run through transformers.generate instead of the slot engine: %s", reason)
    return GenerateEngine(policy, tokenizer, role=role, max_batch_size=slots, progress=progress)


def slot_refusal(policy: Any, role: str = "policy") -> str | None:
    """Why the slots cannot write with this model; None when they can, which four tokens have shown.

    Their logits are compared with those of transformers' own attention: architectures keep state and change attention in
    more ways than anyone could list.
    """
    try:
        mine, theirs = _four_tokens(policy, role)
    except (UserError, RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
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


def merging_fits(policy: Any, role: str, max_tokens: int | None) -> bool:
    """Whether merging LoRA is cheap: on a GPU, with a 16-bit base whose adapted weights would fit twice more into the memory
    that the keys and values of ``max_tokens`` tokens leave free. No without ``max_tokens``, as these could take all of it.
    """
    model = policy.model
    if model.device.type != "cuda" or model.dtype.itemsize != 2 or max_tokens is None:
        return False
    free = torch.cuda.mem_get_info(model.device)[0]
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return 2 * policy.adapters.merged_bytes(role) <= free - max_tokens * _bytes_per_token(model)


def _bytes_per_token(model: Any) -> int:
    """Of keys and values in all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize


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
        max_tokens: most tokens whose keys and values the slots hold; fewer slots are used where samples may become too
            long for it. None sets no limit.
        prefill_tokens: most prompt tokens computed between two steps of the samples being written.
        merge_lora: write with the adapter merged into the base weights, which come back bit for bit when the session is
            closed. A token then costs one product a layer instead of three; the adapted weights are held twice meanwhile, and
            log-probabilities differ from training's by the rounding of the merged weights, which is nothing to speak of in
            float32 and some 1e-3 of each weight in bfloat16. None merges where that is cheap, see :func:`merging_fits`. A base in
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
        prefill_tokens: int = 4096,
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
        self.cache = SlotCache()
        self._open = False

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
            with self.policy.generation_model(self.role, ATTENTION, **self._merging()) as model:
                yield Session(
                    model,
                    self.tokenizer,
                    self.cache,
                    slots=self.slots,
                    max_tokens=self.max_tokens,
                    prefill_tokens=self.prefill_tokens,
                    context=context_length(model),
                    eos_ids=end_of_sequence_ids(model, self.tokenizer),
                    version=self.version,
                )
        finally:
            self._open = False

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
        self.cache = SlotCache()
        if torch.cuda.is_initialized():  # what is cached is nobody else's
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Nothing to do."""

    def _refuse_while_open(self, action: str) -> None:
        if self._open:
            raise RuntimeError(f"cannot {action} while a session of this engine is open")
