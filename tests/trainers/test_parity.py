"""Ten steps of ours and ten of TRL 1.16's on the same model, data and seed, in fp32: the same loss at every one to 1e-5.

Plain gradient descent on both sides: Adam would turn rounding errors of tiny gradients into whole steps. A step sees all
rows, so that the order they come in plays no part.
"""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification

import rlhf_fast

trl = pytest.importorskip("trl", reason="TRL is one of the peers: pip install -e '.[peers]'")
if trl.__version__ != "1.16.0":
    pytest.skip(f"the formulas compared are those of TRL 1.16.0, here is {trl.__version__}", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")
PAIRS = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "seventeen"},
    {"prompt": "name ", "chosen": "a longer one", "rejected": "no"},
    {"prompt": "x", "chosen": "y", "rejected": "z"},
    {"prompt": "say ", "chosen": "hi", "rejected": "hello, hello"},
]
COMPLETIONS = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS]
# the KL, estimated on other prompts' responses, must not be 0 all along
LABELLED = [
    {"prompt": prompt, "completion": completion, "label": label}
    for prompt, completion, label in [("1+1=", "22", 1), ("name ", "no", 0), ("x", "222", 1), ("say ", "2 22", 1)]
]
STEPS = 10
COMMON = {"lr_scheduler_type": "constant", "logging_steps": 1, "per_device_train_batch_size": 4, "max_length": 64}
COMMON |= {"gradient_checkpointing": False, "seed": 3, "num_train_epochs": STEPS}
QUIET = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "optim": "sgd",
}


@pytest.fixture
def folder(make_model, tmp_path):
    """TRL loads the reference from where the policy came from."""
    make_model(hidden_size=16, intermediate_size=24, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def theirs(folder, tokenizer, tmp_path):
    """theirs(kind, rows, model=None, **settings) -> the loss at each of TRL's steps, unrounded."""
    from datasets import Dataset

    # padding of its own: TRL's reward model would take an EOS that is one for padding, and score the token before
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = "<unk>"

    def train(kind, rows, model=None, home="trl", **settings):
        module = importlib.import_module(home)
        args = getattr(module, f"{kind}Config")(output_dir=str(tmp_path / "trl"), **{**COMMON, **QUIET, **settings})
        model = model or Qwen2ForCausalLM.from_pretrained(folder)
        trainer = getattr(module, f"{kind}Trainer")(
            model, args=args, train_dataset=Dataset.from_list(rows), processing_class=padded
        )
        losses, step = [], trainer.compute_loss

        def noted(*args, **kwargs):
            loss = step(*args, **kwargs)
            losses.append(float(loss.detach()))
            return loss

        trainer.compute_loss = noted
        trainer.train()
        return losses

    return train


@pytest.fixture
def ours(folder, tokenizer, sgd, settings, run):
    """ours(kind, rows, prepare=..., **settings) -> the loss at each step; ``prepare`` may change the trainer first."""

    def train(kind, rows, prepare=lambda trainer: None, **more):
        args = getattr(rlhf_fast, f"{kind}Config")(**settings(**{**COMMON, "warmup_ratio": 0.0, **more}))
        trainer = getattr(rlhf_fast, f"{kind}Trainer")(
            str(folder), args, train_dataset=rows, processing_class=tokenizer
        )
        prepare(trainer)
        return run(trainer).losses

    return train


def same(got, want):
    assert len(got) == len(want) == STEPS
    assert got == pytest.approx(want, abs=1e-5)
    assert max(want) - min(want) > 1e-3, "nothing was learned, so nothing was compared"


DPO = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {"learning_rate": 0.01},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    # squares of 1 / beta, which at 0.3 are so large that ten steps' rounding reaches 1e-5 on some processors
    "sppo_hard": {"learning_rate": 0.005, "beta": 0.8},
    "aot": {},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"learning_rate": 0.01, "discopop_tau": 0.3},
    "sft": {},
    "sigmoid_norm": {},
}


@pytest.mark.parametrize("kind", DPO)
def test_dpo(kind, ours, theirs):
    settings = {"learning_rate": 0.05, "beta": 0.3, "loss_type": [kind], **DPO[kind]}
    same(ours("DPO", PAIRS, **settings), theirs("DPO", PAIRS, **settings))


