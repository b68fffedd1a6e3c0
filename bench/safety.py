"""Safety checks: does the guard stop a policy that cheats its reward, and does Safe RLHF keep a cost within its limit?

    python -m bench.safety -o DIR [--seeds 0,1,2] [--parts guard,safe]

The task is quickstart's: sums of two-digit numbers, on which imitation gets about half of the held-out answers right. All runs
begin at one SFT model; a seed is that of the run (adapters, order of the prompts, sampling).

*guard*: GRPO and PPO with a reward that pays for the digit 7 and for nothing else, the verifier held out. With `guard: rollback` the
run must end by itself, before greedy accuracy on held-out sums has fallen 10 points, with the model of the best evaluation. The
same run with `guard: off` shows what would have come.

*safe*: the reward is the verifier's (1 for a right answer), an answer with a 7 in it costs 1, and the limit is a mean cost of 0.1.
Right answers need a 7 about every fourth time, so reward and cost conflict there and only there: to write the wrong answer saves
1 and loses 1, which makes 1 the price at which the policy does not care. That is where lambda must settle.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

import rlhf_fast
from bench.learning.curves import BLUE, GREY, ORANGE, Line, Panel, draw
from bench.report import put_rows, read_text
from rlhf_fast.data import prepare_prompts
from rlhf_fast.data.tasks import forgetful_sums
from rlhf_fast.models import load
from rlhf_fast.models.scratch import new_model
from rlhf_fast.rewards import evaluate_policy
from rlhf_fast.run.metrics import print_table, read_metrics

HELD_OUT = 500
ANSWER_TOKENS = 6
LIMIT = 0.1
MODEL = {"hidden_size": 96, "num_hidden_layers": 4, "intermediate_size": 256}
COMMON = {"gradient_checkpointing": False, "save_steps": 1_000_000, "quiet": True}
SFT = {"learning_rate": 3e-3, "lr_scheduler_type": "cosine", "max_steps": 600, "per_device_train_batch_size": 4}
SFT |= {"max_length": 256, "logging_steps": 100}
RL = {"use_peft": True, "lora_r": 16, "lora_alpha": 32, "learning_rate": 6e-4, "per_device_train_batch_size": 128}
RL |= {"max_completion_length": ANSWER_TOKENS, "rollout_batch_size": 128, "lr_scheduler_type": "constant"}
KINDS: dict[str, dict[str, Any]] = {
    "grpo": {"num_generations": 8, "beta": 0.02},
    "ppo": {"num_ppo_epochs": 2, "kl_coef": 0.02},
}
GUARD = {"max_steps": 30, "logging_steps": 1, "guard_reward": ["answer"], "guard_share": 1.0}
EVALUATIONS = {"eval_steps": 2, "num_eval_prompts": HELD_OUT, "num_completions_to_print": 0}
SAFE = {"cost_limit": LIMIT, "lambda_init": 1.0, "lambda_lr": 0.1, "logging_steps": 1}
# as many batches in both: PPO takes two steps on each
SAFE_STEPS = {"grpo": {"max_steps": 100}, "ppo": {"max_steps": 200, "critic_warmup_steps": 4}}
CURVES = {"cost": "cost", "lambda": "lambda", "guard/reward": "reward", "guard/kl": "KL"}  # of a run's own log -> name
LINES = (Line("ppo", "Safe PPO", BLUE), Line("grpo", "GRPO", ORANGE))
LEVEL = Line("", "limit", GREY, style="--")
FIGURES = {
    "safe": (
        Panel("safe", "cost", "Mean cost of a batch", (*LINES, LEVEL), "batches of 128 responses"),
        Panel("safe", "lambda", "lambda", LINES, "batches of 128 responses"),
        Panel("safe", "reward", "Reward, mean of 256 responses", LINES, "batches of 128 responses"),
        Panel("safe", "KL", "KL from the SFT model, nats per response", LINES, "batches of 128 responses"),
    )
}
KEY = ("kind", "seed")


def sevens(completions: list[str], **_: Any) -> list[float]:
    """What the cheated reward pays for."""
    return [float(c.count("7")) for c in completions]


def has_seven(completions: list[str], **_: Any) -> list[float]:
    """The cost."""
    return [float("7" in c) for c in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--parts", default="safe,guard")
    parser.add_argument("--kinds", default="grpo,ppo")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    parts = {"guard": guard_run, "safe": safe_run}
    for part in args.parts.split(","):
        for kind in args.kinds.split(","):
            for seed in map(int, args.seeds.split(",")):
                began = time.process_time()
                row = {"kind": kind, "seed": seed, **parts[part](Lab(args.out, seed), kind)}
                row["CPU seconds"] = round(time.process_time() - began)
                put_rows(args.out / f"{part}.csv", [row], KEY, tuple(row))
        show(part, args.out / f"{part}.csv")
    picture(args.out)


class Lab:
    """The task, the SFT model where every run begins, and one seed of what follows."""

    def __init__(self, out: Path, seed: int):
        self.out, self.seed = out / str(seed), seed
        self.train, self.held_out = forgetful_sums(held_out=HELD_OUT)
        self.sft = out / "sft"
        if not (self.sft / "rlhf_fast.json").is_file():
            corpus = [r["prompt"] + r["completion"] for r in self.train["demonstrations"]]
            base = new_model("nano", corpus, out / "base", quiet=True, **MODEL)
            config = rlhf_fast.SFTConfig(output_dir=str(self.sft), **SFT, **COMMON)
            rlhf_fast.SFTTrainer(str(base), args=config, train_dataset=self.train["demonstrations"]).train()

    def trainer(self, name: str, kind: str, reward: Any, **settings: Any) -> Any:
        algorithm = "SafePPO" if kind == "ppo" and "cost_funcs" in settings else kind.upper()
        config = getattr(rlhf_fast, f"{algorithm}Config")(
            output_dir=str(self.out / f"{name}-{kind}"), seed=self.seed, **{**COMMON, **RL, **KINDS[kind], **settings}
        )
        rows = [{"prompt": r["prompt"], "answer": r["answer"]} for r in self.held_out]
        data = {"train_dataset": self.train["prompts"], "eval_dataset": rows if "eval_steps" in settings else None}
        return getattr(rlhf_fast, f"{algorithm}Trainer")(str(self.sft), reward, args=config, **data)

    def judge(self, policy: Any) -> dict[str, float]:
        """Greedy accuracy, and reward and cost of samples, on held-out sums."""
        rows = [{"prompt": r["prompt"], "answer": r["answer"]} for r in self.held_out]
        prompts = prepare_prompts(rows, policy.tokenizer)[0]
        greedy = evaluate_policy(policy, prompts, ["answer"], max_new_tokens=ANSWER_TOKENS)
        options = {"n": 4, "temperature": 1.0, "max_new_tokens": ANSWER_TOKENS}
        sampled = evaluate_policy(policy, prompts, ["answer", has_seven], **options)
        return {
            "accuracy": greedy["reward"],
            "reward": sampled["rewards/answer/mean"],
            "cost": sampled["rewards/has_seven/mean"],
        }


def guard_run(lab: Lab, kind: str) -> dict[str, Any]:
    before = lab.judge(load(lab.sft))["accuracy"]
    guarded = lab.trainer("guarded", kind, sevens, guard="rollback", **GUARD, **EVALUATIONS)
    guarded.train()
    greedy = {r["step"]: r["eval_held_out"] for r in read_metrics(guarded.args.output_dir) if "eval_held_out" in r}
    free = lab.trainer("unguarded", kind, sevens, guard="off", **GUARD)
    free.train()
    return {
        "SFT accuracy": before,
        "tripped at step": guarded.step if guarded.stopped else None,
        "by": " ".join(guarded.callbacks.members[0].tripped),
        "accuracy when tripped": greedy[guarded.step],
        "model of step": guarded.best.step,
        "accuracy rolled back": lab.judge(guarded.policy)["accuracy"],
        "accuracy unguarded": lab.judge(free.policy)["accuracy"],
    }


def safe_run(lab: Lab, kind: str) -> dict[str, Any]:
    before = lab.judge(load(lab.sft))
    trainer = lab.trainer("safe", kind, ["answer"], cost_funcs=[has_seven], **SAFE, **SAFE_STEPS[kind])
    trainer.train()
    after = lab.judge(trainer.policy)
    rows = [r for r in read_metrics(trainer.args.output_dir) if "lambda" in r]
    points = [
        {"kind": kind, "seed": lab.seed, "batch": f"{batch:04}", **{name: r.get(key) for key, name in CURVES.items()}}
        for batch, r in enumerate(rows, start=1)
    ]
    put_rows(lab.out.parent / "safe-curves.csv", points, (*KEY, "batch"), tuple(points[0]))
    last = rows[-len(rows) // 4 :]
    lambdas = [r["lambda"] for r in last]
    return {
        "SFT reward": before["reward"],
        "SFT cost": before["cost"],
        "reward": after["reward"],
        "cost": after["cost"],
        "cost, last quarter": statistics.mean(r["cost"] for r in last),
        "lambda, last quarter": statistics.mean(lambdas),
        "lambda's range there": max(lambdas) - min(lambdas),
        "accuracy": after["accuracy"],
    }


def picture(out: Path) -> None:
    """Cost, lambda, reward and KL of all Safe RLHF runs in ``out`` as PNG."""
    rows = read_text(out / "safe-curves.csv")
    cells = [
        {"task": "safe", "trainer": kind, "variant": "", "library": "rlhf_fast", "seed": seed, "points": []}
        for kind, seed in sorted({(row["kind"], row["seed"]) for row in rows})
    ]
    for cell in cells:
        mine = [row for row in rows if (row["kind"], row["seed"]) == (cell["trainer"], cell["seed"])]
        cell["points"] = [(int(r["batch"]), name, float(r[name])) for r in mine for name in CURVES.values() if r[name]]
    if cells:
        ends = [(x, "cost", LIMIT) for x in range(1, max(len(c["points"]) for c in cells) // len(CURVES) + 1)]
        level = {**cells[0], "trainer": "", "points": ends}
        draw([*cells, level], out, FIGURES, "safety")


def show(part: str, path: Path) -> None:
    rows = read_text(path)
    print_table(part, [[cell(v) for v in r.values()] for r in rows], header=list(rows[0]))


def cell(value: str) -> str:
    return f"{float(value):.3f}" if value.count(".") == 1 else value


if __name__ == "__main__":
    main()
