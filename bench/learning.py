"""Learning checks: does each trainer learn what it should, and as well as TRL's on the same task with the same settings?

    python -m bench.learning -o DIR [--stages sft,reward,dpo,ppo,grpo] [--seed 0] [--peers trl|none]

The task is quickstart's: sums of two-digit numbers, demonstrated by people who mostly forget the carry into the hundreds.
That mistake is planted. It is the gap that rewards and comparisons can close, and these checks show no more than that they
close it; they do not show a policy that learns to add by reinforcement. One model from scratch, trained on the demonstrations,
is where both sides' later stages start. One judge for both: ``evaluate_policy`` on 500 held-out sums, reading the folders
that the trainers wrote. DIR keeps the models, ``learning.json`` and ``learning.md``; a stage that is run again replaces its rows.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

import rlhf_fast
from rlhf_fast.data import prepare_preferences, prepare_prompts
from rlhf_fast.data.batch import Example, Preference, TokenBatch
from rlhf_fast.data.tasks import forgetful_sums
from rlhf_fast.kernels import sequence_logprobs
from rlhf_fast.models import load
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.models.scratch import new_model
from rlhf_fast.rewards import RewardModel, evaluate_policy, resolve
from rlhf_fast.run.metrics import print_table, read_metrics

HELD_OUT = 500
ANSWER_TOKENS = 6
MODEL = {"hidden_size": 96, "num_hidden_layers": 4, "intermediate_size": 256}
LORA = {"lora_r": 16, "lora_alpha": 32}
TRAINERS = {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "ppo": "PPO", "grpo": "GRPO"}
DATA = {"sft": "demonstrations", "reward": "comparisons", "dpo": "comparisons", "ppo": "prompts", "grpo": "prompts"}

# given to both sides as they stand: the names and their meanings are the same
SAMPLING = {"max_completion_length": ANSWER_TOKENS, "temperature": 1.0, "learning_rate": 4e-4}
SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "max_steps": 400,
        "per_device_train_batch_size": 128,
        "packing": False,
        "completion_only_loss": True,
    },
    "reward": {
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "max_steps": 400,
        "per_device_train_batch_size": 64,
        "center_rewards_coefficient": 0.01,
    },
    "dpo": {"learning_rate": 1e-4, "max_steps": 140, "per_device_train_batch_size": 64, "beta": 0.1},
    "grpo": {
        **SAMPLING,
        "max_steps": 40,
        "per_device_train_batch_size": 256,
        "num_generations": 8,
        "beta": 0.0,
        "loss_type": "dapo",
    },
    "ppo": {
        **SAMPLING,
        "max_steps": 160,
        "per_device_train_batch_size": 256,
        "num_ppo_epochs": 4,
        "kl_coef": 0.05,
        "logging_steps": 4,
    },
}
BOTH = {"warmup": 0.03, "weight_decay": 0.0, "max_grad_norm": 1.0, "dtype": "float32"}
NOISE = "random reward"
# same settings but for one: a high price of KL must freeze the policy, a reward of noise must teach nothing, and a critic
# that is trained alone, on a policy that holds still, must come to explain the returns
CONTROLS: dict[str, dict[str, dict[str, Any]]] = {
    "ppo": {"kl_coef 20": {"kl_coef": 20.0}, NOISE: {}, "critic alone": {"critic_warmup_steps": 160}},
    "grpo": {NOISE: {}},
}


@dataclass
class Lab:
    """One seed's task, models and findings."""

    out: Path
    seed: int
    train_seed: int
    peers: str

    def __post_init__(self) -> None:
        self.train, self.held_out = forgetful_sums(held_out=HELD_OUT, seed=self.seed)
        self.base, self.ours = self.out / "base", self.out / "ours"
        if not (self.base / "config.json").is_file():
            corpus = [row["prompt"] + row["completion"] for row in self.train["demonstrations"]]
            new_model("nano", corpus, self.base, seed=self.seed, quiet=True, **MODEL)
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in self.held_out]
        pairs = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in self.held_out]
        self.prompts = prepare_prompts(rows, tokenizer)[0]
        self.pairs = prepare_preferences(pairs, tokenizer)[0]

    def start(self, stage: str) -> Path:
        return self.base if stage == "sft" else self.ours / "sft"

    def seed_of(self, stage: str) -> int:
        return self.seed if stage == "sft" else self.train_seed


