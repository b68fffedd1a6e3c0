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
from rlhf_fast import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlhf_fast.data import load_records, parse_transcript, prepare_prompts, prepare_sft, train_test
from rlhf_fast.data.tasks import word_problems as make_word_problems
from rlhf_fast.errors import UserError
from rlhf_fast.models.scratch import new_model
from rlhf_fast.rewards import RewardModel, evaluate_policy
from rlhf_fast.run.metrics import print_table

Rows = list[dict[str, Any]]

QUESTIONS_HELD_OUT = 500  # of GSM8K's 7,473
PAIRS_HELD_OUT = 320  # of the 1,600 HH comparisons
SHORT_QUESTION = 240  # characters: prompts of reinforcement learning, about 90 tokens
SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@dataclass
class Stage:
    """Where a stage reads and writes, and what it found."""

    name: str
    data: Path
    out: Path
    seed: int
    max_steps: int | None = None  # of every training, to try the script out; None: as many as the stage sets
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
        shared = {"seed": self.seed, "gradient_checkpointing": False, "quiet": True, "save_steps": 500}
        shared |= {"max_steps": self.max_steps} if self.max_steps else {}
        return config_class(output_dir=str(self.folder / run), **{**settings, **shared})

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
        settings = {
            f"{what}: {key}": str(value) for what, values in self.settings.items() for key, value in values.items()
        }
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


# ---------------------------------------------------------------------------------------- GSM8K: right and wrong solutions


def reward_gsm8k(stage: Stage) -> None:
    """A reward model from solutions to one question of which one is right; whole questions are held out."""
    solved = load_records(stage.data / "gsm8k" / "model_solutions.jsonl")
    decidable = [row for row in solved if solution_pairs(row)]
    train, test = train_test(decidable, 0.2)
    pairs, held_out = ([pair for row in rows for pair in solution_pairs(row)] for rows in (train, test))
    args = stage.config(
        RewardConfig,
        use_peft=True,
        lora_r=16,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        num_train_epochs=2,
        per_device_train_batch_size=8,
    )
    trainer = RewardTrainer(str(stage.run_of("sft")), args=args, train_dataset=pairs)
    stage.train(trainer)
    stage.figures |= {"questions": len(train), "pairs": len(pairs), "held-out questions": len(test)}
    stage.figures |= reward_accuracy(stage.folder / "run", pairs, held_out, clusters="question")


def solution_pairs(row: dict[str, Any]) -> Rows:
    """Every right solution of a question against every wrong one, in the form of the SFT data (``#### n`` at the end)."""
    solutions = {row[s]["solution"].replace("\nA: ", "\n#### "): row[s]["is_correct"] for s in SOLVERS}
    right, wrong = ([text for text, good in solutions.items() if good is wanted] for wanted in (True, False))
    question = [{"role": "user", "content": row["question"]}]
    return [
        {"prompt": question, "chosen": good, "rejected": bad, "question": row["question"]}
        for good in right
        for bad in wrong
    ]


def reward_accuracy(run: Path, train: Rows, test: Rows, clusters: str | None = None) -> dict[str, Any]:
    """Held-out accuracy of a reward model, of always choosing the shorter or longer response, and standard errors.

    Args:
        clusters: the column that tells which pairs are not independent of each other; None: all are.
    """
    scored = RewardModel(run)
    right = [a > b for a, b in zip(pair_scores(scored, test, "chosen"), pair_scores(scored, test, "rejected"))]
    longer_is_better = share(longer(train)) >= 0.5
    by_length = [is_longer == longer_is_better for is_longer in longer(test)]
    groups = [row[clusters] for row in test] if clusters else list(range(len(test)))
    return {
        "held-out pairs": len(test),
        "held-out accuracy": share(right),
        "held-out accuracy, standard error": standard_error(right, groups),
        f"held-out accuracy of choosing the {'longer' if longer_is_better else 'shorter'}": share(by_length),
        "ahead of length, standard errors": z_score(right, by_length, groups),
        "ahead of chance, standard errors": (share(right) - 0.5) / standard_error(right, groups),
    }


