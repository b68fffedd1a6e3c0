"""KTO beside its formula on plain transformers, and an estimate of the KL that no split, order or pair of rows disturbs."""

from __future__ import annotations

import copy

import pytest
import torch

from rlhf_fast import KTOConfig, KTOTrainer
from rlhf_fast.data.prepare import prepare_labelled
from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import lora_config

# what is good to one prompt is likely good to another: the KL, estimated on mismatched ones, grows
ROWS = [
    {"prompt": "1+1=", "completion": "22", "label": True},
    {"prompt": "name ", "completion": "no", "label": False},
    {"prompt": "x", "completion": "222", "label": True},
    {"prompt": "say ", "completion": "2 22", "label": True},
    {"prompt": "b ", "completion": "22 2", "label": True},
]
B, GOOD, BAD = 0.6, 1.3, 0.7


@pytest.fixture
def trainer(tokenizer, settings):
    def make(model, peft=None, rows=ROWS, eval_rows=None, **more):
        common = {"per_device_train_batch_size": 5, "beta": B, "warmup_ratio": 0.0, "max_grad_norm": 0.0}
        common |= {"desirable_weight": GOOD, "undesirable_weight": BAD, "learning_rate": 0.05}
        args = KTOConfig(**settings(**{**common, **more}))
        data = {"train_dataset": rows, "eval_dataset": eval_rows}
        return KTOTrainer(model, args, processing_class=tokenizer, peft_config=peft, **data)

    return make


@pytest.fixture
def sums(plain, ids):
    """sums(model) -> (5,) log-probabilities of each row's response, and (5,) of the row before's after its prompt."""

    def both(model):
        shifted = ROWS[-1:] + ROWS[:-1]
        return [
            torch.stack(
                [plain(model, ids(p["prompt"]), ids(c["completion"], end=True)).sum() for p, c in zip(ROWS, cs)]
            )
            for cs in (ROWS, shifted)
        ]

    return both


def by_hand(own, other, ref_own, ref_other):
    """arXiv:2402.01306, eqs. 7 and 8."""
    kl = (other - ref_other).mean().detach().clamp(min=0)
    ratio, good = own - ref_own, torch.tensor([r["label"] for r in ROWS])
    value = torch.where(good, torch.sigmoid(B * (ratio - kl)), torch.sigmoid(B * (kl - ratio)))
    return (torch.where(good, GOOD, BAD) * (1 - value)).mean(), kl


def test_three_steps_equal_the_formula_on_plain_transformers(sgd, trainer, model, sums, run):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        ref = sums(twin)
    losses, kls = [], []
    for _ in range(3):
        loss, kl = by_hand(*sums(twin), *ref)
        losses.append(float(loss.detach())), kls.append(float(kl))
        grads = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(twin.parameters(), grads):
                parameter -= 0.05 * grad
    result = run(trainer(model, num_train_epochs=3))
    assert result.losses == pytest.approx(losses, abs=2e-5)
    assert [s["kl"] for s in result.steps if "kl" in s] == pytest.approx(kls, abs=2e-4)
    assert kls[0] == 0.0 and kls[2] > 0.01
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(result.weights[f"model.{name}"], parameter, atol=2e-5, rtol=0, msg=name)


def test_before_the_first_step_every_value_is_a_half(trainer, model, run):
    """Policy and reference agree to the last bit: (4 * 1.3 + 0.7) / 5 / 2."""
    step = run(trainer(model, lora_config(r=4, alpha=8))).steps[0]
    assert step["loss"] == pytest.approx(0.59, abs=1e-7)
    assert step["kl"] == step["rewards/chosen"] == step["rewards/rejected"] == 0.0


def test_the_split_into_micro_batches_changes_nothing(sgd, trainer, make_model, run):
    rows = [*ROWS, {"prompt": "q", "completion": "r", "label": False}]
    sizes = ({"per_device_train_batch_size": 6}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3})
    whole, parts = (run(trainer(make_model(), rows=rows, num_train_epochs=4, **s)) for s in sizes)
    assert len(whole.losses) == 4
    for one, other in zip(whole.steps, parts.steps):
        assert other == pytest.approx(one, abs=1e-5)
    assert whole.steps[-1]["kl"] > 0.001


def test_an_evaluation_is_over_all_rows_whatever_the_batch_size(trainer, make_model, run):
    made = trainer(make_model(), eval_rows=ROWS, num_train_epochs=3)
    run(made)
    figures = []
    for size in (5, 2):
        made.args.per_device_train_batch_size = size
        figures.append(made.evaluate())
    assert figures[0] == pytest.approx(figures[1], abs=1e-5)
    assert figures[0]["eval_kl"] > 0 and figures[0]["eval_rewards/chosen"] > figures[0]["eval_rewards/rejected"]


def test_good_and_bad_responses_have_means_of_their_own(trainer, make_model, run):
    """Not a mean over micro-batches, some of which have none."""
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 5}
    one, other = (run(trainer(make_model(), num_train_epochs=2, **s)).steps for s in ({}, sizes))
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        assert other[-1][name] == pytest.approx(one[-1][name], abs=1e-4)


def test_a_mismatched_response_answers_another_prompt(tokenizer, ids):
    """Rows 0 to 2 share a prompt, as files made from pairs do: they all take the last row's response, row 3 takes row 2's."""
    rows = [{"prompt": p, "completion": c, "label": True} for p, c in zip("aaab", "cdef")]
    labelled, _ = prepare_labelled(rows, tokenizer)
    assert [tokenizer.decode(r.mismatched.input_ids[:-1]) for r in labelled] == ["af", "af", "af", "be"]
    assert all(r.mismatched.response_mask == [False, True, True] for r in labelled)
    alone, _ = prepare_labelled(rows[:3], tokenizer)
    assert [tokenizer.decode(r.mismatched.input_ids[:-1]) for r in alone] == ["ae", "ac", "ad"]


def test_a_mismatched_response_is_cut_like_any_other(tokenizer):
    rows = [{"prompt": "abcdefg", "completion": "h", "label": 1}, {"prompt": "i", "completion": "jklmno", "label": 0}]
    labelled, _ = prepare_labelled(rows, tokenizer, max_length=9)
    assert tokenizer.decode(labelled[0].mismatched.input_ids) == "abcdefgjk"


def test_learning_raises_the_good_and_lowers_the_bad(trainer, model, run):
    steps = run(trainer(model, num_train_epochs=20, learning_rate=1e-2)).steps
    assert steps[-1]["rewards/chosen"] > 0.3 and steps[-1]["rewards/rejected"] < -0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "sigmoid"}, "loss_type is 'sigmoid'; choose one of kto, apo_zero_unpaired"),
        ({"beta": 0.0}, "beta is 0.0; it must be above 0"),
        ({"desirable_weight": -1.0}, "desirable_weight is -1.0; it must be at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        KTOConfig(**settings)
