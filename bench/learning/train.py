"""Train one cell, with our trainers or with TRL's, and judge it while it learns."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import platform
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

import rlhf_fast
from rlhf_fast.data import prepare_prompts
from rlhf_fast.data.batch import Example, TokenBatch
from rlhf_fast.models import Policy, load
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.models.scratch import new_model
from rlhf_fast.rewards import evaluate_policy, resolve
from rlhf_fast.run.metrics import read_metrics

from .cells import BOTH, CHECKED_EVERY, ENOUGH, LORA, MODEL, RANDOM, STOPS, TITLES, Cell
from .judge import Figures, PolicyJudge, RewardJudge
from .tasks import TASKS

POINTS = 4  # on a curve, after the first
POLICY_METRICS = {  # of a run's own log -> name on a curve
    "val/explained_variance": "explained variance",
    "objective/kl": "KL to SFT",
    "frac_reward_zero_std": "groups scored alike",
}


class Lab:
    """A task at one seed: its rows, the model from scratch, and the models that later cells start from."""

    def __init__(self, task: str, seed: int, out: Path, quick: bool = False):
        self.task, self.seed, self.out = task, seed, out
        self.rows = TASKS[task](seed, 0.04 if quick else 1.0)
        self.base = out / f"seed-{seed}" / "base"
        if not (self.base / "tokenizer.json").is_file():
            shutil.rmtree(self.base, ignore_errors=True)
            # its tokenizer splits numbers into digits, whatever the corpus
            corpus = [row["prompt"] + row["completion"] for row in self.rows.demonstrations]
            new_model("nano", corpus, self.base, seed=seed, quiet=True, **MODEL)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.limit = Cell(task, "ppo").settings["max_completion_length"]
        self._opponent: Tensor | None = None

    def trained(self, trainer: str) -> Path:
        """The folder of what our own trainer made, which later cells need."""
        return Cell(self.task, trainer, seed=self.seed).folder(self.out)

    def start(self, cell: Cell) -> Path:
        if cell.trainer != "sft":
            return self.trained("sft")
        # who has learned to add is shown the styles
        return self.base if self.task != "preference" else Cell("addition", "sft", seed=self.seed).folder(self.out)

    def reward(self, cell: Cell) -> Any:
        """What the cell maximises, as a spec that ``resolve`` understands."""
        if cell.variant == RANDOM:
            return {"name": "random", "seed": self.seed}
        return str(self.trained("reward")) if self.rows.pairs else self.rows.verifier

    def data(self, cell: Cell) -> list[dict]:
        rows = self.rows
        if cell.trainer == "dpo" and not rows.pairs:
            return self.sampled_pairs()
        return {"sft": rows.demonstrations, "ranked": rows.rankings, "reward": rows.pairs, "dpo": rows.pairs}.get(
            cell.trainer, rows.prompts
        )

    def sampled_pairs(self) -> list[dict]:
        """Of every prompt that the SFT policy answers rightly and wrongly in 4 samples, one of each."""
        file = self.out / f"seed-{self.seed}" / "pairs.json"
        if not file.is_file():
            prompts = prepare_prompts(self.rows.prompts[:6_000], self.tokenizer)[0]
            options = {"max_new_tokens": self.limit, "n": 4, "temperature": 1.0, "seed": self.seed}
            samples = evaluate_policy(load(self.trained("sft")), prompts, ["exact"], **options).samples
            rng = random.Random(self.seed)
            pairs = [_pair(samples[i : i + 4], rng) for i in range(0, len(samples), 4)]
            file.write_text(json.dumps([pair for pair in pairs if pair]))
        return json.loads(file.read_text())

    def judge(self, cell: Cell) -> Callable[[Any], Figures]:
        if cell.trainer in ("reward", "ranked"):
            return RewardJudge(self.rows, self.tokenizer)
        if cell.trainer == "sft":
            return self.policy_judge()
        reward_model = self.trained("reward") if self.rows.pairs else None
        return self.policy_judge(reward_model=reward_model, opponent=self.opponent())

    def policy_judge(self, **more: Any) -> PolicyJudge:
        return PolicyJudge(self.rows, self.tokenizer, self.limit, quality=bool(self.rows.pairs), **more)

    def enough(self) -> Callable[[Any], bool]:
        """Whether SFT has reached its goal on prompts of the training split."""
        judge = PolicyJudge(replace(self.rows, held_out=self.rows.prompts[:200]), self.tokenizer, self.limit)
        return lambda policy: judge(policy)["greedy accuracy"] >= ENOUGH

    def opponent(self) -> Tensor:
        """Scores of the SFT policy's answers to the held-out prompts."""
        if self._opponent is None:
            judge = self.policy_judge()
            judge(load(self.trained("sft")))
            self._opponent = judge.scores
        return self._opponent


