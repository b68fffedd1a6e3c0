"""``rlhf-fast quickstart``: the whole road on a tiny model, measured on held-out prompts. Minutes on a CPU, no downloads.

The task is made here: two-digit sums, demonstrated by people who often forget the carry into the hundreds. Imitation (SFT)
learns the mistake too. A reward model learns from their comparisons, which are mostly sound; PPO follows the reward
model, GRPO follows a verifier that knows the answers. Policy, critic, reference and reward model of PPO are adapters on
the one SFT model.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.commands import Parser

HELD_OUT = 500
ANSWER_TOKENS = 6


def main(argv: Sequence[str]) -> int:
    parser = Parser("quickstart", __doc__.split("\n\n")[0].split(": ", 1)[1])
    parser.add_argument("-o", "--output_dir", default="runs/quickstart", help="folder for data, models and plots")
    parser.add_argument(
        "--reward",
        choices=("learned", "random"),
        default="learned",
        help="random is the negative control: with a reward of noise nothing may improve",
    )
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and sampling")
    args = parser.parse_args(argv)
    run(Path(args.output_dir), args.seed, args.reward)
    return 0


def run(out: Path, seed: int = 0, reward: str = "learned", quiet: bool = False) -> dict[str, dict[str, float]]:
    """All stages. Returns the figures of the final table, by stage, and writes them to ``out/results.json``."""
    # seconds of imports that --help should not cost
    import torch
    from transformers.utils import logging

    from rlhf_fast.data.tasks import forgetful_sums
    from rlhf_fast.models import load
    from rlhf_fast.models.scratch import new_model
    from rlhf_fast.rewards.model import RewardModel
    from rlhf_fast.run.metrics import print_table
    from rlhf_fast.run.plots import plot_bars, plot_run

    logging.disable_progress_bar()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(
            1
        )  # matrices this small gain nothing from a second, and lose all when it must share a core
    began = time.perf_counter()
    out = _fresh(out)
    train, held_out = forgetful_sums(held_out=HELD_OUT, seed=seed)
    for name, rows in {**train, "held_out": held_out}.items():
        _write(out / "data" / f"{name}.jsonl", rows)
    corpus = [r["prompt"] + r["completion"] for r in train["demonstrations"]]
    new_model("nano", corpus, out / "base", seed=seed, **MODEL)

    results = {}
    for stage in (_sft, _reward_model, _ppo, _grpo):
        started = time.perf_counter()
        name, figures = stage(out, train, held_out, seed, reward, quiet)
        results[name] = {**figures, "seconds": time.perf_counter() - started}
        plot_run(out / name)
    results["sft"] |= _accuracy(load(out / "sft"), held_out, RewardModel(out / "reward"))
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    print_table(
        f"held-out sums ({HELD_OUT}), {'random rewards: nothing may improve' if reward == 'random' else 'greedy answers'}",
        [_row(name, figures) for name, figures in results.items()],
        header=("stage", "accuracy", "reward model's score", "KL to SFT (nats)", "seconds"),
    )
    policies = {n: f for n, f in results.items() if "accuracy" in f}
    bars = plot_bars(
        out / "plots" / "accuracy.png",
        "held-out accuracy",
        list(policies),
        [f["accuracy"] for f in policies.values()],
        [f["accuracy_stderr"] for f in policies.values()],
    )
    print(
        f"\ncomparisons the reward model orders rightly: {results['reward']['accuracy_pairs']:.1%} of {HELD_OUT} held out"
    )
    print(f"plots: {bars} and {out}/*/plots/   data: {out / 'data'}   total: {time.perf_counter() - began:.0f} s")
    print(f'next:  rlhf-fast generate {out / "grpo"} --prompt "37+85="')
    return results


# ---- the stages: every setting that differs from a default is here to be seen

MODEL = {"hidden_size": 96, "num_hidden_layers": 4, "intermediate_size": 256}
COMMON = {"gradient_checkpointing": False, "logging_steps": 10, "save_steps": 1_000_000}
LORA = {"use_peft": True, "lora_r": 16, "lora_alpha": 32}


def _sft(out: Path, train: dict, held_out: list, seed: int, reward: str, quiet: bool):
    from rlhf_fast.trainers.sft import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(out / "sft"),
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        max_steps=600,
        per_device_train_batch_size=4,
        max_length=256,
        seed=seed,
        quiet=quiet,
        **{**COMMON, "logging_steps": 100},
    )
    trainer = SFTTrainer(str(out / "base"), args=config, train_dataset=train["demonstrations"])
    _finish(trainer)
    return "sft", {"kl": 0.0}  # judged at the end, when there is a reward model


def _reward_model(out: Path, train: dict, held_out: list, seed: int, reward: str, quiet: bool):
    from rlhf_fast.trainers.reward import RewardConfig, RewardTrainer

    config = RewardConfig(
        output_dir=str(out / "reward"),
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        max_steps=160,
        per_device_train_batch_size=64,
        seed=seed,
        quiet=quiet,
        **COMMON,
        **LORA,
    )
    pairs = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in held_out]
    trainer = RewardTrainer(str(out / "sft"), args=config, train_dataset=train["comparisons"], eval_dataset=pairs)
    return "reward", {"accuracy_pairs": _finish(trainer)["eval_accuracy"]}


def _ppo(out: Path, train: dict, held_out: list, seed: int, reward: str, quiet: bool):
    from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer

    config = PPOConfig(
        output_dir=str(out / "ppo"),
        reward_model_path=str(out / "reward") if reward == "learned" else None,
        reward_funcs=[] if reward == "learned" else [{"name": "random", "seed": seed}],
        learning_rate=4e-4,
        max_steps=80,
        per_device_train_batch_size=256,
        num_ppo_epochs=2,
        kl_coef=0.05,
        max_completion_length=ANSWER_TOKENS,
        rollout_batch_size=256,
        seed=seed,
        quiet=quiet,
        **COMMON,
        **LORA,
    )
    trainer = PPOTrainer(str(out / "sft"), args=config, train_dataset=train["prompts"])
    _finish(trainer)
    return "ppo", _judge(out, trainer, held_out, seed)


def _grpo(out: Path, train: dict, held_out: list, seed: int, reward: str, quiet: bool):
    from rlhf_fast.trainers.grpo import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=str(out / "grpo"),
        learning_rate=4e-4,
        max_steps=40,
        per_device_train_batch_size=256,
        num_generations=8,
        beta=0.02,
        max_completion_length=ANSWER_TOKENS,
        rollout_batch_size=256,
        seed=seed,
        quiet=quiet,
        **COMMON,
        **LORA,
    )
    functions = ["answer"] if reward == "learned" else [{"name": "random", "seed": seed}]
    trainer = GRPOTrainer(str(out / "sft"), functions, args=config, train_dataset=train["prompts"])
    _finish(trainer)
    return "grpo", _judge(out, trainer, held_out, seed)


def _finish(trainer: Any) -> dict[str, float]:
    """Train to the end; a run that was told to stop must not go on to the next stage."""
    figures = trainer.train()
    if not trainer.finished:
        raise KeyboardInterrupt
    return figures


# ---- measuring


def _prompts(policy: Any, held_out: list) -> list:
    from rlhf_fast.data.prepare import prepare_prompts

    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in held_out]
    return prepare_prompts(rows, policy.tokenizer)[0]


def _accuracy(policy: Any, held_out: list, reward_model: Any) -> dict[str, float]:
    """Greedy accuracy on the held-out sums, and the reward model's opinion of the same answers."""
    from rlhf_fast.rewards import evaluate_policy

    prompts = _prompts(policy, held_out)
    figures = evaluate_policy(policy, prompts, ["answer", reward_model], max_new_tokens=ANSWER_TOKENS)
    out = {"eos_rate": figures["eos_rate"]}
    for name, key in (("accuracy", "answer"), ("reward", reward_model.__name__)):
        out |= {name: figures[f"rewards/{key}/mean"], f"{name}_stderr": figures[f"rewards/{key}/stderr"]}
    return out


