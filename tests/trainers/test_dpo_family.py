"""The rest of the DPO family in training: losses without a reference, losses that sort, a running mean, weights of rows."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from rlhf_fast import DPOConfig, DPOTrainer
from rlhf_fast.errors import UserError
from rlhf_fast.losses.preference import PAIRED

ROWS = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "seventeen"},
    {"prompt": "name ", "chosen": "a longer one", "rejected": "no"},
    {"prompt": "x", "chosen": "y", "rejected": "z"},
    {"prompt": "say ", "chosen": "hi", "rejected": "hello, hello"},
    {"prompt": "b ", "chosen": "c d", "rejected": "e"},
]
B = 0.8


@pytest.fixture
def trainer(tokenizer, settings):
    def make(model, rows=ROWS, eval_rows=None, **more):
        common = {"per_device_train_batch_size": 5, "beta": B, "warmup_ratio": 0.0, "max_grad_norm": 0.0}
        args = DPOConfig(**settings(**{**common, "learning_rate": 0.05, **more}))
        return DPOTrainer(model, args, train_dataset=rows, eval_dataset=eval_rows, processing_class=tokenizer)

    return make


@pytest.fixture
def responses(plain, ids):
    """responses(model) -> the log-probabilities of every row's chosen and rejected tokens, by transformers alone."""

    def both(model):
        return [
            [plain(model, ids(row["prompt"]), ids(row[which], end=True)) for row in ROWS]
            for which in ("chosen", "rejected")
        ]

    return both


def orpo(chosen, rejected):
    """arXiv:2403.07691: likelihood per token, and the odds of the geometric mean probabilities."""
    p, q = (torch.stack([x.mean().exp() for x in xs]) for xs in (chosen, rejected))
    odds = (p / (1 - p)) / (q / (1 - q))
    return -torch.cat(chosen).mean() - B * logsigmoid(odds.log()).mean()


def simpo(chosen, rejected):
    return -torch.stack([logsigmoid(B * (x.mean() - y.mean()) - 0.7) for x, y in zip(chosen, rejected)]).mean()


def cpo(chosen, rejected):
    prefer = -torch.stack([logsigmoid(B * (x.sum() - y.sum())) for x, y in zip(chosen, rejected)]).mean()
    return prefer - 0.6 * torch.cat(chosen).mean()


WITHOUT_REFERENCE = {
    "orpo": (orpo, {}),
    "simpo": (simpo, {"simpo_gamma": 0.7}),
    "cpo": (cpo, {"cpo_alpha": 0.6}),
}


@pytest.mark.parametrize("kind", WITHOUT_REFERENCE)
def test_losses_without_a_reference_are_their_formulas_and_never_run_one(kind, trainer, model, responses, sgd, run):
    """Two steps beside a loop in plain PyTorch; neither a copy of the model nor a pass of one."""
    formula, options = WITHOUT_REFERENCE[kind]
    twin, losses = copy.deepcopy(model), []
    for _ in range(2):
        losses.append(formula(*responses(twin)))
        grads = torch.autograd.grad(losses[-1], list(twin.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(twin.parameters(), grads):
                parameter -= 0.05 * grad
    made = trainer(model, loss_type=[kind], num_train_epochs=2, **options)
    assert not made.policy.copies
    result = run(made)
    assert result.losses == pytest.approx([float(x.detach()) for x in losses], abs=2e-5)
    assert abs(result.losses[0] - result.losses[1]) > 1e-3
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(result.weights[f"model.{name}"], parameter, atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize("kind", PAIRED)
def test_no_loss_depends_on_the_split_into_micro_batches(kind, trainer, make_model, sgd, run):
    """Six rows at once, and in parts of two: those that sort pairs sort all of the step's, likelihoods are per token of all."""
    options = {"label_smoothing": 0.1} if "label_smoothing" in PAIRED[kind].options else {}
    rows = [*ROWS, {"prompt": "q", "chosen": "r", "rejected": "s t"}]
    rate = {"ipo": 1e-3, "sppo_hard": 1e-3}.get(kind, 0.02)
    common = {"loss_type": [kind], "num_train_epochs": 3, "learning_rate": rate, **options}
    whole = run(trainer(make_model(), rows, **common, per_device_train_batch_size=6))
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    parts = run(trainer(make_model(), rows, **common, **split))
    assert len(whole.losses) == 3
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5, abs=1e-6)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], weight, atol=1e-5, rtol=0, msg=name)


