"""What every trainer shares: the loop over rounds, windows and micro-batches; checkpoints; metrics.

A *round* turns some rows of the data set into records to learn from (``collect``: for offline algorithms the rows
themselves, for reinforcement learning sampled and scored responses). A *window* is what one optimizer step learns from.
It is split into micro-batches, by tokens or by records, whose losses are sums over one denominator, that of the whole
window on all ranks: any split of the window gives the same gradient.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, set_seed
from torch import Tensor
from transformers import get_scheduler

from rlhf_fast.data.batch import Example, TokenBatch
from rlhf_fast.data.packing import IndexSampler
from rlhf_fast.data.prepare import Report
from rlhf_fast.data.sources import load_records
from rlhf_fast.errors import RolloutError, UserError
from rlhf_fast.models import disable_dropout
from rlhf_fast.models.adapters import is_4bit
from rlhf_fast.models.policy import in_eval_mode
from rlhf_fast.run import sharding
from rlhf_fast.run.config import save_config
from rlhf_fast.run.determinism import deterministic, prepare, repeatable
from rlhf_fast.run.disk import disk_faults
from rlhf_fast.run.distribution import Ranks
from rlhf_fast.run.means import Means
from rlhf_fast.run.metrics import MetricsLog
from rlhf_fast.run.record import Record, lineage, redacted
from rlhf_fast.run.signals import StopSignals
from rlhf_fast.run.times import Times

from . import memory, nonfinite
from .algorithm import Algorithm, Window
from .best import Best
from .build import build_policy, records_of
from .callbacks import Callbacks, EarlyStopping
from .config import TrainerConfig
from .optimizers import build_optimizer
from .resume import frozen_digest, load_best, resume, save, weights_of

logger = logging.getLogger(__name__)
MAX_SKIPPED_STEPS = 3
ASIDE = ("evaluate", "save")  # what a run spends time on beside learning
DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


class Trainer(Algorithm):
    """Base of all trainers: runs what an :class:`.Algorithm` says.

    Args:
        model: a Hugging Face name, a model or run folder, or a transformers model.
        args: the algorithm's config.
        train_dataset: records: a ``datasets.Dataset``, a list of dicts, or a path.
        eval_dataset: held-out records.
        processing_class: the tokenizer; found beside the model when None.
        peft_config: a LoRA configuration; from ``args`` when None.
        callbacks: see :mod:`.callbacks`; those of ``args`` come first.
    """

    def __init__(
        self,
        model,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        callbacks=(),
    ):
        self.args = args if args is not None else self.config_class()
        prepare(self.args.deterministic)
        set_seed(self.args.seed)
        # precision is the policy's: accelerate holds one for the whole process, where SFT and PPO may follow each other.
        # buffers are constants; broadcasting them would make ranks with fewer micro-batches wait for ever
        self.accelerator = Accelerator(
            mixed_precision="no",
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
        )
        self.shards = sharding.asked_for(self.accelerator)  # weights are to be sharded, once they are complete
        if not self.shards and self.accelerator.distributed_type not in DISTRIBUTED:
            raise UserError(
                f"accelerate was told to use {self.accelerator.distributed_type.value}, and runs of several processes are "
                "replicas (DDP) or shards (FSDP2) here: start them with `accelerate launch --multi_gpu`, with `--use_fsdp "
                "--fsdp_version 2`, or torchrun"
            )
        self.ranks = Ranks(self.accelerator)
        self.policy = build_policy(
            model,
            self.args,
            tokenizer=processing_class,
            peft_config=peft_config,
            role=self.role,
            device=self.accelerator.device,
            say=self.say,
        )
        self._model_name = str(model) if isinstance(model, (str, Path)) else self.policy.model.name_or_path
        self.tokenizer = self.policy.tokenizer
        self.add_roles()
        if not self.keep_dropout:
            if self.args.lora_dropout:
                raise UserError(
                    "lora_dropout must be 0 here: ratios and margins compare two passes; only SFT has dropout"
                )
            disable_dropout(self.policy)
        self.micro_batch_tokens = self.args.micro_batch_tokens  # until the memory plan settles it
        self.reports: dict[str, Report] = {}  # what became of the rows of each data set
        self.train_records = self.prepare_data(records_of(train_dataset, "train_dataset"), "train")
        self.eval_records = (
            None if eval_dataset is None else self.prepare_data(records_of(eval_dataset, "eval_dataset"), "eval")
        )
        if eval_dataset is not None and (shared := self.reports["train"].shared_with(self.reports["eval"])):
            self.say(shared)
        self._prepare_callbacks(callbacks)
        self.memory_plan = memory.settle(self)
        with deterministic(self.args.deterministic):
            self.train_records = self.complete_data(self.train_records)
            self.eval_records = self.eval_records and self.complete_data(self.eval_records)
        self._prepare_optimizer()
        self.step = 0
        self.stopped: str | None = None  # why the run ends before its last step
        self.rolls_back = False  # and its model is that of the best evaluation
        self.sampler = IndexSampler(len(self.train_records), self.args.seed)
        self.records: Sequence[Any] = []  # of the current round
        self.plan: list[list[int]] = []  # windows of the current round still to come, as indices into records
        self.rows_drawn = 0  # by all ranks, since the start of the run
        self.first_row = 0  # where this rank's rows of the round lie in that count: seeds derive from it
        self._loss: Tensor | float = 0.0  # of the window, so far
        self.skipped = 0  # steps in a row without a finite gradient
        self.metrics = Means()
        self.times = Times()
        self.tokens_seen = 0  # of the sequences that this rank has learned from, see num_tokens
        self._tokens_logged = 0  # of all ranks, at the last log line

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

    def prepare_data(self, records: Any, name: str = "train") -> Sequence[Any]:
        """Raw records -> those that windows are drawn from; says what became of the rows of the data set ``name``.

        Raises:
            UserError: a row is bad, or too many are too long.
        """
        vocab_size = self.policy.model.get_input_embeddings().num_embeddings
        model = {"stop_ids": self.policy.stop_ids, "vocab_size": vocab_size}
        options = {"name": name, "bad_rows": self.args.bad_rows, **model}
        rows, report = self.tokenize(records, self.tokenizer, self.args, **options)
        self.say(report)
        self.reports[name] = report
        return self.arrange(rows)

    # ---- the loop

    @repeatable
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
        resumed = resume(self, out, resume_from_checkpoint) if resume_from_checkpoint else None
        if self.accelerator.is_main_process:
            with disk_faults("the config", out):
                out.mkdir(parents=True, exist_ok=True)
                save_config(self.args, out / "config.yaml")
        self.policy.train()
        memory.check(self)
        with self._open_record(out, resumed) as record:
            return self._run(out, resumed, record)

    def _run(self, out: Path, resumed: int | None, record: Record) -> dict[str, float]:
        """The loop, from wherever the run stands."""
        log = self._open_log(out, resumed)
        final = record.figures
        self._tokens_logged = self.num_tokens
        with log, StopSignals() as stop:
            while not self.finished:
                if not self.plan:
                    with self.timed("collect"):
                        self._begin_round_or_save(out)
                with self.timed("train"):
                    self._optimizer_step(self.plan.pop(0))
                log.total_steps = self.expected_steps
                # read once: a signal that comes while logging waits for the next step
                interrupted = self.ranks.any(stop.requested) and not self.finished
                logged: dict[str, float] = {}
                if self.finished or interrupted or self.step % self.args.logging_steps == 0:
                    logged = self._log(log)
                    final.update(logged)
                self._notify("on_step", logged)
                record.step = self.step
                if self._evaluation_due and not interrupted:  # who asked to stop will not wait for it
                    final.update(self._evaluate(log))
                if self.finished or interrupted or self.step % self.args.save_steps == 0 or self.best.step == self.step:
                    with self.timed("save"):
                        folder = save(self, out)
                    self._notify("on_save", folder)
                if self.stopped and not logged:
                    final.update(self._log(log))
                if self.stopped:
                    log.print(f"stopped at step {self.step}: {self.stopped}")
                elif interrupted:
                    log.print(f"{stop.name or 'stopped'}: saved at step {self.step}; continue with --resume")
                    break
                log.tick(self.step)
        if self.finished and (self.args.load_best_model_at_end or self.rolls_back):
            self.say(load_best(self, out))
        if self.memory_plan is not None and torch.cuda.is_available():
            self.say(memory.compare(self.memory_plan, torch.cuda.max_memory_allocated()))
        self.save_model(out)
        record.outcome = self.stopped or (
            "finished" if self.finished else f"interrupted by {stop.name or 'another rank'}"
        )
        return dict(final)

    def save_model(self, folder: str | Path | None = None) -> None:
        """Write the trained model: adapter or weights, heads, tokenizer. Collective."""
        self.accelerator.wait_for_everyone()
        weights = weights_of(self) if self.sharded else None
        folder = folder or self.args.output_dir
        if self.accelerator.is_main_process:
            with disk_faults("the model", folder):
                self.policy.save(folder, weights)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run as planned; see :attr:`expected_steps`."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        rounds = math.ceil(len(self.train_records) * self.args.num_train_epochs / self._rows_per_round)
        return rounds * self.windows_per_round * self.repeats

    @property
    def position(self) -> float:
        """How many of the planned steps lie behind. The learning rate follows this.

        A run of ``max_steps`` makes all of them. One of epochs makes fewer when an algorithm drops the remaining passes over
        a round or draws more rows for it: steps that were dropped, or whose rows are used up, lie behind too.
        """
        if self.args.max_steps > 0:
            return self.step
        rounds = self.rows_drawn / self._rows_per_round
        if self.rows_left <= 0:  # the last one may be shorter
            rounds = math.ceil(rounds)
        return min(rounds * self.windows_per_round * self.repeats, self.total_steps) - len(self.plan)

    @property
    def expected_steps(self) -> int:
        """Optimizer steps of the whole run, as far as one knows by now."""
        return self.step + math.ceil(self.total_steps - self.position)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences that training steps have learned from so far, on all ranks. Collective.

        Prompts and responses, without padding, each time that a step sees them: a prompt that responses share counts with
        each of them, whether the model reads it once or more often.
        """
        return sum(self.ranks.gather([self.tokens_seen]))

    @property
    def finished(self) -> bool:
        """Whether the run has made all its steps, used up its data or been told that it is done."""
        return bool(self.stopped) or self.step >= self.total_steps or (not self.plan and self.rows_left <= 0)

    def stop(self, why: str, roll_back: bool = False) -> None:
        """End the run after this step as if it were its last one; ``roll_back`` to the model of the best evaluation."""
        self.stopped = why
        self.rolls_back = self.rolls_back or roll_back

    @property
    def rows_left(self) -> float:
        """Rows of the data that the run may still draw."""
        if self.args.max_steps > 0:
            return math.inf
        return math.ceil(len(self.train_records) * self.args.num_train_epochs) - self.rows_drawn

    @property
    def _rows_per_round(self) -> int:
        return self.rows_per_window * self.windows_per_round * len(self.ranks)

    def _begin_round_or_save(self, out: Path) -> None:
        """Begin a round; when the rollouts it needs cannot be had, save where the run stands first."""
        before = self.sampler.state(), self.rows_drawn
        try:
            self._begin_round()
        except RolloutError as error:
            self.sampler.load_state(before[0])
            self.rows_drawn = before[1]
            save(self, out)
            raise RolloutError(f"{error} (saved at step {self.step}; continue with --resume)") from error

    def _begin_round(self) -> None:
        # the last round is as short as the data, but every window of every rank needs a row: it may run on into the next
        # epoch by a few
        fewest = self.windows_per_round * len(self.ranks)
        count = min(self._rows_per_round, max(fewest, self.rows_left))
        self.records = self.collect(self.draw(count, *self.ranks.bounds(count)))
        if self.record_class is not None:
            self._notify("on_rollout", self.records)
        self.plan = self.make_plan(len(self.records))

    def draw(self, count: int, begin: int, end: int) -> list[Any]:
        """The next ``count`` rows of the data, all ranks together, of which this one gets those from ``begin`` to ``end``."""
        rows = self.sampler.take(count)
        self.first_row = self.rows_drawn + begin
        self.rows_drawn += count
        return [self.train_records[i] for i in rows[begin:end]]

    def _optimizer_step(self, indices: list[int]) -> None:
        """One step on the records at ``indices``."""
        records = [self.records[i] for i in indices]
        window = self._window(records)
        memory.halving(self, records, lambda parts: self._accumulate(parts, window))
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm or math.inf)
        self._apply(sharding.gathered(norm).to(self.accelerator.device), records, window)
        self.tokens_seen += sum(len(e) for record in records for e in self.examples(record))
        self.step += 1
        self.after_step()
        # a schedule is a function of where the run is
        self.scheduler.last_epoch = self.position - 1
        self.scheduler.step()

    def _accumulate(self, parts: list[list[Any]], window: Window) -> None:
        """Add up the gradients of a window's micro-batches. Nothing here waits for the device."""
        world, idle = len(self.ranks), self.idle_passes(len(parts))
        for number, part in enumerate(parts, start=1):
            # ranks may differ in how many they have: gradients meet once, in the last one of each. Sharded ones meet each time:
            # whole, they would soon be too much
            hold = number < len(parts) and world > 1 and not self.sharded
            with self.accelerator.no_sync(self.model) if hold else contextlib.nullcontext():
                for loss, metrics, weight in self.losses(part, window):
                    # gradients are averaged over ranks; the denominator already counts them all
                    self.accelerator.backward(loss * world)
                    self.metrics.add(metrics, weight)
                    self._loss = self._loss + loss.detach()
        for loss in self._idle_losses(parts[-1:] * idle, window):
            self.accelerator.backward(loss * 0.0)

    @property
    def sharded(self) -> bool:
        """Whether this process has a part of the weights only, and passes take all ranks."""
        return sharding.is_sharded(self.policy)

    def whole(self) -> contextlib.AbstractContextManager:
        """Inside, sharded weights are whole on every rank, and passes are its own business; both ends are collective."""
        return sharding.whole(self.policy)

    def idle_passes(self, count: int) -> int:
        """How many passes this rank owes the others after ``count`` of its own, if passes take all ranks. Collective then."""
        return max(self.ranks.gather([count])) - count if self.sharded else 0

    def _idle_losses(self, parts: list[list[Any]], window: Window) -> Iterator[Tensor]:
        """Losses that do not count, of passes made because other ranks have more micro-batches and need this one's weights."""
        for part in parts:
            before = dict(vars(self))
            for loss, *_ in self.losses(part, window):
                yield loss
            vars(self).update(before)  # what the losses noted down

    def _apply(self, norm: Tensor, records: list[Any], window: Window) -> None:
        """Step the optimizer, unless a gradient is not finite: then weights stay as they are."""
        if bool(torch.isfinite(norm)):
            self.optimizer.step()
            self.skipped = 0
        else:
            self.skipped += 1
            told = nonfinite.report(self, records, window)
            logger.warning("step %d skipped: the gradient norm is %s; %s", self.step + 1, float(norm), told)
            if self.skipped == MAX_SKIPPED_STEPS:
                raise UserError(
                    f"{MAX_SKIPPED_STEPS} steps in a row had non-finite gradients, the last at step {self.step + 1}; "
                    f"lower the learning rate (now {self.scheduler.get_last_lr()[0]:g}) or inspect the data there: {told}"
                )
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.accelerator.reduce(torch.as_tensor(self._loss, device=self.accelerator.device), "sum")
        self.metrics.add({"loss": losses, "grad_norm": norm}, 1.0)
        self._loss = 0.0

    def _window(self, records: list[Any]) -> Window:
        return Window(*(count or 1.0 for count in self.ranks.sum(*self.counts(records))))

    @repeatable
    def evaluate(self) -> dict[str, float]:
        """Mean losses and metrics over ``eval_dataset``, names prefixed ``eval_``."""
        if self.eval_records is None:
            raise UserError("evaluate() needs an eval_dataset")
        means = Means()
        mine = self.ranks.share(list(self.eval_records))
        window = self._window(mine)  # all of the data is one: the mean loss does not depend on the batch size
        total = torch.zeros((), device=self.accelerator.device)
        with torch.no_grad(), self._eval_mode():
            parts = self.micro_batches(self.collect(mine))
            idle = self.idle_passes(len(parts))
            for part in parts:
                for loss, metrics, weight in self.losses(part, window):
                    total += loss
                    means.add(metrics, weight)
            for _ in self._idle_losses(parts[-1:] * idle, window):
                pass
        means.add({"loss": self.accelerator.reduce(total, "sum")}, 1.0)
        return {f"eval_{name}": value for name, value in means.read().items()}

    @property
    def _evaluation_due(self) -> bool:
        every = self.args.eval_steps
        return self.eval_records is not None and (self.finished or bool(every and self.step % every == 0))

    def _evaluate(self, log: MetricsLog) -> dict[str, float]:
        with self.timed("evaluate"):
            figures = self.evaluate()
        log.log(self.step, figures)
        if self.args.watches_evaluations:
            self.best.update(self.step, figures)
        self._notify("on_evaluate", figures)
        return figures

    def _notify(self, event: str, what: Any) -> None:
        """Tell the callbacks, and let all ranks know when one of them stops the run."""
        if not self.callbacks.members:
            return
        self.callbacks.call(event, self, what)
        if self.ranks.any(bool(self.stopped)):
            self.stopped = self.stopped or "another process stopped"

    def _open_record(self, out: Path, resumed: int | None) -> Record:
        config = dataclasses.asdict(self.args) | {"model_name_or_path": self._model_name}
        data = {
            name: {"source": r.source, "rows": r.rows, "kept": r.kept, "sha256": r.sha256}
            for name, r in self.reports.items()
        }
        about = {"method": self.method, "config": config, "data": data, "lineage": lineage(config)}
        about["processes"] = len(self.ranks)
        return Record(out, about, resumed, enabled=self.accelerator.is_main_process)

    def _open_log(self, out: Path, resumed: int | None) -> MetricsLog:
        return MetricsLog(
            out,
            list(self.headline),
            self.expected_steps,
            trackers=self.args.report_to,
            quiet=self.args.quiet,
            resume_step=resumed,
            config=redacted(dataclasses.asdict(self.args)),
            enabled=self.accelerator.is_main_process,
        )

    def _log(self, log: MetricsLog) -> dict[str, float]:
        figures, seconds, tokens = self.metrics.read(), self.times.read(), self.num_tokens
        figures["lr"] = self.scheduler.get_last_lr()[0]
        figures["epoch"] = self.sampler.epoch
        figures["num_tokens"] = tokens
        learning = sum(value for name, value in seconds.items() if name not in ASIDE)
        figures["tokens_per_second"] = (tokens - self._tokens_logged) / max(learning, 1e-9)
        self._tokens_logged = tokens
        figures.update({f"time/{name}": value for name, value in seconds.items()})
        figures.update(memory.figures(self.memory_plan))
        log.log(self.step, figures)
        return figures

    @property
    def logs_this_step(self) -> bool:
        """Whether the step being computed ends in a log line."""
        return (self.step + 1) % self.args.logging_steps == 0 or self.step + 1 >= self.total_steps

    def say(self, what: Any) -> None:
        """Print once, not once per process."""
        if not self.args.quiet:
            self.accelerator.print(what)

    def timed(self, name: str) -> contextlib.AbstractContextManager:
        """Count the block's seconds into ``time/<name>`` of the next log line, less those of timed blocks inside it."""
        return self.times.timed(name)

    @contextlib.contextmanager
    def _eval_mode(self):
        self.policy.eval()
        try:
            yield
        finally:
            self.policy.train()

    def _prepare_callbacks(self, more: Sequence[Any]) -> None:
        a = self.args
        if a.watches_evaluations and self.eval_records is None:
            raise UserError("the best evaluation is asked for, and there is none without an eval_dataset")
        metric = a.metric_for_best_model or self.best_metric
        self.best = Best(metric, a.greater_is_better)
        specs = [*self.own_callbacks(), *a.callbacks, *more]
        if a.early_stopping_patience is not None:
            stopping = (metric, a.early_stopping_patience, a.early_stopping_threshold, a.greater_is_better)
            specs.insert(0, EarlyStopping(*stopping))
        self.callbacks = Callbacks(specs)

    def _prepare_optimizer(self) -> None:
        a = self.args
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        rate = a.learning_rate if a.learning_rate is not None else self.learning_rates[bool(self.policy.adapters.names)]
        optimizer = build_optimizer(a.optim, parameters, rate, a.weight_decay)
        self.frozen: str | None = None  # digest of the frozen adapters and heads, where their weights are sharded
        if self.shards:
            self.model, self.optimizer = self._shard(optimizer)
        else:
            self.model, self.optimizer = self.accelerator.prepare(self.policy, optimizer)
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        # stepped by hand: accelerate's wrapper would advance it once per process
        self.scheduler = get_scheduler(
            a.lr_scheduler_type,
            optimizer,
            num_warmup_steps=math.ceil(a.warmup_ratio * self.total_steps),
            num_training_steps=self.total_steps,
        )

    def _shard(self, optimizer: Any) -> tuple[Any, Any]:
        """Policy and optimizer, each process with its part of them from here on."""
        a, policy = self.args, self.policy
        refused = {
            "load_in_4bit": is_4bit(policy.model),
            f"optim {a.optim}": a.optim != "adamw",
            "rollout_merge_lora": bool(getattr(a, "rollout_merge_lora", False)),
            "memory_check": bool(a.memory_check),
        }
        if names := [name for name, wanted in refused.items() if wanted]:
            raise UserError(
                f"sharded weights (FSDP2) do not go with {', '.join(names)}: leave that out, or run replicas (DDP)"
            )
        if self.eval_records is not None and len(self.eval_records) < len(self.ranks):
            raise UserError(
                f"eval_dataset has fewer rows than this run has processes ({len(self.ranks)}), which all need one"
            )
        # of weights that stand still, taken while they are in one piece
        policy.note_base()
        self.frozen = frozen_digest(self)
        model, optimizer = sharding.prepare(self.accelerator, policy, policy.layer_classes, optimizer)
        # the module that runs first is the root from then on
        probe = TokenBatch.pack([Example([0, 0], [False, True])], policy.device)
        with torch.no_grad(), in_eval_mode(policy):
            policy(probe)
        sharding.part(policy)
        return model, optimizer
