"""Reward modelling: Bradley-Terry with margins and centring on pairs, Plackett-Luce on rankings."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from rlhf_fast import RewardConfig, RewardTrainer
from rlhf_fast.data.batch import Example, TokenBatch
from rlhf_fast.errors import UserError
from rlhf_fast.models import load
from rlhf_fast.models.adapters import lora_config

PAIRS = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "seventeen", "margin": 0.5},
    {"prompt": "name ", "chosen": "a longer one", "rejected": "no", "margin": 0.0},
    {"prompt": "x", "chosen": "y", "rejected": "z", "margin": 2.0},
]
RANKINGS = [
    {"prompt": "1+1=", "responses": ["two", "2", "3"], "ranking": [2, 1, 3]},
    {"prompt": "name ", "responses": ["b", "c"], "ranking": [2, 1]},
    {"prompt": "x", "responses": ["y", "z", "y z"], "ranking": [1, 2, 3]},
]
BEST_FIRST = [("1+1=", ["2", "two", "3"]), ("name ", ["c", "b"]), ("x", ["y", "z", "y z"])]


@pytest.fixture
def trainer(tokenizer, settings):
    def make(model, rows, peft=None, eval_rows=None, **more):
        args, data = RewardConfig(**settings(**more)), {"train_dataset": rows, "eval_dataset": eval_rows}
        return RewardTrainer(model, args, processing_class=tokenizer, peft_config=peft, **data)

    return make


@pytest.fixture
def score(ids):
    """score(trainer, prompt, response): by transformers alone, one sequence at a time, at the last token (<eos>)."""

    def at_the_last_token(trainer, prompt, response):
        body = copy.deepcopy(trainer.policy.model).get_decoder()
        body.set_attn_implementation("eager")
        hidden = body(torch.tensor([ids(prompt) + ids(response, end=True)])).last_hidden_state[0, -1]
        head = trainer.policy.heads["reward"]
        return float(hidden.double().detach() @ head.weight.double().detach() + head.bias.double().detach())

    return at_the_last_token


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


@pytest.fixture
def shaken():
    """A head that tells responses apart: a fresh one scores about 0."""

    def shake(trainer):
        torch.nn.init.normal_(trainer.policy.heads["reward"].weight, std=0.5)
        torch.nn.init.constant_(trainer.policy.heads["reward"].bias, 0.7)
        return trainer

    return shake


def test_a_pairs_loss_has_the_margin_inside_and_the_centring_outside(trainer, model, score, shaken, run):
    made = shaken(trainer(model, PAIRS, center_rewards_coefficient=0.3))
    want, rights, margins, means = 0.0, 0, 0.0, 0.0
    for row in PAIRS:
        w, l = (score(made, row["prompt"], row[which]) for which in ("chosen", "rejected"))
        want += (-log_sigmoid(w - l - row["margin"]) + 0.3 * (w + l) ** 2) / 3
        rights, margins, means = rights + (w > l) / 3, margins + (w - l) / 3, means + (w + l) / 6
    step = run(made).steps[0]
    assert step["loss"] == pytest.approx(want, abs=1e-5)
    assert (step["accuracy"], step["margin"], step["mean_reward"]) == pytest.approx((rights, margins, means), abs=1e-5)
    assert 0.1 < abs(step["margin"])


def test_rankings_have_the_plackett_luce_loss_and_pairs_among_them_that_of_pairs(trainer, model, score, shaken, run):
    """The best of what is left wins each time; accuracy is the share of a row's pairs in the right order."""
    made = shaken(trainer(model, RANKINGS, center_rewards_coefficient=0.3))
    want, accuracy = 0.0, 0.0
    for prompt, responses in BEST_FIRST:
        s = [score(made, prompt, r) for r in responses]
        for k in range(len(s) - 1):
            want += (math.log(sum(map(math.exp, s[k:]))) - s[k]) / 3
        if len(s) == 2:
            want += 0.3 * sum(s) ** 2 / 3
        pairs = [(i, j) for i in range(len(s)) for j in range(i + 1, len(s))]
        accuracy += sum(s[i] > s[j] for i, j in pairs) / len(pairs) / 3
    step = run(made).steps[0]
    assert step["loss"] == pytest.approx(want, abs=1e-5)
    assert step["accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_a_short_ranking_in_the_first_row_hides_no_pairs_of_the_others(trainer, make_model, shaken, run):
    """The order of the rows changes no figure."""
    figures = []
    for rows in (RANKINGS, [RANKINGS[1], RANKINGS[0], RANKINGS[2]]):
        torch.manual_seed(3)
        made = trainer(make_model(), rows)
        torch.manual_seed(3)
        step = run(shaken(made)).steps[0]
        figures.append([step[k] for k in ("loss", "accuracy", "margin", "mean_reward")])
    assert figures[0] == pytest.approx(figures[1], abs=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_saved_reward_model_gives_the_same_scores(lora, trainer, make_model, tokenizer, run, tmp_path, ids):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    peft = lora_config(r=4, alpha=8) if lora else None
    made = trainer(str(tmp_path / "base"), PAIRS, peft, num_train_epochs=3, learning_rate=1e-2)
    run(made)
    sequences = [ids(p) + ids(r, end=True) for p, responses in BEST_FIRST for r in responses]
    probe = TokenBatch.pack([Example(s, [False] + [True] * (len(s) - 1)) for s in sequences])
    with torch.no_grad():
        want = made.policy.eval().scores(probe)
        again = load(made.args.output_dir).scores(probe)
    assert torch.equal(again, want)
    assert want.std() > 1e-3


def test_learning_separates_the_chosen_from_the_rejected(trainer, model, run):
    result = run(trainer(model, PAIRS, num_train_epochs=30, learning_rate=1e-2))
    assert result.steps[0]["accuracy"] < 1.0
    assert result.steps[-1]["accuracy"] == 1.0
    assert result.steps[-1]["margin"] > 1.0


def test_centring_keeps_scores_around_zero(trainer, make_model, shaken, run):
    """The head starts with a bias of 0.7; only centring has a reason to take it away."""
    left = []
    for center in (0.0, 1.0):
        made = shaken(
            trainer(make_model(), PAIRS, center_rewards_coefficient=center, num_train_epochs=40, learning_rate=1e-2)
        )
        left.append(abs(run(made).steps[-1]["mean_reward"]))
    assert left[1] < 0.1 * left[0]


def test_rows_count_by_their_weight(trainer, make_model, run):
    """Weight 2 is the row twice, weight 0 is no row."""
    weights = [2.0, 0.0, 1.0]
    weighted = [{**row, "weight": w} for row, w in zip(PAIRS, weights)]
    repeated = [row for row, w in zip(PAIRS, weights) for _ in range(int(w))]
    runs = [run(trainer(make_model(), rows, num_train_epochs=2)).losses for rows in (weighted, repeated)]
    torch.testing.assert_close(torch.tensor(runs[0]), torch.tensor(runs[1]), atol=1e-5, rtol=0)


def test_an_ensembles_loss_is_the_mean_of_its_heads_each_with_row_weights_of_its_own(trainer, model, run):
    """Three heads; the score is their mean, disagreement their standard deviation, by plain arithmetic on head_scores."""
    made = trainer(model, PAIRS, num_heads=3, center_rewards_coefficient=0.3)
    torch.nn.init.normal_(made.policy.heads["reward"].weight, std=0.5)
    weights = torch.tensor([r.head_weights for r in made.train_records])
    assert weights.mean(0).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert weights.std() > 0.2
    with torch.no_grad():
        each = made.policy.head_scores(made.pack([e for r in made.train_records for e in r.responses])).view(3, 2, 3)
    want = 0.0
    for row, pair, of_heads in zip(PAIRS, each.tolist(), weights.tolist()):
        for w, l, weight in zip(*pair, of_heads):
            want += weight * (-log_sigmoid(w - l - row["margin"]) + 0.3 * (w + l) ** 2) / 9
    step = run(made).steps[0]
    assert step["loss"] == pytest.approx(want, abs=1e-5)
    assert step["margin"] == pytest.approx(float((each[:, 0] - each[:, 1]).mean()), abs=1e-5)
    assert step["disagreement"] == pytest.approx(float(each.std(-1, correction=0).mean()), abs=1e-5)


def test_an_ensemble_is_saved_with_all_its_heads(trainer, make_model, tokenizer, run, tmp_path, ids):
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    made = trainer(str(tmp_path / "base"), PAIRS, lora_config(r=4, alpha=8), num_heads=3, learning_rate=1e-2)
    run(made)
    probe = TokenBatch.pack([Example(ids("12+3"), [False] + [True] * 3), Example(ids("ab"), [False, True])])
    again = load(made.args.output_dir)
    with torch.no_grad():
        want = made.policy.eval().head_scores(probe)
        assert torch.equal(again.head_scores(probe), want)
        torch.testing.assert_close(again.scores(probe), want.mean(1))
    assert want.std(1).min() > 1e-4
    with pytest.raises(UserError, match="num_heads is 2, but the reward model to go on with has 3"):
        trainer(made.args.output_dir, PAIRS, num_heads=2)


def test_heads_agree_on_the_pairs_they_learned_and_part_on_letters_they_never_saw(trainer, model, run, ids):
    """Each head's difference of scores within a pair, in standard deviations over the heads."""
    made = trainer(model, PAIRS, num_heads=8, num_train_epochs=40, learning_rate=1e-2)
    run(made)
    seen = [e for r in made.train_records for e in r.responses]
    strange = [
        Example(ids(text), [False] + [True] * (len(text) - 1))
        for text in ("#$#$", "qqqq", "7839", "k.k.", "ffgg", "ggff")
    ]
    with torch.no_grad():
        seen, strange = (made.policy.eval().head_scores(made.pack(x)).view(3, 2, 8) for x in (seen, strange))
    sure, unsure = ((x[:, 0] - x[:, 1]).mean(1).abs() / (x[:, 0] - x[:, 1]).std(1) for x in (seen, strange))
    assert (seen[:, 0] > seen[:, 1]).all()
    assert sure.mean() > 2 * unsure.mean()


@pytest.mark.parametrize("rows", [PAIRS, RANKINGS], ids=["pairs", "rankings"])
def test_an_evaluation_reports_tau_and_calibration_of_every_pair(rows, trainer, model, score, shaken, capsys):
    """Kendall's tau per row and its mean; sigmoid of each difference of scores beside who won, in a file and a line."""
    made = shaken(trainer(model, rows, eval_rows=rows, per_device_train_batch_size=2))
    made.args.quiet = False
    table = BEST_FIRST if rows is RANKINGS else [(r["prompt"], [r["chosen"], r["rejected"]]) for r in PAIRS]
    taus, differences = [], []
    for prompt, responses in table:
        s = [score(made, prompt, r) for r in responses]
        of_row = [s[i] - s[j] for i in range(len(s)) for j in range(i + 1, len(s))]
        taus.append(sum(math.copysign(1, d) for d in of_row) / len(of_row))
        differences += of_row
    figures = made.evaluate()
    assert figures["eval_kendall_tau"] == pytest.approx(sum(taus) / len(taus), abs=1e-6)
    report = json.loads((Path(made.args.output_dir) / "reward_calibration.json").read_text())
    assert report["pairs"] == len(differences) == sum(b["pairs"] for b in report["bins"])
    sure = [1 / (1 + math.exp(-abs(d))) for d in differences]
    assert report["mean_confidence"] == pytest.approx(sum(sure) / len(sure), abs=1e-5)
    assert report["accuracy"] == sum(d > 0 for d in differences) / len(differences)
    assert figures["eval_ece"] == report["ece"] > 0.0
    assert f"right on {len(differences)} pairs" in capsys.readouterr().out


def test_a_head_less_ensemble_is_refused():
    with pytest.raises(UserError, match="num_heads is 0; it must be at least 1"):
        RewardConfig(num_heads=0)