def pair_scores(scored: RewardModel, pairs: Rows, which: str) -> list[float]:
    completions = [[{"role": "assistant", "content": text_of(row[which])}] for row in pairs]
    return scored([row["prompt"] for row in pairs], completions, [[] for _ in pairs])


def longer(pairs: Rows) -> list[bool]:
    """Whether the better response has more characters; an equal length counts as shorter."""
    return [len(text_of(row["chosen"])) > len(text_of(row["rejected"])) for row in pairs]


def text_of(response: str | Rows) -> str:
    return response if isinstance(response, str) else response[-1]["content"]


def share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def standard_error(values: Sequence[float], groups: Sequence[Any]) -> float:
    """Of the mean of ``values``, those of one group counting as one draw (Liang & Zeger 1986)."""
    mean = sum(values) / len(values)
    sums: dict[Any, float] = {}
    for value, group in zip(values, groups):
        sums[group] = sums.get(group, 0.0) + value - mean
    return math.sqrt(sum(x * x for x in sums.values()) * len(sums) / max(len(sums) - 1, 1)) / len(values)


def z_score(a: Sequence[bool], b: Sequence[bool], groups: Sequence[Any]) -> float:
    """By how many standard errors the mean of ``a`` exceeds that of ``b``, compared row by row."""
    differences = [float(x) - float(y) for x, y in zip(a, b)]
    error = standard_error(differences, groups)
    return share(differences) / error if error else math.nan


# ----------------------------------------------------------------------------------------------------- GSM8K: RL


def ppo(stage: Stage) -> None:
    """PPO from the SFT policy against the reward model. Policy, critic, reference, reward model: one base, LoRA."""
    train, test = short_questions(stage)
    args = stage.config(
        PPOConfig,
        use_peft=True,
        learning_rate=3e-4,
        lr_scheduler_type="constant_with_warmup",
        max_steps=40,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=3,
        num_ppo_epochs=2,
        kl_coef=0.05,
        missing_eos_penalty=1.0,
        max_completion_length=96,
        rollout_batch_size=100,
        num_eval_prompts=100,
        reward_weights=[0.0, 1.0],  # the answer is only watched; the reward model comes last
        critic_warmup_steps=4,
        logging_steps=2,
    )
    args.reward_model_path = str(stage.run_of("reward-gsm8k"))
    trainer = PPOTrainer(
        str(stage.run_of("sft")), args=args, reward_funcs=["answer"], train_dataset=train, eval_dataset=test
    )
    before = trainer.evaluate()
    last = stage.train(trainer)
    stage.figures |= before_after(before, last, "rewards/reward_model/mean", "rewards/answer/mean", "eos_rate")
    stage.figures |= curve(stage, "objective/scores", "objective/kl", "val/explained_variance")
    stage.figures["reference"] = trainer.policy.reference


def grpo_gsm8k(stage: Stage) -> None:
    """GRPO with the answer verifier on real problems, which a model this small hardly ever solves."""
    train, test = short_questions(stage)
    args = stage.config(
        GRPOConfig,
        use_peft=True,
        learning_rate=1e-4,
        max_steps=12,
        num_generations=8,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=4,
        max_completion_length=128,
        rollout_batch_size=100,
        num_eval_prompts=200,
        logging_steps=1,
    )
    trainer = GRPOTrainer(
        str(stage.run_of("sft")), args=args, reward_funcs=["answer"], train_dataset=train, eval_dataset=test
    )
    before = trainer.evaluate()
    last = stage.train(trainer)
    stage.figures |= before_after(before, last, "rewards/answer/mean", "eos_rate")
    steps = metrics(stage)
    for name in ("frac_reward_zero_std", "reward"):
        stage.figures[f"{name}, mean over the run"] = sum(m[name] for m in steps) / len(steps)