def test_every_loss_that_trl_has_is_compared():
    """TRL's own list, as its error message gives it."""
    text = (
        importlib.import_module("trl.trainer.dpo_config").DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    )
    named = {word.strip("`'.,") for word in text.split("values are:")[1].split(". If")[0].split()}
    assert named == set(DPO)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_dpo_with_another_divergence(divergence, ours, theirs):
    settings = {"learning_rate": 0.05, "beta": 0.3, "loss_type": ["sigmoid"], "f_divergence_type": divergence}
    settings |= {"f_alpha_divergence_coef": 0.7} if divergence == "alpha_divergence" else {}
    same(ours("DPO", PAIRS, **settings), theirs("DPO", PAIRS, **settings))


@pytest.mark.parametrize(
    ("kinds", "weights"), [(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]), (["ipo", "hinge"], [0.05, 1.0])], ids=str
)
def test_dpo_of_several_losses_with_weights(kinds, weights, ours, theirs):
    """The mixture of MPO (arXiv:2411.10442), and one of means and sums over a response's tokens."""
    settings = {"learning_rate": 0.05, "beta": 0.3, "loss_type": kinds, "loss_weights": weights}
    same(ours("DPO", PAIRS, **settings), theirs("DPO", PAIRS, **settings))


@pytest.mark.parametrize("kinds", [["sigmoid"], ["ipo", "apo_zero"]], ids="-".join)
def test_dpo_with_pairs_weighed_by_the_policy(kinds, ours, theirs):
    """WPO."""
    settings = {"learning_rate": 0.02, "beta": 0.3, "loss_type": kinds, "use_weighting": True}
    same(ours("DPO", PAIRS, **settings), theirs("DPO", PAIRS, **settings))


@pytest.mark.parametrize("kinds", [["sigmoid"], ["ipo", "sft"]], ids="-".join)
def test_dpo_with_a_discount_on_the_longer_response(kinds, ours, theirs):
    """LD-DPO; the likelihood beside it is of the whole response."""
    settings = {"learning_rate": 0.02, "beta": 0.3, "loss_type": kinds, "ld_alpha": 0.25}
    same(ours("DPO", PAIRS, **settings), theirs("DPO", PAIRS, **settings))


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
def test_kto(kind, ours, theirs):
    """TRL rotates the responses of each batch for its KL, ours those of the data: here that is the same."""
    settings = {"learning_rate": 0.05, "beta": 0.3, "loss_type": kind, "desirable_weight": 1.3}
    same(ours("KTO", LABELLED, **settings), theirs("KTO", LABELLED, **settings))


@pytest.mark.parametrize("kind", ["cpo", "simpo"])
def test_cpo_and_simpo(kind, ours, theirs):
    settings = {"learning_rate": 0.05, "beta": 0.8}
    mine = {"cpo": {"loss_type": ["cpo"], "cpo_alpha": 0.6}, "simpo": {"loss_type": ["simpo"], "simpo_gamma": 0.7}}
    them = {"cpo": {"cpo_alpha": 0.6}, "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7}}
    got, want = (
        ours("DPO", PAIRS, **settings, **mine[kind]),
        theirs("CPO", PAIRS, home="trl.experimental.cpo", **settings, **them[kind]),
    )
    same(got, want)


def test_orpo(ours, theirs):
    """TRL adds the prompt's own likelihood to ORPO's; prompts of one token have none."""
    rows = [{**row, "prompt": row["prompt"][0]} for row in PAIRS]
    settings = {"learning_rate": 0.05, "beta": 0.8}
    want = theirs("ORPO", rows, home="trl.experimental.orpo", **settings)
    same(ours("DPO", rows, loss_type=["orpo"], **settings), want)


@pytest.mark.parametrize("kind", ["nll", "dft"])
def test_sft(kind, ours, theirs):
    settings = {"learning_rate": 0.05, "packing": False, "loss_type": kind}
    same(ours("SFT", COMPLETIONS, **settings), theirs("SFT", COMPLETIONS, **settings))


@pytest.mark.parametrize("margins", [False, True])
def test_reward(margins, ours, theirs, folder):
    """Their head has no bias: ours starts at 0 and is held there."""
    rows = [{**row, "margin": 0.5 * i} for i, row in enumerate(PAIRS)] if margins else PAIRS
    judge = Qwen2ForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=1)
    torch.nn.init.normal_(judge.score.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    start = judge.score.weight.detach()[0].clone()

    def same_head(trainer):
        trainer.policy.heads["reward"].weight.data.copy_(start)
        trainer.policy.heads["reward"].bias.requires_grad_(False)

    settings = {"learning_rate": 0.05, "center_rewards_coefficient": 0.05}
    got = ours("Reward", rows, same_head, **settings)
    same(got, theirs("Reward", rows, model=judge, **settings))
