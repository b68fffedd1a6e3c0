"""Direct preference optimization: ln 2 before the first step, the published formulas after it."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from rlhf_fast import DPOConfig, DPOTrainer
from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import lora_config

ROWS = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "seventeen"},
    {"prompt": "name ", "chosen": "a longer one", "rejected": "no"},
    {"prompt": "x", "chosen": "y", "rejected": "z"},
    {"prompt": "say ", "chosen": "hi", "rejected": "hello, hello"},
]


@pytest.fixture
def trainer(tokenizer, settings):
    def make(model, peft=None, rows=ROWS, **more):
        args = DPOConfig(**settings(**{"per_device_train_batch_size": 4, **more}))
        return DPOTrainer(model, args, train_dataset=rows, processing_class=tokenizer, peft_config=peft)

    return make


@pytest.fixture
def sums(plain, ids):
    """sums(model, average=False) -> (4,) chosen and (4,) rejected log-probabilities, by transformers alone."""

    def both(model, average=False):
        reduce = torch.mean if average else torch.sum
        return [
            torch.stack([reduce(plain(model, ids(row["prompt"]), ids(row[which], end=True))) for row in ROWS])
            for which in ("chosen", "rejected")
        ]

    return both


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_before_the_first_step_the_loss_is_exactly_ln_2(lora, checkpointing, trainer, model, run):
    """Policy and reference agree to the last bit, so rewards are exactly 0 and no pair is right."""
    peft = lora_config(r=4, alpha=8, dropout=0.3) if lora else None
    step = run(trainer(model, peft, gradient_checkpointing=checkpointing)).steps[0]
    assert step["loss"] == float(torch.tensor(math.log(2), dtype=torch.float32))
    assert step["rewards/margins"] == step["rewards/chosen"] == step["rewards/accuracies"] == 0.0
    assert step["grad_norm"] > 0.1


def test_a_continued_adapter_is_its_own_reference(trainer, make_model, tokenizer, run, tmp_path):
    """Not the base: the loss starts at ln 2 although the adapter has moved far from it, dropout or not."""
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    first = trainer(
        str(tmp_path / "base"), lora_config(r=4, alpha=8, dropout=0.3), num_train_epochs=5, learning_rate=1e-2
    )
    before = run(first).steps
    assert before[-1]["rewards/margins"] > 0.1
    second = trainer(first.args.output_dir, num_train_epochs=2, learning_rate=1e-2)
    assert second.policy.reference == "the frozen starting adapter"
    steps = run(second).steps
    assert steps[0]["rewards/margins"] == 0.0
    assert steps[0]["logps/chosen"] > before[0]["logps/chosen"] + 0.1
    assert steps[1]["rewards/margins"] > 0.0


def test_a_run_saved_where_it_began_has_lost_its_reference_and_says_so(trainer, make_model, tokenizer, run, tmp_path):
    """Its folder then holds the half-trained adapter, which must not become the frozen one of the resumed run."""
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    first = trainer(str(tmp_path / "base"), lora_config(r=4), num_train_epochs=1, learning_rate=1e-2)
    run(first)
    again = {"num_train_epochs": 4, "learning_rate": 1e-2, "output_dir": first.args.output_dir, "save_steps": 1}
    second = trainer(first.args.output_dir, **again)
    second.after_step = lambda: second.step == 2 and second.stop("enough")
    run(second)
    third = trainer(first.args.output_dir, **again)
    with pytest.raises(UserError, match="another reference or reward model than this run has loaded"):
        third.train(resume_from_checkpoint=True)


FORMULAS = {
    # kind -> loss of w = log ratio of chosen, l = of rejected, beta, label_smoothing
    "sigmoid": lambda w, l, b, e: -(1 - e) * log_sigmoid(b * (w - l)) - e * log_sigmoid(b * (l - w)),
    "robust": lambda w, l, b, e: (-(1 - e) * log_sigmoid(b * (w - l)) + e * log_sigmoid(b * (l - w))) / (1 - 2 * e),
    "hinge": lambda w, l, b, e: torch.relu(1 - b * (w - l)),
    "ipo": lambda w, l, b, e: (w - l - 1 / (2 * b)) ** 2,
    "apo_zero": lambda w, l, b, e: 1 - torch.sigmoid(b * w) + torch.sigmoid(b * l),
}


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


@pytest.mark.parametrize(
    ("kinds", "weights", "smoothing"),
    [
        (["sigmoid"], None, 0.0),
        (["sigmoid"], None, 0.2),
        (["robust"], None, 0.1),
        (["ipo"], [3.0], 0.0),
        (["hinge"], None, 0.0),
        (["apo_zero"], None, 0.0),
        (["sigmoid", "hinge"], [0.7, 0.2], 0.0),
        (["hinge", "sigmoid", "apo_zero"], None, 0.0),
    ],
)
def test_two_steps_equal_the_formula_on_plain_transformers(kinds, weights, smoothing, sgd, trainer, model, sums, run):
    """An independent loop in plain PyTorch gives the second loss and its figures, and the weights after it."""
    twin = copy.deepcopy(model)
    average = kinds == ["ipo"]
    with torch.no_grad():
        ref = sums(twin, average)
    losses = []
    for _ in range(2):
        w, l = (new - old for new, old in zip(sums(twin, average), ref))
        parts = [k * FORMULAS[kind](w, l, 0.3, smoothing).mean() for kind, k in zip(kinds, weights or [1.0] * 3)]
        losses.append(sum(parts))
        grads = torch.autograd.grad(losses[-1], list(twin.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(twin.parameters(), grads):
                parameter -= 0.05 * grad
    made = trainer(
        model,
        beta=0.3,
        loss_type=kinds,
        loss_weights=weights,
        label_smoothing=smoothing,
        num_train_epochs=2,
        learning_rate=0.05,
        max_grad_norm=0.0,
    )
    result = run(made)
    assert result.losses == pytest.approx([float(x.detach()) for x in losses], abs=2e-5)
    assert abs(result.losses[0] - result.losses[1]) > 1e-3
    if not average:  # what responses are worth is of sums, whatever the loss
        rewards = {"chosen": 0.3 * w, "rejected": 0.3 * l, "margins": 0.3 * (w - l), "accuracies": (w > l).float()}
        for name, values in rewards.items():
            assert result.steps[1][f"rewards/{name}"] == pytest.approx(float(values.detach().mean()), abs=2e-4), name
        assert result.steps[1]["rewards/margins"] > 0.01
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(result.weights[f"model.{name}"], parameter, atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_reference_log_probabilities_computed_beforehand_give_the_same_run(lora, sgd, trainer, make_model, run):
    runs = []
    for before in (False, True):
        peft = lora_config(r=4, alpha=8) if lora else None
        runs.append(run(trainer(make_model(), peft, precompute_ref_log_probs=before, num_train_epochs=4)))
    live, precomputed = runs
    assert precomputed.losses == pytest.approx(live.losses, abs=1e-5)
    assert live.losses[-1] < live.losses[0]
    for name, weight in live.weights.items():
        torch.testing.assert_close(precomputed.weights[name], weight, atol=1e-5, rtol=0, msg=name)


def test_precomputing_asks_the_reference_once(trainer, model, run, monkeypatch):
    asked = []
    made = trainer(model, precompute_ref_log_probs=True, num_train_epochs=3)
    monkeypatch.setattr(made.policy, "logprobs", _counting(made.policy.logprobs, asked))
    run(made)
    assert "reference" not in asked
    made = trainer(model, num_train_epochs=3)
    monkeypatch.setattr(made.policy, "logprobs", _counting(made.policy.logprobs, asked))
    run(made)
    assert asked.count("reference") == 3


def _counting(logprobs, asked):
    def counting(batch, **options):
        asked.append(options.get("role"))
        return logprobs(batch, **options)

    return counting


def test_more_than_two_responses_are_refused_by_row(trainer, model):
    rows = [{"prompt": "a", "responses": ["b", "c", "d"], "ranking": [1, 2, 3]}]
    with pytest.raises(UserError, match="row 1: `responses` has 3 of them, and DPO compares two"):
        trainer(model, rows=rows)