@dataclass
class Run:
    """A trained model and what training it took."""

    folder: Path
    seconds: float  # of train(), by the clock
    cpu_seconds: float  # of train(), spent by this process: other people's load on the machine does not count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(TRAINERS), help="of sft, reward, dpo, ppo, grpo")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and SFT")
    parser.add_argument("--train_seed", type=int, help="of the stages after SFT; default: seed")
    parser.add_argument("--peers", choices=("trl", "none"), default="trl")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    asked = args.stages.split(",")
    if unknown := set(asked) - set(TRAINERS):
        parser.error(f"unknown stage {min(unknown)}; choose of {', '.join(TRAINERS)}")
    transformers_logging.disable_progress_bar()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    seeds = {"seed": args.seed, "train_seed": args.seed if args.train_seed is None else args.train_seed}
    lab = Lab(args.out, **seeds, peers=args.peers)
    needed = {"sft": True, "reward": "ppo" in asked}  # where later stages start, and PPO's reward
    stages = [s for s in TRAINERS if s in asked or (needed.get(s) and not (lab.ours / s / "config.yaml").is_file())]
    report = args.out / "learning.json"
    found = json.loads(report.read_text()) if report.is_file() else {**seeds, "stages": {}}
    if any(found[name] != value for name, value in seeds.items()):
        parser.error(f"{args.out} holds seed {found['seed']}, train_seed {found['train_seed']}; give another folder")
    found["machine"] = machine()
    for stage in stages:
        found["stages"][stage] = run_stage(lab, stage)
        report.write_text(json.dumps(found, indent=2) + "\n")
        show(stage, found["stages"][stage])
    (args.out / "learning.md").write_text(markdown(found))


def run_stage(lab: Lab, stage: str) -> dict[str, Any]:
    """Train both sides, judge the start and what came out: figures[side][metric] = value or (value, standard error)."""
    runs = {"ours": train_ours(lab, stage)}
    for name, changes in CONTROLS.get(stage, {}).items():
        runs[name] = train_ours(lab, stage, name, changes)
    if lab.peers == "trl" and stage != "ppo":  # TRL 1.16 has no PPO
        runs["TRL"] = train_trl(lab, stage)
        if stage == "grpo":
            runs[f"TRL, {NOISE}"] = train_trl(lab, stage, NOISE)
    figures = {side: JUDGES[stage](lab, run.folder) for side, run in runs.items()}
    if stage != "reward":  # whose head is new
        figures["start"] = JUDGES[stage](lab, lab.start(stage))
    if stage == "ppo":
        for side, run in runs.items():
            figures[side] |= ppo_metrics(run.folder)
    for side, run in runs.items():
        figures[side] |= {"seconds": run.seconds, "CPU seconds": run.cpu_seconds}
        if stage == "sft":
            tokens = sum(len(p.input_ids) + 4 for p in lab.prompts) / len(lab.prompts)  # three digits and a stop token
            seen = tokens * SETTINGS["sft"]["per_device_train_batch_size"] * SETTINGS["sft"]["max_steps"]
            figures[side]["tokens per CPU second"] = seen / run.cpu_seconds
    settings = {**SETTINGS[stage], **({} if stage == "sft" else LORA), **BOTH}
    return {"settings": settings, "figures": figures}


# ---- training