def _judge(out: Path, trainer: Any, held_out: list, seed: int) -> dict[str, float]:
    """Accuracy, the reward model's score, and how far the policy went from where it started, by samples of its own."""
    from rlhf_fast.rewards.model import RewardModel
    from rlhf_fast.rollout import Request, engine_for
    from rlhf_fast.trainers.evaluation import kl_to_reference

    figures = _accuracy(trainer.policy, held_out, RewardModel(out / "reward"))
    prompts = _prompts(trainer.policy, held_out)
    requests = [Request(p.input_ids, max_new_tokens=ANSWER_TOKENS, seed=seed + i) for i, p in enumerate(prompts)]
    samples = engine_for(trainer.policy).generate(requests)
    return {**figures, "kl": kl_to_reference(trainer, prompts, [s.ids for (s,) in samples])}


def _row(name: str, figures: dict[str, float]) -> tuple[str, ...]:
    def with_error(key: str, form: str) -> str:
        return f"{figures[key]:{form}} ± {figures[f'{key}_stderr']:{form}}" if key in figures else ""

    kl = figures.get("kl", math.nan)
    return (
        name,
        with_error("accuracy", ".1%"),
        with_error("reward", ".2f"),
        "" if math.isnan(kl) else f"{kl:.2f}",
        f"{figures['seconds']:.0f}",
    )


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _fresh(out: Path) -> Path:
    """``out``, or the first of out-2, out-3, ... that does not exist: an earlier quickstart is kept."""
    candidate, number = out, 2
    while candidate.exists() and any(candidate.iterdir()):
        candidate, number = out.with_name(f"{out.name}-{number}"), number + 1
    return candidate