def test_sorting_learns_from_margins_in_the_reference_s_order(trainer, model, responses, sgd, run):
    """AOT's first gradient beside plain PyTorch's: the k-th smallest margin against the reference's k-th smallest."""
    twin = copy.deepcopy(model)
    chosen, rejected = responses(twin)
    margins = torch.stack([x.sum() - y.sum() for x, y in zip(chosen, rejected)])
    loss = -logsigmoid(B * (margins.sort().values - margins.detach().sort().values)).mean()
    grads = torch.autograd.grad(loss, list(twin.parameters()))
    result = run(trainer(model, loss_type=["aot"], per_device_train_batch_size=2, gradient_accumulation_steps=3))
    assert result.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    for (name, parameter), grad in zip(twin.named_parameters(), grads):
        torch.testing.assert_close(
            result.weights[f"model.{name}"], parameter - 0.05 * grad, atol=1e-5, rtol=0, msg=name
        )


@pytest.mark.parametrize("kind", ["sigmoid", "aot", "orpo"])
def test_an_evaluation_is_over_all_rows_whatever_the_batch_size(kind, trainer, model, run):
    made = trainer(model, loss_type=[kind], eval_rows=ROWS)
    run(made)
    figures = []
    for size in (5, 2):
        made.args.per_device_train_batch_size = size
        figures.append(made.evaluate())
    assert figures[0] == pytest.approx(figures[1], abs=1e-5)


def test_bco_centres_rewards_by_their_mean_over_all_steps_before(trainer, model, run):
    """The shift of step 4 is the mean of the rewards that steps 1 to 3 logged; an evaluation adds nothing to it."""
    made = trainer(model, loss_type=["bco"], num_train_epochs=3, eval_rows=ROWS, eval_steps=1)
    steps = [s for s in run(made).steps if "rewards/chosen" in s]
    seen = [s[f"rewards/{which}"] for s in steps for which in ("chosen", "rejected")]
    assert len(seen) == 6
    assert float(made.rewards[0] / made.rewards[1]) == pytest.approx(sum(seen) / 6, rel=1e-5)
    assert float(made.rewards[1]) == 30.0


def test_bco_s_loss_is_of_rewards_less_that_mean(trainer, model, run):
    """Of one pair, whose rewards are logged as they are: the loss of the third step follows from the two before."""
    made = trainer(model, ROWS[:1], loss_type=["bco"], num_train_epochs=3, per_device_train_batch_size=1)
    *before, last = [(s["rewards/chosen"], s["rewards/rejected"], s["loss"]) for s in run(made).steps]
    shift = sum(chosen + rejected for chosen, rejected, _ in before) / 4
    centred = torch.tensor([last[0] - shift, shift - last[1]])
    assert last[2] == pytest.approx(float(-logsigmoid(centred).sum()), abs=1e-5)
    assert abs(shift) > 0.05


def test_a_resumed_run_of_bco_repeats_the_uninterrupted_one(trainer, make_model, run, settings):
    whole = run(trainer(make_model(), loss_type=["bco"], num_train_epochs=4))
    first = trainer(make_model(), loss_type=["bco"], num_train_epochs=4, save_steps=2)
    first.args.max_steps = 2
    run(first)
    second = trainer(make_model(), loss_type=["bco"], num_train_epochs=4, output_dir=first.args.output_dir)
    resumed = run(second, resume_from_checkpoint=True)
    assert resumed.losses[-2:] == whole.losses[-2:]
    torch.testing.assert_close(second.rewards[1], torch.tensor(40.0, dtype=torch.float64))


def test_a_row_counts_by_its_weight(trainer, make_model, run, sgd):
    """Weight 2 is the row twice, weight 0 is no row."""
    weights = [2.0, 1.0, 0.0, 1.0, 1.0]
    weighted = [{**row, "weight": w} for row, w in zip(ROWS, weights)]
    repeated = [row for row, w in zip(ROWS, weights) for _ in range(int(w))]
    for kinds in (["sigmoid"], ["cpo"]):
        runs = [run(trainer(make_model(), rows, loss_type=kinds, num_train_epochs=2)) for rows in (weighted, repeated)]
        assert runs[0].losses == pytest.approx(runs[1].losses, abs=1e-5)
    with pytest.raises(UserError, match="row 1: `weight` is 2.0, but loss_type aot sorts pairs"):
        trainer(make_model(), weighted, loss_type=["aot"])


