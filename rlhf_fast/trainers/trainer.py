"""A run: what it is made of, where it stands, and what can be asked of it. :mod:`.loop` makes its steps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import Tensor

from rlhf_fast.data.packing import IndexSampler
from rlhf_fast.data.prepare import Report
from rlhf_fast.data.sources import load_records
from rlhf_fast.errors import UserError
from rlhf_fast.run import sharding
from rlhf_fast.run.config import save_config
from rlhf_fast.run.determinism import deterministic, prepare, repeatable
from rlhf_fast.run.disk import disk_faults
from rlhf_fast.run.distribution import Ranks
from rlhf_fast.run.means import Means
from rlhf_fast.run.times import Times

from . import loop, memory, shards
from .algorithm import Algorithm, Window
from .build import build_accelerator, build_policy, records_of, without_dropout
from .callbacks import watchers
from .config import TrainerConfig
from .evaluation import mean_losses
from .journal import open_record
from .optimizers import build_optimizer, build_scheduler
from .progress import Schedule
from .resume import resume, weights_of


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
        self.accelerator, self.shards = build_accelerator()
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
        self.model_name = str(model) if isinstance(model, (str, Path)) else self.policy.model.name_or_path
        self.tokenizer = self.policy.tokenizer
        self.add_roles()
        if not self.keep_dropout:
            without_dropout(self.policy, self.args)
        self.micro_batch_tokens = self.args.micro_batch_tokens  # until the memory plan settles it
        self.reports: dict[str, Report] = {}  # what became of the rows of each data set
        self.train_records = self.prepare_data(records_of(train_dataset, "train_dataset"), "train")
        self.eval_records = (
            None if eval_dataset is None else self.prepare_data(records_of(eval_dataset, "eval_dataset"), "eval")
        )
        if eval_dataset is not None and (shared := self.reports["train"].shared_with(self.reports["eval"])):
            self.say(shared)
        self.best, self.callbacks = watchers(self, callbacks)
        self.memory_plan = memory.settle(self)
        with deterministic(self.args.deterministic):
            self.train_records = self.complete_data(self.train_records)
            self.eval_records = self.eval_records and self.complete_data(self.eval_records)
        self._prepare_optimizer()
        self._begin()

    def _prepare_optimizer(self) -> None:
        a = self.args
        rate = a.learning_rate if a.learning_rate is not None else self.learning_rates[bool(self.policy.adapters.names)]
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer = build_optimizer(a.optim, trained, rate, a.weight_decay)
        self.frozen: str | None = None  # digest of the frozen adapters and heads, where their weights are sharded
        if self.shards:
            self.model, self.optimizer = shards.shard(self, optimizer)
        else:
            self.model, self.optimizer = self.accelerator.prepare(self.policy, optimizer)
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        # stepped by hand: accelerate's wrapper would advance it once per process
        self.scheduler = build_scheduler(a, optimizer, self.total_steps)

    def _begin(self) -> None:
        """What changes from step to step, as it is before the first one."""
        self.step = 0
        self.stopped: str | None = None  # why the run ends before its last step
        self.rolls_back = False  # and its model is that of the best evaluation
        self.sampler = IndexSampler(len(self.train_records), self.args.seed)
        self.records: Sequence[Any] = []  # of the current round
        self.plan: list[list[int]] = []  # windows of the current round still to come, as indices into records
        self.rows_drawn = 0  # by all ranks, since the start of the run
        self.first_row = 0  # where this rank's rows of the round lie in that count: seeds derive from it
        self.window_loss: Tensor | float = 0.0  # of the window, so far
        self.watched: dict[str, Tensor] = {}  # figures of the window so far that are looked at before its step
        self.skipped = 0  # steps in a row without a finite gradient
        self.metrics = Means()
        self.times = Times()
        self.tokens_seen = 0  # of the sequences that this rank has learned from, see num_tokens

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
        with open_record(self, out, resumed) as record:
            loop.run(self, out, resumed, record)
            return dict(record.figures)

    def save_model(self, folder: str | Path | None = None) -> None:
        """Write the trained model: adapter or weights, heads, tokenizer. Collective."""
        self.accelerator.wait_for_everyone()
        weights = weights_of(self) if self.sharded else None
        folder = folder or self.args.output_dir
        if self.accelerator.is_main_process:
            with disk_faults("the model", folder):
                self.policy.save(folder, weights)

    def stop(self, why: str, roll_back: bool = False) -> None:
        """End the run after this step as if it were its last one; ``roll_back`` to the model of the best evaluation."""
        self.stopped = why
        self.rolls_back = self.rolls_back or roll_back

    # ---- where the run stands

    @property
    def schedule(self) -> Schedule:
        """How long the run is planned to be."""
        per_round = self.rows_per_window * self.windows_per_round * len(self.ranks)
        steps = self.windows_per_round * self.repeats
        return Schedule(len(self.train_records), self.args.num_train_epochs, self.args.max_steps, per_round, steps)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run as planned; see :attr:`expected_steps`."""
        return self.schedule.total_steps

    @property
    def position(self) -> float:
        """How many of the planned steps lie behind, see :meth:`.Schedule.position`."""
        return self.schedule.position(self.step, self.rows_drawn, len(self.plan))

    @property
    def expected_steps(self) -> int:
        """Optimizer steps of the whole run, as far as one knows by now."""
        return self.step + math.ceil(self.total_steps - self.position)

    @property
    def rows_left(self) -> float:
        """Rows of the data that the run may still draw."""
        return self.schedule.total_rows - self.rows_drawn

    @property
    def finished(self) -> bool:
        """Whether the run has made all its steps, used up its data or been told that it is done."""
        return bool(self.stopped) or self.step >= self.total_steps or (not self.plan and self.rows_left <= 0)

    @property
    def logs_this_step(self) -> bool:
        """Whether the step being computed ends in a log line."""
        return (self.step + 1) % self.args.logging_steps == 0 or self.step + 1 >= self.total_steps

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences that training steps have learned from so far, on all ranks. Collective.

        Prompts and responses, without padding, each time that a step sees them: a prompt that responses share counts with
        each of them, whether the model reads it once or more often.
        """
        return sum(self.ranks.gather([self.tokens_seen]))

    # ---- what the loop asks for

    def draw(self, count: int, begin: int, end: int) -> list[Any]:
        """The next ``count`` rows of the data, all ranks together, of which this one gets those from ``begin`` to ``end``."""
        rows = self.sampler.take(count)
        self.first_row = self.rows_drawn + begin
        self.rows_drawn += count
        return [self.train_records[i] for i in rows[begin:end]]

    def window(self, records: list[Any]) -> Window:
        """The window of this rank's ``records`` and those of all others. Collective."""
        return Window(*(count or 1.0 for count in self.ranks.sum(*self.counts(records))))

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

    @repeatable
    def evaluate(self) -> dict[str, float]:
        """What :meth:`assess` says of ``eval_dataset``, names prefixed ``eval_``."""
        if self.eval_records is None:
            raise UserError("evaluate() needs an eval_dataset")
        return {f"eval_{name}": value for name, value in self.assess().items()}

    def assess(self) -> dict[str, float]:
        """Figures of the held-out records: mean losses, unless the algorithm has better ones."""
        return mean_losses(self)

    def say(self, what: Any) -> None:
        """Print once, not once per process."""
        if not self.args.quiet:
            self.accelerator.print(what)

    def timed(self, name: str) -> contextlib.AbstractContextManager:
        """Count the block's seconds into ``time/<name>`` of the next log line, less those of timed blocks inside it."""
        return self.times.timed(name)