def _pair(samples: list[dict], rng: random.Random) -> dict | None:
    """A right and a wrong one of these samples."""
    right, wrong = ([s["completion"] for s in samples if s["rewards"]["exact"] == score] for score in (1.0, 0.0))
    wrong = [text for text in wrong if text]
    if not right or not wrong:
        return None
    return {"prompt": samples[0]["prompt"], "chosen": rng.choice(right), "rejected": rng.choice(wrong)}


class Watch:
    """A callback of our trainers: judges the model at evenly spaced steps and leaves that out of the clock."""

    def __init__(
        self,
        cell: Cell,
        judge: Callable[[Any], Figures],
        view: Callable[[Any], Any],
        enough: Callable[[Any], bool] | None = None,
    ):
        self.cell, self.judge, self.view, self.enough = cell, judge, view, enough
        self.total = cell.settings["max_steps"]
        self.points: list[tuple[int, str, float]] = []  # rows or responses so far, metric, value
        self.judging = [0.0, 0.0]  # seconds by the clock, of this process

    def on_step(self, trainer: Any, figures: dict[str, float]) -> None:
        if self.look(trainer.step, trainer.policy):
            trainer.stop("it knows enough")

    def look(self, step: int, model: Any) -> bool:
        """Judge the model where that is due; True ends the run."""
        began = _clocks()
        done = self.enough is not None and step % CHECKED_EVERY == 0 and self.enough(self.view(model))
        if done or step == self.total or step % max(self.total // POINTS, 1) == 0:
            figures = self.judge(self.view(model))
            self.points += [(round(step * self.cell.rows_per_step), name, value) for name, value in figures.items()]
        self.judging = [spent + now - then for spent, now, then in zip(self.judging, _clocks(), began)]
        return done


class Relay(TrainerCallback):
    """The same for TRL's trainers."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        control.should_training_stop |= self.watch.look(state.global_step, model)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def train(cell: Cell, lab: Lab) -> dict[str, Any]:
    """Train the cell and return what its file holds."""
    folder = cell.folder(lab.out)
    shutil.rmtree(folder, ignore_errors=True)
    judge, ours = lab.judge(cell), cell.library == "rlhf_fast"
    stops = cell.trainer == "sft" and cell.task in STOPS
    enough = lab.enough() if stops and not cell.quick else None
    watch = Watch(cell, judge, view_of(cell, lab), enough)
    if not isinstance(judge, RewardJudge) and cell.trainer != "sft":  # where it starts
        watch.points += [(0, name, value) for name, value in judge(load(lab.start(cell))).items()]
    trainer = (our_trainer if ours else trl_trainer)(cell, lab, folder, watch)
    began = _clocks()
    trainer.train()
    seconds, cpu = (now - then - spent for now, then, spent in zip(_clocks(), began, watch.judging))
    watch.points += [
        (round(row["step"] * cell.rows_per_step), name, row[key])
        for row in (read_metrics(folder) if ours else trainer.state.log_history)
        for key, name in POLICY_METRICS.items()
        if key in row
    ]
    return {
        **{name: getattr(cell, name) for name in ("task", "trainer", "variant", "library", "seed")},
        "settings": cell.all_settings,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "machine": machine(),
        "points": watch.points,
    }


def view_of(cell: Cell, lab: Lab) -> Callable[[Any], Any]:
    """From the model in training to what the judge takes: a policy, or a function that scores."""
    if cell.trainer in ("reward", "ranked"):
        return our_scores if cell.library == "rlhf_fast" else trl_scores
    return (lambda policy: policy) if cell.library == "rlhf_fast" else (lambda model: weights_of(model, lab))


def our_trainer(cell: Cell, lab: Lab, folder: Path, watch: Watch) -> Any:
    rewards: dict[str, Any] = {}
    if cell.learns_from_samples:
        rewards = {"rollout_batch_size": 128}
        if cell.trainer == "ppo" and lab.task == "preference":
            rewards["reward_model_path"] = lab.reward(cell)  # an adapter on the policy's base
        else:
            rewards["reward_funcs"] = [lab.reward(cell)]
    config = getattr(rlhf_fast, f"{TITLES[cell.trainer]}Config")(
        output_dir=str(folder),
        seed=cell.seed,
        gradient_checkpointing=False,
        quiet=True,
        save_steps=1_000_000,
        logging_steps=cell.settings.get("num_ppo_epochs", 1),
        warmup_ratio=BOTH["warmup"],
        dtype=BOTH["dtype"],
        **cell.tuned_weights,
        **rewards,
        **cell.settings,
    )
    kind = getattr(rlhf_fast, f"{TITLES[cell.trainer]}Trainer")
    return kind(str(lab.start(cell)), args=config, train_dataset=lab.data(cell), callbacks=[watch])


def trl_trainer(cell: Cell, lab: Lab, folder: Path, watch: Watch) -> Any:
    import trl
    from datasets import Dataset

    title = TITLES[cell.trainer]
    config = getattr(trl, f"{title}Config")(
        output_dir=str(folder),
        seed=cell.seed,
        gradient_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        warmup_steps=BOTH["warmup"],
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        model_init_kwargs={"dtype": BOTH["dtype"]},
        **cell.settings,
    )
    more: dict[str, Any] = {}
    if cell.tuned_weights["use_peft"]:
        more["peft_config"] = lora_config(*LORA.values())
        if cell.trainer == "reward":
            more["peft_config"].task_type = "SEQ_CLS"
    if cell.trainer == "grpo":
        more["reward_funcs"] = plain_function(lab.reward(cell))
    data = Dataset.from_list(lab.data(cell))
    trainer = getattr(trl, f"{title}Trainer")(
        str(lab.start(cell)), args=config, train_dataset=data, callbacks=[Relay(watch)], **more
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def plain_function(spec: Any) -> Callable[..., list]:
    """One of our rewards as TRL wants it: a plain function with a name."""
    function = resolve(spec)

    def reward(prompts: list, completions: list, completion_ids: list, **columns: Any) -> list:
        return function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)

    return reward


# ---- what the judge is shown


def weights_of(model: Any, lab: Lab) -> Policy:
    """TRL's model as it stands, adapter merged, by its weights alone: TRL and accelerate put their own code into its forward."""
    copied = copy.deepcopy(model)
    copied = copied.merge_and_unload() if hasattr(copied, "merge_and_unload") else copied
    fresh = AutoModelForCausalLM.from_pretrained(lab.base, dtype=torch.float32)
    fresh.load_state_dict(copied.state_dict())
    return load(fresh, tokenizer=lab.tokenizer)


def our_scores(policy: Any) -> Callable[[list[Example]], Tensor]:
    @torch.no_grad()
    def score(examples: list[Example]) -> Tensor:
        return policy.scores(TokenBatch.pack(examples, policy.device)).cpu()

    return score


def trl_scores(model: Any) -> Callable[[list[Example]], Tensor]:
    @torch.no_grad()
    def score(examples: list[Example]) -> Tensor:
        """Rows of one length at a time: there is no padding to get wrong."""
        was_training = model.training
        model.eval()
        scores = torch.empty(len(examples))
        for length in sorted({len(e) for e in examples}):
            rows = [i for i, e in enumerate(examples) if len(e) == length]
            scores[rows] = model(torch.tensor([examples[i].input_ids for i in rows])).logits.flatten()
        model.train(was_training)
        return scores

    return score


def machine() -> dict[str, str]:
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    packages = [name for name in ("torch", "transformers", "peft", "accelerate", "trl") if name in installed]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    about = {"device": f"{device}, {torch.get_num_threads()} thread(s)", "python": platform.python_version()}
    return about | {name: importlib.metadata.version(name) for name in packages}
