"""Trains the cases of a JSON file in as many processes as there are, and notes every rank's figures beside it.

``python processes.py CASES.json`` with the environment that torchrun gives; ``test_processes`` starts it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import rlhf_fast
from rlhf_fast.run.metrics import read_metrics

KINDS = {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "kto": "KTO", "grpo": "GRPO", "ppo": "PPO"}


def vowels(completions, **_):
    return [sum(c.count(v) for v in "aeiou") / 4 for c in completions]


def train(kind: str, model: str, rows: list[dict], settings: dict) -> dict:
    """The figures of each step, and the norm of the weights at the end."""
    trainer_class, config_class = (getattr(rlhf_fast, KINDS[kind] + part) for part in ("Trainer", "Config"))
    given = {"reward_funcs": vowels} if kind in ("grpo", "ppo") else {}
    trainer = trainer_class(model, args=config_class(**settings), train_dataset=rows, eval_dataset=rows[:1], **given)
    trainer.train()
    weights = [float(p.detach().double().norm()) for p in trainer.parameters]
    return {"steps": read_metrics(settings["output_dir"]), "weights": weights}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    results = {name: train(**case) for name, case in json.loads(path.read_text()).items()}
    path.with_suffix(f".rank{os.environ.get('RANK', '0')}").write_text(json.dumps(results))
