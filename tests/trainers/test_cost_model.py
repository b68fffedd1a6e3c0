"""Cost models: harm learned apart from worth, from the same rows or from other files, and used on one base."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlhf_fast import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SafePPOConfig, SafePPOTrainer
from rlhf_fast.errors import UserError
from rlhf_fast.models import load
from rlhf_fast.rewards.model import RewardModel
from rlhf_fast.run.metrics import read_metrics

ROWS = [
    {"prompt": "1+1=", "responses": ["2", "bad"], "better": 0, "safer": 0, "safe": [True, False]},
    {"prompt": "name ", "responses": ["a longer one", "no"], "better": 0, "safer": 1, "safe": [False, True]},
    {"prompt": "x", "responses": ["y", "z"], "better": 1, "safer": 0},
    {"prompt": "q ", "responses": ["ww", "v"], "better": 1, "safer": 1, "safe": [True, True]},
]


def softplus(x):
    return math.log1p(math.exp(x))


@pytest.fixture
def trainer(tokenizer, settings):
    def make(model, kind="cost", rows=ROWS, **more):
        options = {"per_device_train_batch_size": 4, "max_steps": 1, **more}
        args = RewardConfig(**settings(kind=kind, **options))
        return RewardTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)

    return make


@pytest.mark.parametrize("heads", [1, 2])
def test_the_loss_of_a_cost_by_hand(heads, trainer, model):
    """-log sigma(C_worse - C_safer), and -log sigma(+-C) of each labelled response; the row without labels is centred."""
    made = trainer(model, num_heads=heads, center_rewards_coefficient=0.5)
    with torch.no_grad():
        for parameter in made.policy.heads["cost"].parameters():
            parameter.copy_(torch.linspace(-0.6, 0.5, parameter.numel()).view_as(parameter))
    for preference in made.train_records:
        preference.head_weights = None
    batch = made.pack([e for r in made.train_records for e in r.responses])
    each = made.policy.head_scores(batch, role="cost").detach().double().view(4, 2, heads)
    total = 0.0
    for head in range(heads):
        for record, (safer, worse) in zip(made.train_records, each[:, :, head].tolist()):
            total += softplus(safer - worse)
            if record.safe is None:
                total += 0.5 * (safer + worse) ** 2
            else:
                total += sum(softplus(c if safe else -c) for c, safe in zip((safer, worse), record.safe))
    ((loss, figures, _),) = made.losses(made.train_records, made.own_window(made.train_records))
    assert float(loss.detach()) == pytest.approx(total / 4 / heads, rel=1e-5)
    mean = each.mean(2)
    assert float(figures["accuracy"]) == pytest.approx(float((mean[:, 0] < mean[:, 1]).double().mean()))
    labelled = [(c, s) for r, row in zip(made.train_records, mean.tolist()) if r.safe for c, s in zip(row, r.safe)]
    right = sum((c < 0) == safe for c, safe in labelled)
    assert (float(figures["sign_accuracy"][0]), figures["sign_accuracy"][1]) == pytest.approx((right / 6, 6))
    assert float(figures["max_cost"]) == pytest.approx(float(mean.max()), rel=1e-5)


def test_the_same_rows_teach_a_reward_by_the_one_label_and_a_cost_by_the_other(trainer, make_model, tokenizer):
    def first(kind):
        records = trainer(make_model(), kind).train_records
        return [tokenizer.decode(r.responses[0].input_ids, skip_special_tokens=True) for r in records]

    assert first("reward") == ["1+1=2", "name a longer one", "xz", "q v"]
    assert first("cost") == ["1+1=2", "name no", "xy", "q v"]
    assert [r.safe for r in trainer(make_model()).train_records] == [[True, False], [True, False], None, [True, True]]


def test_a_cost_model_learns_which_side_of_0_a_response_is_on(trainer, model):
    made = trainer(model, max_steps=30, learning_rate=3e-3)
    made.train()
    figures = made.evaluate()
    assert figures["eval_accuracy"] == 1.0 and figures["eval_sign_accuracy"] == 1.0


@pytest.fixture
def runs(trainer, make_model, tokenizer, tmp_path):
    """A base, and a reward and a cost model that are adapters on it."""
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folders = {}
    for kind in ("reward", "cost"):
        made = trainer(str(tmp_path / "base"), kind, use_peft=True, lora_r=2, max_steps=3, learning_rate=1e-2)
        made.train()
        folders[kind] = made.args.output_dir
    return {"base": str(tmp_path / "base"), **folders}


def test_reward_cost_and_both_critics_are_adapters_on_one_base(runs, settings, scripted, tokenizer, run):
    """Costs are what the cost model by itself says, and its adapter and head stand still; GRPO takes it too."""
    common = settings(cost_model_path=runs["cost"], use_peft=True, lora_r=2, max_completion_length=8, max_steps=2)
    data = {"train_dataset": [{"prompt": p} for p in "abcdefgh"]}
    script = scripted({p: ["2", "bad", "no", "y"] for p in "abcdefgh"})
    made = SafePPOTrainer(
        runs["base"], args=SafePPOConfig(**common, reward_model_path=runs["reward"]), engine=script, **data
    )
    assert set(made.policy.adapters.names) == {"policy", "value", "cost_value", "reward", "cost"}
    assert all(model.policy is made.policy for model in [*made.functions, *made.costs])
    result = run(made)
    alone = RewardModel(runs["cost"])
    assert alone.kind == "cost"
    want = alone(list("abcdefgh"), ["2"] * 8, [tokenizer("2")["input_ids"] + [0]] * 8)
    assert result.steps[0]["cost"] == pytest.approx(sum(want) / 8, abs=1e-5)
    assert not any("cost." in name for name in result.weights)
    common["output_dir"] += "-grpo"
    grouped = GRPOTrainer(runs["base"], "random", args=GRPOConfig(**common, num_generations=4), engine=script, **data)
    assert "cost" in run(grouped).steps[0]
    assert set(grouped.policy.adapters.names) == {"policy", "cost"}


def test_a_model_of_the_wrong_kind_is_refused_before_it_trains_anything(runs, settings, tokenizer):
    data = {"train_dataset": [{"prompt": "a"}]}
    with pytest.raises(UserError, match="cost is a cost model and stands among the rewards; give it to cost_funcs or"):
        folder = Path(runs["cost"]).rename(Path(runs["cost"]).with_name("cost"))
        runs["cost"] = str(folder)
        GRPOTrainer(runs["base"], [str(folder)], args=GRPOConfig(**settings(use_peft=True)), **data)
    args = SafePPOConfig(**settings(use_peft=True, cost_model_path=runs["reward"], reward_model_path=runs["reward"]))
    with pytest.raises(UserError, match="not a cost model .* train one with rlhf-fast reward --kind cost"):
        SafePPOTrainer(runs["base"], args=args, **data)


def test_doubt_about_a_cost_makes_it_dearer(make_model, tokenizer):
    policy = load(make_model(), tokenizer=tokenizer, role="cost")
    policy.add_head("cost", count=3)
    given = (["a", "b"], ["xyz", "q"], [tokenizer(t)["input_ids"] + [0] for t in ("xyz", "q")])
    plain, wary = RewardModel(policy), RewardModel(policy, disagreement_penalty=2.0)
    scores, dearer = plain(*given), wary(*given)
    assert dearer == pytest.approx([s + 2.0 * d for s, d in zip(scores, plain.stds)], abs=1e-6)
    assert min(plain.stds) > 0


def test_doubt_of_models_beside_the_policy_is_priced_by_the_config(trainer, make_model, tokenizer, tmp_path, settings):
    """Off the reward, onto the cost; nothing to doubt is refused."""
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    runs = {}
    for kind in ("reward", "cost"):
        made = trainer(str(tmp_path / "base"), kind, use_peft=True, lora_r=2, num_heads=3, learning_rate=1e-2)
        made.train()
        runs[f"{kind}_model_path"] = made.args.output_dir
    given = (["a", "b"], ["xyz", "q"], [tokenizer(t)["input_ids"] + [0] for t in ("xyz", "q")])
    scores = []
    for penalty in (0.0, 2.0):
        args = SafePPOConfig(**settings(use_peft=True, lora_r=2, disagreement_penalty=penalty, **runs))
        made = SafePPOTrainer(str(tmp_path / "base"), args=args, train_dataset=[{"prompt": "a"}])
        models = (made.functions[0], made.costs[0])
        scores.append([(model(*given), model.stds) for model in models])
    for (plain, stds), (wary, _), sign in zip(*scores, (-1, 1)):
        assert wary == pytest.approx([s + sign * 2.0 * d for s, d in zip(plain, stds)], abs=1e-5)
    with pytest.raises(UserError, match="disagreement_penalty has no effect without a reward_model_path"):
        GRPOConfig(disagreement_penalty=1.0)


def test_what_a_cost_run_says_and_leaves(trainer, model, capsys):
    """Without labels of safety its 0 is arbitrary, which it says; it names Safe PPO as what comes next."""
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "bad"}] * 4
    made = trainer(model, rows=rows, quiet=False, logging_steps=1)
    made.train()
    assert "no row says which responses are safe" in capsys.readouterr().out
    assert "--cost_model_path {run}" in made.next_commands[0]
    assert json.loads((Path(made.args.output_dir) / "rlhf_fast.json").read_text())["role"] == "cost"
    assert "mean_cost" in read_metrics(made.args.output_dir)[0]