def train_ours(lab: Lab, stage: str, name: str = "", changes: dict[str, Any] | None = None) -> Run:
    out = lab.ours / "-".join([stage, *name.split()])
    rewards: dict[str, Any] = {}
    if stage == "grpo" or name == NOISE:
        rewards = {"reward_funcs": [reward_spec(lab, name)]}
    elif stage == "ppo":
        rewards = {"reward_model_path": str(lab.ours / "reward")}
    config = getattr(rlhf_fast, f"{TRAINERS[stage]}Config")(
        output_dir=str(out),
        seed=lab.seed_of(stage),
        gradient_checkpointing=False,
        quiet=True,
        save_steps=1_000_000,
        warmup_ratio=BOTH["warmup"],
        dtype="float32",
        use_peft=stage != "sft",
        **LORA,
        **({"rollout_batch_size": 256} if stage in ("ppo", "grpo") else {}),
        **rewards,
        **{**SETTINGS[stage], **(changes or {})},
    )
    trainer = getattr(rlhf_fast, f"{TRAINERS[stage]}Trainer")(
        str(lab.start(stage)), args=config, train_dataset=lab.train[DATA[stage]]
    )
    return timed(trainer, out)


def train_trl(lab: Lab, stage: str, name: str = "") -> Run:
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    out = lab.out / "trl" / "-".join([stage, *name.split()])
    config = getattr(trl, f"{TRAINERS[stage]}Config")(
        output_dir=str(out),
        seed=lab.seed_of(stage),
        gradient_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        logging_steps=20,
        warmup_steps=BOTH["warmup"],
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        model_init_kwargs={"dtype": "float32"},
        **SETTINGS[stage],
    )
    lora = LoraConfig(task_type="SEQ_CLS", **peft_names(LORA)) if stage == "reward" else lora_config(*LORA.values())
    trainer = getattr(trl, f"{TRAINERS[stage]}Trainer")(
        str(lab.start(stage)),
        args=config,
        train_dataset=Dataset.from_list(lab.train[DATA[stage]]),
        **({} if stage == "sft" else {"peft_config": lora}),
        **({"reward_funcs": trl_reward(reward_spec(lab, name))} if stage == "grpo" else {}),
    )
    run = timed(trainer, out)
    model = trainer.accelerator.unwrap_model(trainer.model)
    (model if stage == "sft" else model.merge_and_unload()).save_pretrained(out)
    AutoTokenizer.from_pretrained(lab.base).save_pretrained(out)
    return run


def peft_names(lora: dict[str, int]) -> dict[str, Any]:
    return {"r": lora["lora_r"], "lora_alpha": lora["lora_alpha"], "target_modules": "all-linear"}


def reward_spec(lab: Lab, name: str) -> Any:
    return {"name": "random", "seed": lab.train_seed} if name == NOISE else "answer"


def trl_reward(spec: Any) -> Any:
    """One of our built-in rewards as TRL wants it: a plain function with a name."""
    function = resolve(spec)

    def reward(completions: list, **columns: Any) -> list:
        return function(completions=completions, **columns)

    return reward


def timed(trainer: Any, folder: Path) -> Run:
    clock, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    return Run(folder, time.perf_counter() - clock, time.process_time() - cpu)


# ---- judging


def judge_policy(lab: Lab, folder: Path) -> dict[str, Any]:
    """Held-out answers, greedy and sampled, scored by the verifier."""
    policy = load(folder)
    greedy = evaluate_policy(policy, lab.prompts, ["answer"], max_new_tokens=ANSWER_TOKENS)
    sampled = evaluate_policy(policy, lab.prompts, ["answer"], max_new_tokens=ANSWER_TOKENS, n=4, temperature=1.0)
    return {
        "greedy accuracy": (greedy["reward"], greedy["reward/stderr"]),
        "sampled reward": (sampled["reward"], sampled["reward/stderr"]),
        "EOS rate": sampled["eos_rate"],
    }


def judge_dpo(lab: Lab, folder: Path) -> dict[str, Any]:
    """As every policy, and how often its implicit reward prefers the better of two held-out answers."""
    gain = response_logprobs(load(folder), lab.pairs) - response_logprobs(load(lab.start("dpo")), lab.pairs)
    right = (gain[:, 0] > gain[:, 1]).double() + 0.5 * (gain[:, 0] == gain[:, 1]).double()
    return {"preference accuracy": mean_and_error(right), **judge_policy(lab, folder)}


def judge_ppo(lab: Lab, folder: Path) -> dict[str, Any]:
    """As every policy, and what the reward model thinks of its greedy answers."""
    greedy = evaluate_policy(
        load(folder), lab.prompts, [RewardModel(lab.ours / "reward")], max_new_tokens=ANSWER_TOKENS
    )
    return {**judge_policy(lab, folder), "reward model's score": (greedy["reward"], greedy["reward/stderr"])}


