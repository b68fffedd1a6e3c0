"""What every trainer shares: the loop over rounds, windows and micro-batches; checkpoints; metrics.

A *round* turns some rows of the data set into records to learn from (``collect``: for offline algorithms the rows
themselves, for reinforcement learning sampled and scored responses). A *window* is what one optimizer step learns from.
It is split into micro-batches, by tokens or by records, whose losses are sums over one denominator, that of the whole
window on all ranks: any split of the window gives the same gradient.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from transformers import get_scheduler

from rlhf_fast.data.batch import Example, TokenBatch, packed_length
from rlhf_fast.data.packing import IndexSampler, fullest, micro_batches
from rlhf_fast.data.sources import load_records
from rlhf_fast.errors import RolloutError, UserError
from rlhf_fast.models import Policy, disable_dropout, load
from rlhf_fast.models.adapters import is_4bit, lora_config
from rlhf_fast.models.attention import check_implementation
from rlhf_fast.models.fingerprint import difference, fingerprint
from rlhf_fast.run.checkpoint import find_checkpoint, load_checkpoint, rng_state, save_checkpoint, set_rng_state
from rlhf_fast.run.config import save_config
from rlhf_fast.run.means import Means
from rlhf_fast.run.memory import Plan
from rlhf_fast.run.metrics import MetricsLog
from rlhf_fast.run.signals import StopSignals

from .config import TrainerConfig
from .memory import compare, device_bytes, plan_of, rehearse
from .optimizers import build_optimizer

logger = logging.getLogger(__name__)
MAX_SKIPPED_STEPS = 3


@dataclass
class Window:
    """Sizes of one optimizer step's data, summed over all ranks: the denominators of its losses."""

    records: float
    tokens: float