def short_questions(stage: Stage) -> tuple[Rows, Rows]:
    return tuple([row for row in part if len(row["question"]) <= SHORT_QUESTION] for part in gsm8k(stage))


def metrics(stage: Stage, run: str = "run") -> Rows:
    """The training lines of a run's metrics.jsonl."""
    lines = (stage.folder / run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "lr" in row]


def curve(stage: Stage, *names: str, run: str = "run") -> dict[str, float]:
    """Means over the first and last tenth of a run's log lines."""
    rows = metrics(stage, run)
    some = max(1, len(rows) // 10)
    parts = {"first tenth": rows[:some], "last tenth": rows[-some:]}
    return {f"{n}, {part}": sum(r[n] for r in lines) / len(lines) for n in names for part, lines in parts.items()}


def before_after(before: dict[str, float], after: dict[str, float], *names: str) -> dict[str, float]:
    """Held-out figures before and after, and their standard errors where there are any."""
    figures = {}
    for name in names:
        for when, values in (("before", before), ("after", after)):
            figures[f"held-out {name}, {when}"] = values[f"eval_{name}"]
            stderr = f"eval_{name.removesuffix('/mean')}/stderr"
            if name.endswith("/mean"):
                figures[f"held-out {name}, {when}, standard error"] = values[stderr]
    return figures


# ----------------------------------------------------------------------------------------------------- word problems


def word_problems(stage: Stage) -> None:
    """SFT on made problems to a plateau that leaves room, then GRPO with the answer verifier."""
    train, test = make_word_problems(4000, held_out=500, steps=(1, 2, 3), seed=stage.seed)
    folder = stage.new_model("nano", [row["prompt"] + row["completion"] for row in train])
    args = stage.config(
        SFTConfig,
        "sft",
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        num_train_epochs=8,
        max_length=512,
        per_device_train_batch_size=4,
    )
    trainer = SFTTrainer(str(folder), args=args, train_dataset=train, eval_dataset=test)
    stage.figures["held-out nats per completion token after SFT"] = stage.train(trainer)["eval_loss"]
    args = stage.config(
        GRPOConfig,
        learning_rate=3e-4,
        lr_scheduler_type="constant_with_warmup",
        max_steps=150,
        num_generations=8,
        per_device_train_batch_size=128,
        max_completion_length=40,
        num_eval_prompts=500,
        rollout_batch_size=256,
        logging_steps=5,
    )
    trainer = GRPOTrainer(
        str(stage.folder / "sft"), args=args, reward_funcs=["answer"], train_dataset=train, eval_dataset=test
    )
    before = trainer.evaluate()
    last = stage.train(trainer)
    stage.figures |= before_after(before, last, "rewards/answer/mean", "eos_rate")
    stage.figures |= curve(stage, "reward", "frac_reward_zero_std")


# ---------------------------------------------------------------------------------------------------------------- HH


def hh(stage: Stage) -> tuple[Any, Any]:
    """Training and held-out comparisons, without the four whose transcripts have an empty turn."""
    rows = load_records(stage.data / "hh-harmless" / "pairs.jsonl")
    turns = [[*parse_transcript(row["chosen"]), *parse_transcript(row["rejected"])] for row in rows]
    return train_test(rows.select(i for i, said in enumerate(turns) if all(m["content"] for m in said)), PAIRS_HELD_OUT)


def sft_hh(stage: Stage) -> None:
    """SFT from scratch on the chosen transcripts, every turn of them: there is little text."""
    train, test = hh(stage)
    folder = stage.new_model("tiny", [row[which] for row in train for which in ("chosen", "rejected")])
    args = stage.config(
        SFTConfig,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        num_train_epochs=4,
        max_length=1024,
        per_device_train_batch_size=2,
        assistant_only_loss=False,
    )
    chosen = [[{"messages": parse_transcript(row["chosen"])} for row in rows] for rows in (train, test)]
    trainer = SFTTrainer(str(folder), args=args, train_dataset=chosen[0], eval_dataset=chosen[1])
    untrained = trainer.evaluate()["eval_loss"]
    last = stage.train(trainer)
    stage.figures |= {
        "parameters": sum(p.numel() for p in trainer.policy.parameters()),
        "held-out nats per token, untrained": untrained,
        "held-out nats per token, trained": last["eval_loss"],
    }


def reward_hh(stage: Stage) -> None:
    """A reward model from the human comparisons."""
    train, test = hh(stage)
    args = stage.config(
        RewardConfig,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        num_train_epochs=2,
        per_device_train_batch_size=16,
    )
    trainer = RewardTrainer(str(stage.run_of("sft-hh")), args=args, train_dataset=train)
    last = stage.train(trainer)
    stage.figures |= {"pairs": len(train), "training accuracy, last steps": last["accuracy"]}
    stage.figures |= reward_accuracy(stage.folder / "run", as_messages(train), as_messages(test))


def as_messages(rows: Rows) -> Rows:
    """Comparisons as prompt messages and the last message of each transcript."""
    split = [(parse_transcript(row["chosen"]), parse_transcript(row["rejected"])) for row in rows]
    return [{"prompt": a[:-1], "chosen": a[-1:], "rejected": b[-1:]} for a, b in split]


def dpo(stage: Stage) -> None:
    """DPO from the HH SFT policy; what it says is judged by the HH reward model."""
    train, test = hh(stage)
    args = stage.config(
        DPOConfig,
        learning_rate=2e-5,
        lr_scheduler_type="cosine",
        num_train_epochs=1,
        per_device_train_batch_size=16,
        precompute_ref_log_probs=True,
    )
    trainer = DPOTrainer(str(stage.run_of("sft-hh")), args=args, train_dataset=train, eval_dataset=test)
    judged_before = judge(stage, trainer, test)
    last = stage.train(trainer)
    sums = [record.ref_logprobs for record in trainer.eval_records]
    stage.figures |= {
        "held-out pairs": len(sums),
        "held-out accuracy of the SFT policy's log-probabilities": share([a > b for a, b in sums]),
        **{f"held-out {name}": last[f"eval_{name}"] for name in ("loss", "rewards/accuracies", "rewards/margins")},
        "held-out rewards/accuracies, standard error": math.sqrt(
            last["eval_rewards/accuracies"] * (1 - last["eval_rewards/accuracies"]) / len(sums)
        ),
    }
    stage.figures |= before_after(judged_before, judge(stage, trainer, test), "rewards/run/mean", "eos_rate")


def judge(stage: Stage, trainer: DPOTrainer, rows: Rows) -> dict[str, float]:
    """Greedy responses to 100 held-out prompts, scored by the HH reward model."""
    prompts, _ = prepare_prompts(rows, trainer.tokenizer, max_prompt_length=512, allow_truncation=True)
    figures = evaluate_policy(
        trainer.policy, prompts[:100], [RewardModel(stage.run_of("reward-hh"))], max_new_tokens=96, slots=100
    )
    return {f"eval_{name}": value for name, value in figures.items()}


# -------------------------------------------------------------------------------------------------------------- main

# in an order in which each finds what it needs
STAGES: dict[str, Callable[[Stage], None]] = {
    "sft": sft,
    "reward-gsm8k": reward_gsm8k,
    "ppo": ppo,
    "grpo-gsm8k": grpo_gsm8k,
    "word-problems": word_problems,
    "sft-hh": sft_hh,
    "reward-hh": reward_hh,
    "dpo": dpo,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.real_data", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/ and hh-harmless/")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for runs and results; a stage's old run is replaced"
    )
    parser.add_argument("--stage", default="all", choices=["all", *STAGES])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int, help="optimizer steps of every training, to try the script out")
    args = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in STAGES if args.stage == "all" else [args.stage]:
        stage = Stage(name, args.data, args.out, args.seed, args.max_steps)
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
