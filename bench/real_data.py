"""The main job on real data: SFT, reward models, PPO, GRPO and DPO with models of a few million parameters, on a CPU.

    python -m bench.real_data --data DATA --out OUT --stage all

DATA holds ``gsm8k/train.jsonl`` (question, answer), ``gsm8k/model_solutions.jsonl`` (solutions of four models to a question,
each marked right or wrong) and ``hh-harmless/pairs.jsonl`` (chosen and rejected transcripts). Nothing is downloaded: each
stage starts from a model made from scratch or from the run of an earlier stage:

===============  =========================  ===============================================================================
stage            needs                      what it does
===============  =========================  ===============================================================================
sft              --                         SFT on GSM8K; held-out token loss beside that of an n-gram model
reward-gsm8k     sft                        reward model (LoRA) on right and wrong solutions of one question
ppo              sft, reward-gsm8k          PPO on GSM8K prompts against that reward model: four adapters on one base
grpo-gsm8k       sft                        GRPO on GSM8K prompts with the answer verifier
word-problems    --                         SFT on made word problems to a plateau, then GRPO with the answer verifier
sft-hh           --                         SFT on the chosen HH responses
reward-hh        sft-hh                     reward model on the HH comparisons, held-out accuracy beside baselines
dpo              sft-hh                     DPO on the HH comparisons
===============  =========================  ===============================================================================

Every stage prints a table, with its settings and its seconds, and writes it to OUT/<stage>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from bench.ngram import NGram
from rlhf_fast import SFTConfig, SFTTrainer
from rlhf_fast.data import load_records, prepare_sft, train_test
from rlhf_fast.errors import UserError
from rlhf_fast.models.scratch import new_model
from rlhf_fast.run.metrics import print_table

QUESTIONS_HELD_OUT = 500  # of GSM8K's 7,473


@dataclass
class Stage:
    """Where a stage reads and writes, and what it found."""

    name: str
    data: Path
    out: Path
    seed: int
    figures: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # by what they set up
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.out / self.name

    def run_of(self, stage: str) -> Path:
        """The run folder that an earlier stage left.

        Raises:
            UserError: it has not run yet.
        """
        run = self.out / stage / "run"
        if not (run / "rlhf_fast.json").is_file():
            raise UserError(f"stage {self.name} starts from {run}, which is missing: run --stage {stage} first")
        return run

    def new_model(self, preset: str, corpus: Sequence[str], **options: Any) -> Path:
        self.settings["model"] = {"preset": preset, **options}
        return new_model(preset, corpus, self.folder / "scratch", seed=self.seed, **options)

    def config(self, config_class: type, run: str = "run", **settings: Any) -> Any:
        """A config for a run of this stage; its settings are noted."""
        self.settings[config_class.__name__.removesuffix("Config").lower()] = settings
        return config_class(
            output_dir=str(self.folder / run), seed=self.seed, gradient_checkpointing=False, quiet=True, **settings
        )

    def train(self, trainer: Any) -> dict[str, float]:
        """Train and count the seconds, of the clock and of the processor."""
        wall, cpu = time.perf_counter(), time.process_time()
        name = type(trainer).__name__.removesuffix("Trainer").lower()
        last = trainer.train()
        self.seconds[f"{name}, wall"] = round(time.perf_counter() - wall, 1)
        self.seconds[f"{name}, CPU"] = round(time.process_time() - cpu, 1)
        self.figures[f"{name} steps"] = trainer.step
        return last

    def finish(self) -> None:
        """Print the table and write it."""
        settings = {f"{what}: {key}": str(value) for what, values in self.settings.items() for key, value in values.items()}
        print_table(f"{self.name}: settings", settings)
        print_table(f"{self.name}: seconds", self.seconds)
        print_table(f"{self.name}: results", self.figures)
        result = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("data", "out")}
        result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        (self.out / f"{self.name}.json").write_text(json.dumps(result, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------- GSM8K


def gsm8k(stage: Stage) -> tuple[Any, Any]:
    """Training and held-out problems; the split does not depend on the seed of the run."""
    return train_test(load_records(stage.data / "gsm8k" / "train.jsonl"), QUESTIONS_HELD_OUT)


def sft(stage: Stage) -> None:
    """SFT from scratch on GSM8K; held-out nats per completion token against an n-gram model on the same tokens."""
    train, test = gsm8k(stage)
    corpus = [f"{row['question']}\n{row['answer']}" for row in train]
    folder = stage.new_model("tiny", corpus, hidden_size=192, num_attention_heads=6)
    args = stage.config(
        SFTConfig,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        num_train_epochs=2,
        per_device_train_batch_size=2,  # bins of max_length tokens
        max_length=1024,
        eval_steps=369,
        save_steps=738,
        save_total_limit=1,
    )
    trainer = SFTTrainer(str(folder), args=args, train_dataset=train, eval_dataset=test)
    untrained = trainer.evaluate()["eval_loss"]
    last = stage.train(trainer)
    trigram = ngram_loss(3, train, test, trainer)
    stage.figures |= {
        "parameters": sum(p.numel() for p in trainer.policy.parameters()),
        "held-out nats per completion token, untrained": untrained,
        "held-out nats per completion token, trained": last["eval_loss"],
        **{f"held-out nats per completion token, {name}": loss for name, loss in trigram.items()},
        "held-out token accuracy": last["eval_mean_token_accuracy"],
        "below the trigram": last["eval_loss"] < min(trigram.values()),
    }


def ngram_loss(order: int, train: Any, test: Any, trainer: SFTTrainer) -> dict[str, float]:
    """Held-out loss of n-gram models on the trainer's own token sequences, over completion tokens.

    One counts the same tokens as SFT trains, the completions; the other gets the questions' tokens besides.
    """
    seen, _ = prepare_sft(train, trainer.tokenizer, max_length=trainer.args.max_length)
    held_out, _ = prepare_sft(test, trainer.tokenizer, max_length=trainer.args.max_length)
    vocab_size = len(trainer.tokenizer)
    ids, masks = [e.input_ids for e in seen], [e.response_mask for e in seen]
    unseen = [e.input_ids for e in held_out], [e.response_mask for e in held_out]
    whole = [[True] * len(i) for i in ids]
    return {
        f"{order}-gram of completions": NGram(order, vocab_size).fit(ids, masks).loss(*unseen),
        f"{order}-gram of questions and completions": NGram(order, vocab_size).fit(ids, whole).loss(*unseen),
    }


# -------------------------------------------------------------------------------------------------------------- main

STAGES: dict[str, Callable[[Stage], None]] = {"sft": sft}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.real_data", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/ and hh-harmless/")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results; a stage's old run is replaced")
    parser.add_argument("--stage", default="all", choices=["all", *STAGES])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in STAGES if args.stage == "all" else [args.stage]:
        stage = Stage(name, args.data, args.out, args.seed)
        shutil.rmtree(stage.folder, ignore_errors=True)
        try:
            STAGES[name](stage)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        stage.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
