"""What is trained: one row of a table per task, trainer and variant, times libraries and seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MODEL = {"hidden_size": 64, "num_hidden_layers": 2}
LORA = {"lora_r": 16, "lora_alpha": 32}
BOTH = {"warmup": 0.03, "weight_decay": 0.0, "max_grad_norm": 1.0, "dtype": "float32"}
ROUND = 128  # responses that PPO and GRPO sample at a time

# names and meanings are the same on both sides, so that both are given these as they stand
SFT = {"learning_rate": 3e-3, "packing": False, "completion_only_loss": True, "per_device_train_batch_size": 64}
REWARD = {"learning_rate": 2e-3, "lr_scheduler_type": "cosine", "center_rewards_coefficient": 0.01}
DPO = {"learning_rate": 1e-4, "beta": 0.1}
SAMPLING = {"per_device_train_batch_size": ROUND, "temperature": 1.0, "learning_rate": 2e-3}
GRPO = {**SAMPLING, "num_generations": 8, "beta": 0.0, "loss_type": "dapo"}
PPO = {**SAMPLING, "num_ppo_epochs": 2, "kl_coef": 0.02}
OFFLINE = {"max_steps": 200, "per_device_train_batch_size": 32}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "addition": {
        "sft": {**SFT, "lr_scheduler_type": "constant_with_warmup", "max_steps": 1_000},  # at most
        "dpo": {**DPO, **OFFLINE, "max_steps": 100},
        "ppo": {**PPO, "max_steps": 2 * 80, "max_completion_length": 5},
        "grpo": {**GRPO, "max_steps": 80, "max_completion_length": 5},
    },
    "stories": {
        "sft": {**SFT, "lr_scheduler_type": "constant_with_warmup", "max_steps": 2_000},  # at most
        "ppo": {**PPO, "max_steps": 2 * 80, "max_completion_length": 32},
        "grpo": {**GRPO, "max_steps": 80, "max_completion_length": 32},
    },
    "preference": {
        "sft": {**SFT, "lr_scheduler_type": "cosine", "max_steps": 200},
        "reward": {**REWARD, **OFFLINE},
        "ranked": {**REWARD, **OFFLINE},
        "dpo": {**DPO, **OFFLINE},
        "ppo": {**PPO, "max_steps": 2 * 40, "max_completion_length": 16},
        "grpo": {**GRPO, "max_steps": 40, "max_completion_length": 16},
    },
}
# on these SFT stops early, as soon as it answers so many of 200 training prompts; the held-out ones have no say
STOPS = ("addition", "stories")
ENOUGH = 0.4
CHECKED_EVERY = 10  # steps
RANDOM, FROZEN = "random reward", "kl_coef 20"
# for half as long, and one thing changed: a reward of noise must teach nothing, a high price of KL must freeze the policy
VARIANTS: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    ("addition", "ppo"): {RANDOM: {"max_steps": 2 * 40}, FROZEN: {"max_steps": 2 * 40, "kl_coef": 20.0}},
    ("addition", "grpo"): {RANDOM: {"max_steps": 40}},
}
IN_TRL = ("sft", "reward", "dpo", "grpo")  # 1.16 has no PPO and no reward models from rankings
TITLES = {"sft": "SFT", "reward": "Reward", "ranked": "Reward", "dpo": "DPO", "ppo": "PPO", "grpo": "GRPO"}
QUICK = {"max_steps": 2, "per_device_train_batch_size": 8}


@dataclass(frozen=True)
class Cell:
    """One training run."""

    task: str
    trainer: str
    variant: str = ""
    library: str = "rlhf_fast"
    seed: int = 0
    quick: bool = False  # two steps, to see that it runs

    def __str__(self) -> str:
        return " ".join(filter(None, (self.task, self.trainer, self.variant, self.library, f"seed {self.seed}")))

    @property
    def settings(self) -> dict[str, Any]:
        found = {
            **SETTINGS[self.task][self.trainer],
            **VARIANTS.get((self.task, self.trainer), {}).get(self.variant, {}),
        }
        return {**found, **QUICK} if self.quick else found

    @property
    def in_trl(self) -> bool:
        """TRL has the trainer; and on the preference task both sides start from our SFT model."""
        return self.trainer in IN_TRL and (self.task, self.trainer) != ("preference", "sft")

    @property
    def learns_from_samples(self) -> bool:
        return self.trainer in ("ppo", "grpo")

    @property
    def rows_per_step(self) -> float:
        """Responses sampled, or rows of data read, per optimizer step: what the curves have on their x axis."""
        return self.settings["per_device_train_batch_size"] / self.settings.get("num_ppo_epochs", 1)

    @property
    def tuned_weights(self) -> dict[str, Any]:
        return {"use_peft": False} if self.trainer == "sft" else {"use_peft": True, **LORA}

    @property
    def all_settings(self) -> dict[str, Any]:
        """What the page prints; the rest are the trainer's defaults."""
        return self.settings | self.tuned_weights | BOTH

    def folder(self, out: Path) -> Path:
        name = "-".join([self.trainer, *self.variant.split()])
        return out / f"seed-{self.seed}" / self.task / name / self.library


def cells(tasks: Sequence[str], seeds: Sequence[int], peers: bool, quick: bool) -> Iterator[Cell]:
    """All cells, those first that others start from, the controls last."""
    if "preference" in tasks and "addition" not in tasks:  # which goes on from there
        yield from (Cell("addition", "sft", seed=seed, quick=quick) for seed in seeds)
    for controls in (False, True):
        for seed in seeds:
            for task in tasks:
                for trainer in SETTINGS[task]:
                    for variant in VARIANTS.get((task, trainer), {}) if controls else ("",):
                        cell = Cell(task, trainer, variant, seed=seed, quick=quick)
                        yield cell
                        if peers and cell.in_trl:
                            yield replace(cell, library="trl")
