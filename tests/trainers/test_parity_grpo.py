"""TRL's GRPOTrainer and ours on the same model, settings and completions, in fp32: the same losses, figures and weights."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import Qwen2ForCausalLM

from rlhf_fast import GRPOConfig, GRPOTrainer
from rlhf_fast.losses.policy import LOSS_TYPES

trl = pytest.importorskip("trl", reason="TRL is one of the peers: pip install -e '.[peers]'")

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 10
# a "!" cuts the response there. In every batch both prompts: the order of the data does not matter
SCRIPT = {"1+1=": ["2", "two", "3 or so!", "2, i think"], "go ": ["left", "right", "up", "down the road!"]}
# not reward_std: of a group here, of the whole batch there
FIGURES = ("reward", "frac_reward_zero_std", "entropy", "kl", "clip_ratio/region_mean", "grad_norm")


def score(completions, **_):
    return [len(c) / 7 - c.count("o") + (c == "2") for c in completions]


# the settings of both, by their common names
CASES = [
    {"loss_type": "grpo"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-3, "epsilon_high": 4e-3},
    {"loss_type": "bnpo"},
    {"loss_type": "bnpo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True},
    {"loss_type": "dapo", "delta": 1.5, "temperature": 0.7},
    {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    {"loss_type": "dr_grpo", "scale_rewards": "none"},
    {"loss_type": "dr_grpo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.01, "learning_rate": 2e-3},
    {"loss_type": "cispo", "epsilon_high": 1.1},
    {"loss_type": "cispo", "importance_sampling_level": "sequence", "epsilon_high": 1.01},
    {"loss_type": "sapo", "sapo_temperature_pos": 3.0, "sapo_temperature_neg": 9.0},
    {"loss_type": "sapo", "importance_sampling_level": "sequence", "sapo_temperature_neg": 9.0},
    {"loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.5},
    {"loss_type": "grpo", "beta": 0.1, "scale_rewards": "batch", "use_bias_correction_kl": False},
    {"loss_type": "dapo", "beta": 0.1, "num_iterations": 1},
    {"loss_type": "dapo", "beta": 0.1},
    {"loss_type": "grpo", "beta": 0.1, "importance_sampling_level": "sequence", "epsilon": 0.01},
]


class Watched(trl.GRPOTrainer):
    """With every step's loss as it was computed."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), float(loss.detach())]
        return loss


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
def test_ten_steps_on_the_same_completions_are_those_of_trl(
    options, make_model, tokenizer, settings, scripted, run, sgd, tmp_path
):
    common = {"max_completion_length": 16, "num_generations": 4, "num_iterations": 2, "learning_rate": 0.02}
    common |= {"per_device_train_batch_size": 8, "max_steps": STEPS, "max_grad_norm": 0.0, **options}
    data = {"train_dataset": [{"prompt": p} for p in SCRIPT], "processing_class": tokenizer}
    ours = GRPOTrainer(make_model(), score, GRPOConfig(**settings(**common)), **data, engine=scripted(SCRIPT))
    result = run(ours)
    theirs = trl_run(common, make_model(), tokenizer, tmp_path)
    if options["loss_type"] != "sapo":  # what is logged of it is another function with the same gradient
        assert result.losses == pytest.approx(theirs.losses, abs=1e-5)
    logged = [row for row in theirs.state.log_history if "grad_norm" in row]
    for mine, row in zip(result.steps, logged):
        names = [name for name in FIGURES if name in row]  # rewards are those of a rollout: not in every step
        if "importance_sampling_level" in options:  # the share of sequences there, of tokens here
            names = [name for name in names if "region" not in name]
        assert ("reward" in names) == ("reward" in mine)
        assert {n: mine[n] for n in names} == pytest.approx({n: row[n] for n in names}, abs=1e-4, rel=1e-4)
    for name, weight in theirs.model.named_parameters():
        torch.testing.assert_close(result.weights[f"model.{name}"], weight.detach(), atol=1e-5, rtol=1e-4, msg=name)
    if options.get("num_iterations") != 1 and options["loss_type"] not in ("sapo", "vespo"):
        assert any(step["clip_ratio/region_mean"] > 0 for step in result.steps)


def trl_run(options, model, tokenizer, folder):
    from datasets import Dataset

    model.save_pretrained(folder / "model")  # the reference is loaded from where the policy came from
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    quiet |= {"gradient_checkpointing": False, "lr_scheduler_type": "constant", "optim": "sgd", "logging_steps": 1}
    args = trl.GRPOConfig(str(folder / "trl"), **quiet, **options)
    trainer = Watched(
        Qwen2ForCausalLM.from_pretrained(folder / "model"),
        score,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": list(SCRIPT)}),
        processing_class=tokenizer,
        rollout_func=lambda prompts, _: responses(prompts, tokenizer),
    )
    trainer.train()
    return trainer


def responses(prompts, tokenizer):
    """Of a batch in which the prompts of a group are adjacent: the script's, in turn."""
    out = {"prompt_ids": [], "completion_ids": [], "logprobs": None}
    for i, prompt in enumerate(prompts):
        text = SCRIPT[prompt][i % 4]
        out["prompt_ids"].append(tokenizer(prompt)["input_ids"])
        out["completion_ids"].append(tokenizer(text.rstrip("!"))["input_ids"] + [0] * (not text.endswith("!")))
    return out


def test_every_loss_that_trl_has_is_compared():
    """TRL's own list, as its help gives it. REINFORCE is not among them."""
    text = trl.GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    named = set(re.findall(r"'(\w+)'", text.split("Supported values are")[1].split(".")[0]))
    assert named == {case["loss_type"] for case in CASES} == LOSS_TYPES.keys() - {"reinforce"}
