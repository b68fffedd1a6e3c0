"""Trains the cases of a JSON file in as many processes as there are, and notes every rank's figures beside it.

``python processes.py CASES.json`` with the environment that torchrun gives; ``test_processes`` starts it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

import rlhf_fast
from rlhf_fast.errors import UserError
from rlhf_fast.rollout import ServerEngine
from rlhf_fast.run.metrics import read_metrics
from rlhf_fast.run.sharding import gathered

KINDS = {
    "sft": "SFT",
    "reward": "Reward",
    "dpo": "DPO",
    "kto": "KTO",
    "grpo": "GRPO",
    "ppo": "PPO",
    "safe-ppo": "SafePPO",
}


def vowels(completions, **_):
    return [sum(c.count(v) for v in "aeiou") / 4 for c in completions]


def hold(trainer, tokens: int) -> None:
    """Let the device run out of memory in any training pass of more than ``tokens`` tokens."""

    def check(module, args):
        if torch.is_grad_enabled() and args[0].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    trainer.policy.model.get_input_embeddings().register_forward_pre_hook(check)


def train(
    kind: str, model: str, rows: list[dict], settings: dict, last_holds=None, evaluate=1, resume_from=None
) -> dict:
    """The figures of each step, and the norm of the weights and the largest micro-batch at the end.

    ``last_holds`` is how many tokens the last process has memory for, ``evaluate`` how many rows are held out, ``resume_from``
    the step of a checkpoint from which the run is made again: to the same weights, bit for bit?
    """
    trainer_class, config_class = (getattr(rlhf_fast, KINDS[kind] + part) for part in ("Trainer", "Config"))
    given = {"reward_funcs": vowels} if kind in ("grpo", "ppo", "safe-ppo") else {}
    trainer = trainer_class(
        model, args=config_class(**settings), train_dataset=rows, eval_dataset=rows[:evaluate], **given
    )
    if last_holds is not None and trainer.ranks.index == len(trainer.ranks) - 1:
        hold(trainer, last_holds)
    servers = getattr(trainer, "engine", None)
    servers = getattr(servers, "engine", servers)  # those that processes share
    if isinstance(servers, ServerEngine):
        servers.backoff = 0.01
    try:
        trainer.train()
    except UserError as error:
        return {"error": [type(error).__name__, str(error)]}
    result = {"steps": read_metrics(settings["output_dir"]), "weights": norms(trainer)}
    result |= {"budget": trainer.micro_batch_tokens, "sharded": trainer.sharded}
    if resume_from is not None:
        path = Path(settings["output_dir"]) / "checkpoints" / f"step-{resume_from:08d}"
        args = config_class(**settings, resume_from_checkpoint=str(path))
        again = trainer_class(model, args=args, train_dataset=rows, eval_dataset=rows[:evaluate], **given)
        again.train()
        same = [torch.equal(a, b) for a, b in zip(whole(trainer), whole(again), strict=True)]
        result["resumed"] = all(same) and again.step == trainer.step
    return result


def whole(trainer) -> list[torch.Tensor]:
    return [p.detach() for p in gathered(trainer.parameters)]


def norms(trainer) -> list[float]:
    return [float(p.double().norm()) for p in whole(trainer)]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    results = {name: train(**case) for name, case in json.loads(path.read_text()).items()}
    path.with_suffix(f".rank{os.environ.get('RANK', '0')}").write_text(json.dumps(results))
