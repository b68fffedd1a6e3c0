"""What an algorithm says, and what follows from it alone: records, their sizes, their losses, which of them meet the model
together. :class:`~.trainer.Trainer` runs it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from rlhf_fast.data.batch import Example, TokenBatch, packed_length
from rlhf_fast.data.packing import fullest, micro_batches_of_bundles
from rlhf_fast.data.prepare import Report
from rlhf_fast.kernels import sequence_logprobs
from rlhf_fast.models import Policy
from rlhf_fast.run.metrics import MetricsLog

from .config import TrainerConfig


@dataclass
class Window:
    """Sizes of one optimizer step's data, summed over all ranks: the denominators of its losses."""

    records: float
    tokens: float
    chosen_tokens: float = 1.0  # of preferred responses


class Algorithm:
    """An algorithm gives ``tokenize``, ``examples``, ``size`` and ``losses``, ``collect`` if it samples, and what else
    of the following differs from the default.
    """

    config_class: ClassVar[type[TrainerConfig]] = TrainerConfig
    method: ClassVar[str] = "sft"  # as the memory plan calls it
    headline: ClassVar[tuple[str, ...]] = ("loss",)
    best_metric: ClassVar[str] = "loss"  # which evaluation is the best, where the config does not say
    role: ClassVar[str] = "policy"
    learning_rates: ClassVar[tuple[float, float]] = (1e-5, 1e-4)  # full fine-tuning, LoRA
    keep_dropout: ClassVar[bool] = False
    record_class: ClassVar[type | None] = None  # of records that a checkpoint must hold, because they were sampled

    # the trainer's, which an algorithm reads
    args: TrainerConfig
    policy: Policy
    train_records: Sequence[Any]
    micro_batch_tokens: int | None
    step: int
    total_steps: int

    @classmethod
    def extra_arguments(cls, config) -> dict[str, Any]:
        """Constructor arguments besides model and data that ``config`` names."""
        return {}

    def add_roles(self) -> None:
        """Add critic, reference, heads to ``self.policy``."""

    @classmethod
    def tokenize(cls, records: Any, tokenizer: Any, args: Any, **options: Any) -> tuple[list[Any], Report]:
        """Raw records -> tokenized ones, and what became of each row: what ``rlhf-fast check`` shows.

        Args:
            options: of :mod:`rlhf_fast.data.prepare`.
        """
        raise NotImplementedError

    def arrange(self, rows: list[Any]) -> Sequence[Any]:
        """Tokenized rows -> the records that windows are drawn from."""
        return rows

    def complete_data(self, records: Sequence[Any]) -> Sequence[Any]:
        """Tokenized records -> the same with what only passes through the model say, whose size is settled by now."""
        return records

    def collect(self, records: list[Any]) -> list[Any]:
        """This rank's rows of a round -> what is learned from."""
        return records

    @property
    def windows_per_round(self) -> int:
        """Optimizer steps that one round feeds, before repeats."""
        return 1

    @property
    def repeats(self) -> int:
        """How often each record of a round is learned from."""
        return 1

    @property
    def rows_per_window(self) -> int:
        """Rows of the data set behind one window of one rank."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps

    def make_plan(self, count: int) -> list[list[int]]:
        """``windows_per_round * repeats`` windows over ``count`` records, each a list of indices, none empty."""
        return [list(range(count)) for _ in range(self.repeats)]

    def size(self, record: Any) -> int:
        """Response tokens in a record."""
        raise NotImplementedError

    def examples(self, record: Any) -> list[Example]:
        """The sequences of a record, as the model reads them."""
        raise NotImplementedError

    def tokens(self, records: list[Any]) -> int:
        """Tokens that a micro-batch of ``records`` holds, prompts that they share once."""
        return packed_length([e for record in records for e in self.examples(record)], self.args.shared_prefix)

    def bundles(self, records: list[Any]) -> list[list[int]]:
        """Which of ``records`` are better off in one micro-batch, as indices; each exactly once."""
        return [[i] for i in range(len(records))]

    def losses(self, records: list[Any], window: Window) -> Iterator[tuple[Tensor, dict[str, Tensor | float], float]]:
        """Yield (loss, metrics, weight of the metrics) for one micro-batch.

        Each loss is backpropagated before the next is computed, so that one adapter's graph is gone before another
        adapter is switched on.
        """
        raise NotImplementedError

    def pack(self, examples: list[Example]) -> TokenBatch:
        """``examples`` in one row on the device, as every pass of this run lays them out."""
        return TokenBatch.pack(examples, self.policy.device, shared_prefix=self.args.shared_prefix)

    def response_sums(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """Log-probabilities (B,) of whole responses, of those of their tokens (N,)."""
        return sequence_logprobs(logprobs, batch.response_mask, cu_seqlens=batch.cu_seqlens)

    # ---- sizes

    def counts(self, records: list[Any]) -> tuple[float, ...]:
        """What losses are divided by, in the order of :class:`Window`."""
        return len(records), sum(map(self.size, records))

    def own_window(self, records: list[Any]) -> Window:
        """The window of ``records`` alone, whatever other ranks have."""
        return Window(*(count or 1.0 for count in self.counts(records)))

    def split(self, records: list[Any]) -> list[list[int]]:
        """Which records meet the model together, as indices, the most tokens first; a function of ``records`` alone.

        Bundles are packed up to ``micro_batch_tokens`` tokens, or up to ``per_device_train_batch_size`` records where there
        is no such limit; one that is larger is cut into parts that are not, and a record larger than that is alone.
        """
        bundles = self.bundles(records)
        if self.micro_batch_tokens is None:
            return micro_batches_of_bundles(bundles, len, self.args.per_device_train_batch_size)
        return micro_batches_of_bundles(
            bundles, lambda part: self.tokens([records[i] for i in part]), self.micro_batch_tokens
        )

    def micro_batches(self, records: list[Any]) -> list[list[Any]]:
        """``records`` in the parts of :meth:`split`."""
        return [[records[i] for i in part] for part in self.split(records)]

    # ---- for the memory plan

    def models(self) -> list[nn.Module]:
        """Every model that the run holds in memory."""
        return [self.policy]

    def sizes(self) -> dict[str, Any]:
        """The run's sizes for the memory plan: tokens of the longest sequence, of the largest record, micro-batch, window."""
        a, tokens = self.args, sorted(self._record_tokens * self._epochs_per_window, reverse=True)
        return {
            "length": max(len(e) for r in self.train_records for e in self.examples(r)),
            "record_tokens": tokens[0],
            "micro_batch_tokens": self.micro_batch_tokens or sum(tokens[: a.per_device_train_batch_size]),
            "window_tokens": sum(tokens[: a.per_device_train_batch_size * a.gradient_accumulation_steps]),
        }

    @property
    def largest_step(self) -> int:
        """A step that computes all that any step does: one that logs."""
        return max(self.step, min(self.args.logging_steps, self.total_steps) - 1)

    def largest(self) -> list[Any]:
        """The records of the largest micro-batch that can come, as ``collect`` takes them, or gives them if it samples."""
        sizes = self._record_tokens * self._epochs_per_window
        if self.micro_batch_tokens is None:
            order = sorted(range(len(sizes)), key=lambda i: -sizes[i])[: self.args.per_device_train_batch_size]
        else:
            order = fullest(sizes, min(self.micro_batch_tokens, self.sizes()["window_tokens"]))
        return [self.train_records[i % len(self.train_records)] for i in order]

    @functools.cached_property
    def _record_tokens(self) -> list[int]:
        """Of each training record by itself; counted once, as there may be millions."""
        return [self.tokens([record]) for record in self.train_records]

    @property
    def _epochs_per_window(self) -> int:
        """How often a record may come in one window: more than once where that is longer than an epoch."""
        window = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return -(-window // len(self.train_records))

    # ---- steps and checkpoints

    def own_callbacks(self) -> list[Any]:
        """Callbacks that the algorithm brings itself."""
        return []

    def inspect(self, figures: dict[str, float]) -> None:
        """Called before every optimizer step with what the losses of all ranks noted in ``watched``, summed.

        Raises:
            StepRefused: the step must not be taken.
        """

    def after_step(self) -> None:
        """Called after every optimizer step."""

    def after_log(self, figures: dict[str, float]) -> None:
        """Called with the figures of every log line."""

    def after_evaluation(self, log: MetricsLog) -> None:
        """Called after every evaluation of a run, whose figures are in ``log`` by then."""

    def extra_state(self) -> dict[str, Any]:
        """What resuming needs beyond the loop's own."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`extra_state` gave."""

    def restore_record(self, fields: dict[str, Any]) -> Any:
        """A sampled record from its checkpointed fields."""
        raise NotImplementedError