def judge_reward(lab: Lab, folder: Path) -> dict[str, Any]:
    """Held-out pairs with true labels: how often the better answer scores higher. A tie counts as half."""
    examples = [e for pair in lab.pairs for e in pair.responses]
    ours = (folder / "adapter_config.json").is_file()  # TRL's is merged into a sequence classifier
    scores = our_scores(folder, examples) if ours else trl_scores(folder, examples)
    chosen, rejected = scores.double().view(-1, 2).unbind(1)
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    return {"pair accuracy": mean_and_error(right)}


@torch.no_grad()
def our_scores(folder: Path, examples: list[Example]) -> Tensor:
    policy = load(folder).eval()
    return policy.scores(TokenBatch.pack(examples, policy.device)).cpu()


@torch.no_grad()
def trl_scores(folder: Path, examples: list[Example]) -> Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    # one at a time: no padding to get wrong
    return torch.cat([model(torch.tensor([e.input_ids])).logits.flatten() for e in examples])


@torch.no_grad()
def response_logprobs(policy: Any, pairs: list[Preference]) -> Tensor:
    """Summed log-probabilities of chosen and rejected, (P, 2)."""
    batch = TokenBatch.pack([e for pair in pairs for e in pair.responses], policy.device)
    logprobs = policy.eval().logprobs(batch)
    return sequence_logprobs(logprobs, batch.response_mask, cu_seqlens=batch.cu_seqlens).view(-1, 2).cpu()


JUDGES = {"sft": judge_policy, "reward": judge_reward, "dpo": judge_dpo, "ppo": judge_ppo, "grpo": judge_policy}


def ppo_metrics(folder: Path) -> dict[str, float]:
    """From the run's own log: whether the critic learned, and how far the policy went."""
    rows = read_metrics(folder)
    explained = [row["val/explained_variance"] for row in rows if "val/explained_variance" in row]
    kl = [row["objective/kl"] for row in rows if "objective/kl" in row]
    return {
        "explained variance, first": explained[0],
        "explained variance, last 5": sum(explained[-5:]) / 5,
        "KL to SFT, last 5": sum(kl[-5:]) / 5,
    }


def mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


# ---- reporting


def machine() -> dict[str, str]:
    packages = ("torch", "transformers", "peft", "accelerate", "trl")
    versions = {name: importlib.metadata.version(name) for name in packages}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return {"device": f"{device}, {torch.get_num_threads()} thread(s)", "python": platform.python_version(), **versions}


def table(stage: str, result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    order = ("start", "ours", "TRL", *CONTROLS.get(stage, {}), f"TRL, {NOISE}")
    sides = [side for side in order if side in result["figures"]]
    metrics = list(dict.fromkeys(m for side in sides for m in result["figures"][side]))
    header = ["metric", *({"start": "base model" if stage == "sft" else "SFT"}.get(s, s) for s in sides)]
    return header, [[m, *(cell(result["figures"][s].get(m)) for s in sides)] for m in metrics]


def cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"{value[0]:.3f} ± {value[1]:.3f}"
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def show(stage: str, result: dict[str, Any]) -> None:
    header, rows = table(stage, result)
    print_table(f"{stage}: {settings_of(result)}", rows, header=header)


def settings_of(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in result["settings"].items())


def markdown(found: dict[str, Any]) -> str:
    lines = ["# Learning checks", "", *(__doc__ or "").split("\n\n")[2].splitlines(), ""]
    about = [f"{name} {value}" for name, value in found["machine"].items()]
    lines += [
        f"Seed {found['seed']}, training seed {found['train_seed']}; {', '.join(about)}. ± is the standard error over the {HELD_OUT} held-out rows."
    ]
    for stage in (s for s in TRAINERS if s in found["stages"]):
        header, rows = table(stage, found["stages"][stage])
        lines += ["", f"## {stage}", "", f"`{settings_of(found['stages'][stage])}`", ""]
        lines += ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