def test_the_discount_of_the_longer_response_reaches_every_pass(trainer, make_model, run, responses):
    """Policy's and reference's log-probabilities, logged and kept on disk: beyond the shorter length a token counts a half."""
    for precompute in (False, True):
        made = trainer(make_model(), ld_alpha=0.5, precompute_ref_log_probs=precompute)
        step = run(made).steps[0]
        lengths = [(len(x), len(y)) for x, y in zip(*responses(make_model()))]
        for which, name in enumerate(("chosen", "rejected")):
            tokens = responses(make_model())[which]
            sums = [float(t[: min(n)].sum() + 0.5 * t[min(n) :].sum()) for t, n in zip(tokens, lengths)]
            assert step[f"logps/{name}"] == pytest.approx(sum(sums) / len(sums), abs=1e-4)
            assert step[f"rewards/{name}"] == pytest.approx(0.0, abs=1e-5)  # the reference has the same sums
    # another weight is another number: the kept ones are not read
    assert run(trainer(make_model(), precompute_ref_log_probs=True)).steps[0]["rewards/chosen"] == pytest.approx(
        0, abs=1e-5
    )


def test_pairs_weigh_what_the_policy_itself_would_write(trainer, model, plain, ids, sgd, run):
    """The first gradient of WPO beside plain PyTorch's, where nothing is saved by half the temperature: for each token
    p / sum of p^2 over the vocabulary. A discount of the longer response changes sums, and no weight.
    """
    twin = copy.deepcopy(model)

    def squares(row, which):
        prompt, response = ids(row["prompt"]), ids(row[which], end=True)
        logits = twin(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        return logits.softmax(-1).square().sum(-1).log()

    def response(row, which):
        return plain(twin, ids(row["prompt"]), ids(row[which], end=True))

    loss, weights = 0.0, []
    for row in ROWS:
        pair = {which: response(row, which) for which in ("chosen", "rejected")}
        shorter = min(map(len, pair.values()))
        w, l = (x[:shorter].sum() + 0.5 * x[shorter:].sum() for x in pair.values())
        weights.append(math.exp(sum((x - squares(row, which)).mean().item() for which, x in pair.items())))
        loss = loss - weights[-1] * logsigmoid(B * ((w - w.detach()) - (l - l.detach()))) / len(ROWS)
    assert max(weights) > 2 * min(weights)
    grads = torch.autograd.grad(loss, list(twin.parameters()))
    result = run(trainer(model, use_weighting=True, ld_alpha=0.5))
    assert result.losses[0] == pytest.approx(float(loss), abs=2e-5)
    for (name, parameter), grad in zip(twin.named_parameters(), grads):
        want = parameter - 0.05 * grad
        torch.testing.assert_close(result.weights[f"model.{name}"], want, atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"use_weighting": True, "loss_type": ["sigmoid", "aot"]},
            "weighs comparisons of a pair, and loss_type aot is",
        ),
        ({"use_weighting": True, "loss_type": ["sft"]}, "loss_type sft is none"),
        ({"ld_alpha": 1.5}, "ld_alpha is 1.5; it is a weight from 0 to 1"),
        ({"ld_alpha": 0.5, "loss_type": ["sigmoid", "cpo"]}, "loss_type cpo has none"),
        ({"ld_alpha": 0.5, "loss_type": ["sft"]}, "loss_type sft has none"),
        ({"loss_type": []}, "loss_type is empty; name at least one of sigmoid"),
        ({"loss_type": ["dpo"]}, "loss_type is 'dpo'; choose one of sigmoid, ipo"),
        ({"loss_type": ["sft", "ipo"], "loss_weights": [1.0]}, "loss_weights has 1 entries for 2 loss_type"),
        ({"loss_type": ["hinge"], "label_smoothing": 0.1}, "label_smoothing has no effect with loss_type hinge"),
        ({"loss_type": ["orpo"], "precompute_ref_log_probs": True}, "loss_type orpo needs no reference"),
    ],
)
def test_settings_that_do_not_combine_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        DPOConfig(**settings)