class Trainer:
    """Base of all trainers. An algorithm gives ``prepare_data``, ``collect`` if it samples, ``losses`` and ``evaluate``.

    Args:
        model: a Hugging Face name, a model or run folder, or a transformers model.
        args: the algorithm's config.
        train_dataset: records: a ``datasets.Dataset``, a list of dicts, or a path.
        eval_dataset: held-out records.
        processing_class: the tokenizer; found beside the model when None.
        peft_config: a LoRA configuration; from ``args`` when None.
    """

    config_class: ClassVar[type[TrainerConfig]] = TrainerConfig
    method: ClassVar[str] = "sft"  # as the memory plan calls it
    headline: ClassVar[tuple[str, ...]] = ("loss",)
    role: ClassVar[str] = "policy"
    learning_rates: ClassVar[tuple[float, float]] = (1e-5, 1e-4)  # full fine-tuning, LoRA
    keep_dropout: ClassVar[bool] = False
    record_class: ClassVar[type | None] = None  # of records that a checkpoint must hold, because they were sampled

    def __init__(
        self, model, args=None, train_dataset=None, eval_dataset=None, processing_class=None, peft_config=None
    ):
        self.args = args if args is not None else self.config_class()
        set_seed(self.args.seed)
        # precision is the policy's: accelerate holds one for the whole process, where SFT and PPO may follow each other.
        # buffers are constants; broadcasting them would make ranks with fewer micro-batches wait for ever
        self.accelerator = Accelerator(
            mixed_precision="no",
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
        )
        self.policy = self._load(model, processing_class, peft_config)
        self.tokenizer = self.policy.tokenizer
        self.add_roles()
        if not self.keep_dropout:
            if self.args.lora_dropout:
                raise UserError(
                    "lora_dropout must be 0 here: ratios and margins compare two passes; only SFT has dropout"
                )
            disable_dropout(self.policy)
        self.micro_batch_tokens = self.args.micro_batch_tokens  # until the memory plan settles it
        self._preparing = "train"  # the name of the data set in reports
        self.train_records = self.prepare_data(_records(train_dataset, "train_dataset"))
        self._preparing = "eval"
        self.eval_records = None if eval_dataset is None else self.prepare_data(_records(eval_dataset, "eval_dataset"))
        self.memory_plan = self._settle_memory()
        self._build_optimizer()
        self.step = 0
        self.sampler = IndexSampler(len(self.train_records), self.args.seed)
        self.records: Sequence[Any] = []  # of the current round
        self.plan: list[list[int]] = []  # windows of the current round still to come, as indices into records
        self.rows_drawn = 0  # by all ranks, since the start of the run
        self.first_row = 0  # where this rank's rows of the round lie in that count: seeds derive from it
        self._loss: Tensor | float = 0.0  # of the window, so far
        self._skipped = 0  # steps in a row without a finite gradient
        self.metrics = Means()
        self.times: dict[str, float] = defaultdict(float)

    @classmethod
    def from_config(cls, config: TrainerConfig) -> Trainer:
        """Build model and data sets from the names in ``config``."""
        for name, what in (("model_name_or_path", "the model to train"), ("dataset_name", "the training data")):
            if not getattr(config, name):
                raise UserError(f"{name} is missing: say {what}, e.g. --{name} PATH")
        evaluation = load_records(config.eval_dataset_name) if config.eval_dataset_name else None
        return cls(
            config.model_name_or_path,
            args=config,
            train_dataset=load_records(config.dataset_name),
            eval_dataset=evaluation,
            **cls.extra_arguments(config),
        )

    # ---- what an algorithm says

    @classmethod
    def extra_arguments(cls, config) -> dict[str, Any]:
        """Constructor arguments besides model and data that ``config`` names."""
        return {}

    def add_roles(self) -> None:
        """Add critic, reference, heads to ``self.policy``."""

    def prepare_data(self, records) -> Sequence[Any]:
        """Raw records -> tokenized ones."""
        raise NotImplementedError

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
    def micro_batch_size(self) -> int:
        """Records that one forward pass takes at most."""
        return self.args.per_device_train_batch_size

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

    def evaluate(self) -> dict[str, float]:
        """Mean losses and metrics over ``eval_dataset``, names prefixed ``eval_``."""
        if self.eval_records is None:
            raise UserError("evaluate() needs an eval_dataset")
        means = Means()
        mine = self._share(list(self.eval_records))
        window = self._window(mine)  # all of the data is one: the mean loss does not depend on the batch size
        total = torch.zeros((), device=self.accelerator.device)
        with torch.no_grad(), self._eval_mode():
            for part in self.micro_batches(mine):
                for loss, metrics, weight in self.losses(self.collect(part), window):
                    total += loss
                    means.add(metrics, weight)
        means.add({"loss": self.accelerator.reduce(total, "sum")}, 1.0)
        return {f"eval_{name}": value for name, value in means.read().items()}

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
        """The records of the largest micro-batch that can come, ready for ``losses``."""
        sizes = self._record_tokens * self._epochs_per_window
        if self.micro_batch_tokens is None:
            order = sorted(range(len(sizes)), key=lambda i: -sizes[i])[: self.args.per_device_train_batch_size]
        else:
            order = fullest(sizes, min(self.micro_batch_tokens, self.sizes()["window_tokens"]))
        return self.collect([self.train_records[i % len(self.train_records)] for i in order])

    @functools.cached_property
    def _record_tokens(self) -> list[int]:
        """Of each training record by itself; counted once, as there may be millions."""
        return [self.tokens([record]) for record in self.train_records]

    @property
    def _epochs_per_window(self) -> int:
        """How often a record may come in one window: more than once where that is longer than an epoch."""
        window = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return -(-window // len(self.train_records))

    def after_step(self) -> None:
        """Called after every optimizer step."""

    def extra_state(self) -> dict[str, Any]:
        """What resuming needs beyond the loop's own."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`extra_state` gave."""

    # ---- the loop

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, float]:
        """Train, save the model into ``output_dir``, and return the last figures.

        Args:
            resume_from_checkpoint: True for the latest good checkpoint of ``output_dir``, or a path; as ``args`` say
                when None.
        """
        out = Path(self.args.output_dir)
        self.policy.check_folder(out)  # now rather than when there is a model to lose
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        resumed = self._resume(out, resume_from_checkpoint) if resume_from_checkpoint else None
        if self.accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
            save_config(self.args, out / "config.yaml")
        self.policy.train()
        self._check_memory()
        log = MetricsLog(
            out,
            list(self.headline),
            self.total_steps,
            trackers=self.args.report_to,
            quiet=self.args.quiet,
            resume_step=resumed,
            config=dataclasses.asdict(self.args),
            enabled=self.accelerator.is_main_process,
        )
        final: dict[str, float] = {}
        with log, StopSignals() as stop:
            started, tokens = time.perf_counter(), 0.0
            while not self.finished:
                if not self.plan:
                    self._begin_round_or_save(out)
                with self.timed("train"):
                    tokens += self._optimizer_step(self.plan.pop(0))
                # read once: a signal that comes while logging waits for the next step
                stopping = self._on_any_rank(stop.requested) and not self.finished
                last = self.finished or stopping
                if last or self.step % self.args.logging_steps == 0:
                    final.update(self._log(log, time.perf_counter() - started, tokens))
                    started, tokens = time.perf_counter(), 0.0
                if last or self.step % self.args.save_steps == 0:
                    self._save_checkpoint(out)
                every = self.args.eval_steps
                due = self.finished or (every and self.step % every == 0)
                if self.eval_records is not None and due and not stopping:  # who asked to stop will not wait for it
                    figures = self.evaluate()
                    log.log(self.step, figures)
                    final.update(figures)
                if stopping:
                    log.print(f"{stop.name or 'stopped'}: saved at step {self.step}; continue with --resume")
                    break
                log.tick(self.step)
        if self.memory_plan is not None and torch.cuda.is_available():
            self.say(compare(self.memory_plan, torch.cuda.max_memory_allocated()))
        self.save_model(out)
        return final

    def save_model(self, folder: str | Path | None = None) -> None:
        """Write the trained model: adapter or weights, heads, tokenizer."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.policy.save(folder or self.args.output_dir)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; fewer when an algorithm drops some, see ``finished``."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        rounds = math.ceil(len(self.train_records) * self.args.num_train_epochs / self._rows_per_round)
        return rounds * self.windows_per_round * self.repeats

    @property
    def finished(self) -> bool:
        """Whether the run has made all its steps or used up its data."""
        return self.step >= self.total_steps or (not self.plan and self._rows_left <= 0)

    @property
    def _rows_left(self) -> float:
        if self.args.max_steps > 0:
            return math.inf
        return math.ceil(len(self.train_records) * self.args.num_train_epochs) - self.rows_drawn

    @property
    def _rows_per_round(self) -> int:
        return self.rows_per_window * self.windows_per_round * self.accelerator.num_processes

    def _begin_round_or_save(self, out: Path) -> None:
        """Begin a round; when the rollouts it needs cannot be had, save where the run stands first."""
        before = self.sampler.state(), self.rows_drawn
        try:
            self._begin_round()
        except RolloutError as error:
            self.sampler.load_state(before[0])
            self.rows_drawn = before[1]
            self._save_checkpoint(out)
            raise RolloutError(f"{error} (saved at step {self.step}; continue with --resume)") from error

    def _begin_round(self) -> None:
        # the last round is as short as the data, but every window of every rank needs a row: it may run on into the next
        # epoch by a few
        fewest = self.windows_per_round * self.accelerator.num_processes
        rows = self.sampler.take(min(self._rows_per_round, max(fewest, self._rows_left)))
        self.first_row = self.rows_drawn + self._bounds(len(rows))[0]
        self.rows_drawn += len(rows)
        self.records = self.collect(self._share([self.train_records[i] for i in rows]))
        self.plan = self.make_plan(len(self.records))

    def _optimizer_step(self, indices: list[int]) -> float:
        """One step on the records at ``indices``; returns the response tokens seen on all ranks."""
        records = [self.records[i] for i in indices]
        window = self._window(records)
        parts, world = self.micro_batches(records), self.accelerator.num_processes
        for number, part in enumerate(parts, start=1):
            # ranks may differ in how many they have: gradients meet once, in the last one of each
            hold = number < len(parts) and world > 1
            with self.accelerator.no_sync(self.model) if hold else contextlib.nullcontext():
                for loss, metrics, weight in self.losses(part, window):
                    # DDP averages over ranks; the denominator already counts them all
                    self.accelerator.backward(loss * world)
                    self.metrics.add(metrics, weight)
                    self._loss = self._loss + loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm or math.inf)
        self._apply(norm)
        self.step += 1
        self.after_step()
        return window.tokens

    def split(self, records: list[Any]) -> list[list[int]]:
        """Which records meet the model together, as indices, the most tokens first; a function of ``records`` alone.

        With ``micro_batch_tokens`` bundles are packed up to so many tokens, and one that is larger is cut into parts that
        are not; a record larger than that is alone. Else ``per_device_train_batch_size`` records make a part.
        """
        budget = self.micro_batch_tokens
        if budget is None:
            size = self.micro_batch_size
            return [list(range(start, min(start + size, len(records)))) for start in range(0, len(records), size)]
        parts: list[list[int]] = []
        for bundle in self.bundles(records):
            parts.append([])
            for i in bundle:
                if parts[-1] and self.tokens([records[j] for j in (*parts[-1], i)]) > budget:
                    parts.append([])
                parts[-1].append(i)
        groups = micro_batches([self.tokens([records[i] for i in part]) for part in parts], budget)
        return [[i for part in group for i in parts[part]] for group in groups]

    def micro_batches(self, records: list[Any]) -> list[list[Any]]:
        """``records`` in the parts of :meth:`split`."""
        return [[records[i] for i in part] for part in self.split(records)]

    def _apply(self, norm: Tensor) -> None:
        """Step the optimizer, unless a gradient is not finite: then weights stay as they are."""
        if bool(torch.isfinite(norm)):
            self.optimizer.step()
            self._skipped = 0
        else:
            self._skipped += 1
            logger.warning("step %d skipped: the gradient norm is %s", self.step + 1, float(norm))
            if self._skipped == MAX_SKIPPED_STEPS:
                raise UserError(
                    f"{MAX_SKIPPED_STEPS} steps in a row had non-finite gradients, the last at step {self.step + 1}; "
                    f"lower the learning rate (now {self.scheduler.get_last_lr()[0]:g}) or inspect the data there"
                )
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.accelerator.reduce(torch.as_tensor(self._loss, device=self.accelerator.device), "sum")
        self.metrics.add({"loss": losses, "grad_norm": norm}, 1.0)
        self._loss = 0.0

    def own_window(self, records: list[Any]) -> Window:
        """The window of ``records`` alone, whatever other ranks have."""
        return Window(len(records), sum(map(self.size, records)) or 1.0)

    def _window(self, records: list[Any]) -> Window:
        counts = torch.tensor([len(records), sum(map(self.size, records))], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts.to(self.accelerator.device, torch.float32), "sum")
        records_, tokens = counts.tolist()
        return Window(records_, tokens or 1.0)

    def _on_any_rank(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum") > 0)

    def _share(self, rows: list[Any]) -> list[Any]:
        """This rank's contiguous part of ``rows``."""
        return rows[slice(*self._bounds(len(rows)))]

    def _bounds(self, count: int) -> tuple[int, int]:
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        return round(count * rank / world), round(count * (rank + 1) / world)

    def _log(self, log: MetricsLog, seconds: float, tokens: float) -> dict[str, float]:
        figures = self.metrics.read()
        figures["lr"] = self.scheduler.get_last_lr()[0]
        figures["epoch"] = self.sampler.epoch
        figures["tokens_per_second"] = tokens / max(seconds, 1e-9)
        figures.update({f"time/{name}": value for name, value in self.times.items()})
        self.times.clear()
        if torch.cuda.is_available():
            figures["memory/peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            if self.memory_plan is not None:
                figures["memory/planned_gb"] = self.memory_plan.tensors / 1e9
        log.log(self.step, figures)
        return figures

    @property
    def logs_this_step(self) -> bool:
        """Whether the step being computed ends in a log line."""
        return (self.step + 1) % self.args.logging_steps == 0 or self.step + 1 >= self.total_steps

    @property
    def tokenizing(self) -> dict[str, Any]:
        """What preparing data needs to know about the model."""
        vocab_size = self.policy.model.get_input_embeddings().num_embeddings
        return {
            "name": self._preparing,
            "stop_ids": self.policy.stop_ids,
            "vocab_size": vocab_size,
            "bad_rows": self.args.bad_rows,
        }

    def say(self, what: Any) -> None:
        """Print once, not once per process."""
        if not self.args.quiet:
            self.accelerator.print(what)

    def add_times(self, seconds: dict[str, float]) -> None:
        for name, value in seconds.items():
            self.times[name] += value

    @contextlib.contextmanager
    def timed(self, name: str):
        """Count the block's seconds into ``time/<name>`` of the next log line."""
        began = time.perf_counter()
        yield
        self.add_times({name: time.perf_counter() - began})

    @contextlib.contextmanager
    def _eval_mode(self):
        self.policy.eval()
        try:
            yield
        finally:
            self.policy.train()

    # ---- memory

    def _settle_memory(self) -> Plan | None:
        """Switch checkpointing and offload on as the config says; on a GPU the plan answers what it leaves open."""
        a, made = self.args, None
        checkpointing, offload = a.gradient_checkpointing is not False, bool(a.offload_activations)
        if (available := device_bytes(self.accelerator.device)) is not None:
            try:
                made = plan_of(self, available, settle=True)
            except UserError as error:  # a config that is no known decoder's
                self.say(f"no memory plan: {error}")
            else:
                checkpointing, offload = made.job.checkpointing, made.job.offload
                self.micro_batch_tokens = made.job.tokens
                self.say("\n".join([made.line(), *(f"it does not fit; try {change}" for change in made.changes)]))
        if checkpointing:
            self.policy.checkpoint_activations(offload=offload)
        return made

    def _check_memory(self) -> None:
        """Try the largest micro-batch; from here on the peak is that of training."""
        cuda = self.accelerator.device.type == "cuda"
        if self.args.memory_check if self.args.memory_check is not None else cuda:
            began = time.perf_counter()
            tokens = rehearse(self)
            self.say(f"memory: the largest micro-batch, {tokens:,} tokens, fits ({time.perf_counter() - began:.1f} s)")
        if cuda:
            torch.cuda.reset_peak_memory_stats()

    # ---- construction

    def _load(self, model, tokenizer, peft_config) -> Policy:
        a = self.args
        if peft_config is None and a.use_peft:
            peft_config = lora_config(a.lora_r, a.lora_alpha, a.lora_dropout, a.lora_target_modules)
        lora = peft_config is not None or (
            isinstance(model, (str, Path)) and (Path(model) / "adapter_config.json").is_file()
        )
        if not lora and (a.load_in_4bit or is_4bit(model)):
            raise UserError(
                "a 4-bit base is frozen and takes an adapter: add use_peft, or leave load_in_4bit out to train all weights"
            )
        half = self.accelerator.device.type == "cuda" and a.dtype == "auto"
        dtype = torch.bfloat16 if a.dtype == "bfloat16" or (half and lora) else torch.float32
        policy = load(
            model,
            tokenizer=tokenizer,
            peft_config=peft_config,
            dtype=dtype,
            device=self.accelerator.device,
            role=self.role,
            load_in_4bit=a.load_in_4bit or None,
        )
        if policy.loaded:
            self.say(policy.loaded)
        check_implementation(a.attn_implementation, policy.device)
        policy.attention = a.attn_implementation
        if not a.fused_layers:
            policy.unfuse()
        elif lora:
            self.say(policy.fusion.summary)  # what is not fused was logged, with why
        if policy.continued and a.use_peft:
            c = policy.adapters.config(policy.role)
            self.say(
                f"going on with the adapter in {model} (r {c.r}, alpha {c.lora_alpha}); lora_* settings do not apply"
            )
        if half and not lora:  # fp32 weights, 16-bit passes: steps of a small learning rate vanish in 16-bit weights
            policy.compute_dtype = torch.bfloat16
        return policy

    def _build_optimizer(self) -> None:
        a = self.args
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        rate = a.learning_rate if a.learning_rate is not None else self.learning_rates[bool(self.policy.adapters.names)]
        # norms, biases and scalar heads do not decay, as in transformers
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": a.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = build_optimizer(a.optim, [g for g in groups if g["params"]], rate)
        self.model, self.optimizer = self.accelerator.prepare(self.policy, optimizer)
        # stepped by hand: accelerate's wrapper would advance it once per process
        self.scheduler = get_scheduler(
            a.lr_scheduler_type,
            optimizer,
            num_warmup_steps=math.ceil(a.warmup_ratio * self.total_steps),
            num_training_steps=self.total_steps,
        )

    # ---- checkpoints

    def state(self) -> dict[str, Any]:
        """Everything that continuing bit for bit needs. Collective: every rank must call it."""
        local = {
            "rng": rng_state(),
            "plan": self.plan,
            "metrics": self.metrics.state(),
            "records": [dataclasses.asdict(r) for r in self.records] if self.plan and self.record_class else None,
        }
        return {
            "step": self.step,
            "weights": {n: p for n, p in self.policy.named_parameters() if p.requires_grad},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "sampler": self.sampler.state(),
            "rows_drawn": self.rows_drawn,
            "skipped": self._skipped,
            "micro_batch_tokens": self.micro_batch_tokens,
            "ranks": gather_object([local]),
            "extra": self.extra_state(),
            "base": fingerprint(self.policy.model) if self.policy.adapters.names else None,  # frozen, and not in here
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`.

        Raises:
            UserError: the checkpoint holds other parameters, belongs to another base, or comes from other data, another
                seed or another number of processes.
        """
        mine = {n: p for n, p in self.policy.named_parameters() if p.requires_grad}
        saved = {n: w.shape for n, w in state["weights"].items()}
        if odd := {n for n in mine.keys() | saved.keys() if n not in mine or mine[n].shape != saved.get(n)}:
            raise UserError(
                f"the checkpoint does not fit this model and its LoRA settings: {min(odd)} is {_shape(saved, odd)} there "
                f"and {_shape({n: p.shape for n, p in mine.items()}, odd)} here"
            )
        if len(state["ranks"]) != self.accelerator.num_processes:
            raise UserError(
                f"the checkpoint was written by {len(state['ranks'])} processes, this run has "
                f"{self.accelerator.num_processes}; start as many"
            )
        self._check_base(state.get("base"))
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(state["weights"][name])
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        try:
            self.sampler.load_state(state["sampler"])
        except ValueError as error:
            raise UserError(f"{error}; resume with the data and the seed that the run began with") from error
        self.rows_drawn, self._skipped = state["rows_drawn"], state["skipped"]
        # what a plan or a rehearsal had settled on: sums in other parts would round differently
        self.micro_batch_tokens = state["micro_batch_tokens"]
        local = state["ranks"][self.accelerator.process_index]
        self.plan = local["plan"]
        self.metrics.load_state(local["metrics"])
        if local["records"] is not None:
            self.records = [self.restore_record(r) for r in local["records"]]
        self.load_extra_state(state["extra"])
        set_rng_state(local["rng"])

    def _check_base(self, saved: dict[str, str] | None) -> None:
        """Raise UserError if the frozen weights are not those that the checkpoint ``saved`` was trained on."""
        if saved is None:
            return
        here = fingerprint(self.policy.model)
        how = difference(saved, here)
        if how is None and saved["format"] != here["format"]:
            how = f"it was held {saved['format']} there and {here['format']} here; see load_in_4bit"
        if how:
            raise UserError(f"the checkpoint belongs to another base than {self.policy.model.name_or_path}: {how}")

    def restore_record(self, fields: dict[str, Any]) -> Any:
        """A sampled record from its checkpointed fields."""
        raise NotImplementedError

    def _save_checkpoint(self, out: Path) -> None:
        state = self.state()
        if self.accelerator.is_main_process:
            save_checkpoint(out / "checkpoints", self.step, state, keep=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _resume(self, out: Path, which: str | bool) -> int:
        path = find_checkpoint(out / "checkpoints", which)
        self.load_state(load_checkpoint(path, verify=False))
        logger.info("resumed from %s at step %d", path, self.step)
        return self.step


def _shape(shapes: dict[str, torch.Size], names: set[str]) -> str:
    """The shape of the first of ``names``, for people."""
    return str(tuple(shapes[min(names)])) if min(names) in shapes else "missing"


def _records(dataset, name: str):
    if dataset is None:
        raise UserError(f"{name} is missing: pass records, a datasets.Dataset, or a path")
    records = load_records(dataset) if isinstance(dataset, (str, Path)) else dataset
    if len(records) == 0:
        raise UserError(f"{name} is empty: nothing to train on")
    return records
