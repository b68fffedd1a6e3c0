"""A reward model as a reward function."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.rewards import RewardModel, resolve_all, score

PROMPTS = ["ab", "cdefg", "h"]
TEXTS = ["12", "3", "45678"]


def expected(policy, prompt_ids, completion_ids):
    """The head applied to the last hidden state of one unpadded sequence."""
    with torch.no_grad(), policy.generation_model("reward") as model:
        hidden = model.get_decoder()(torch.tensor([[*prompt_ids, *completion_ids]])).last_hidden_state[0, -1]
        return float(policy.heads["reward"](hidden[None])[0])


def ids_of(tokenizer, texts, eos=False):
    return [tokenizer.encode(t, add_special_tokens=False) + [0] * eos for t in texts]


@pytest.mark.parametrize("max_tokens", [1, 10, 1000])
def test_scores_are_those_of_the_sampled_ids(make_policy, tokenizer, max_tokens):
    """The EOS that a rollout ended with is scored, and one that is not there is not added."""
    policy = make_policy("reward").train()
    prompts, completions = ids_of(tokenizer, PROMPTS), ids_of(tokenizer, TEXTS, eos=True)
    completions[1].pop()  # cut by its length
    scores = RewardModel(policy, max_tokens=max_tokens)(PROMPTS, TEXTS, completions, prompt_ids=prompts)
    assert scores == pytest.approx([expected(policy, p, c) for p, c in zip(prompts, completions)], abs=1e-5)
    assert RewardModel(policy)(PROMPTS, TEXTS, completions) == pytest.approx(scores, abs=1e-5)
    assert policy.training


def test_ids_of_another_tokenizer_are_never_scored(make_policy, tokenizer, other_tokenizer):
    policy = make_policy("reward")
    foreign = ids_of(other_tokenizer, TEXTS, eos=True)
    scores = RewardModel(policy)(PROMPTS, TEXTS, foreign, prompt_ids=ids_of(other_tokenizer, PROMPTS))
    own = zip(ids_of(tokenizer, PROMPTS), ids_of(tokenizer, TEXTS, eos=True))
    assert scores == pytest.approx([expected(policy, p, c) for p, c in own], abs=1e-5)


def test_a_saved_reward_model_is_named_by_its_folder(make_policy, tokenizer, tmp_path):
    policy = make_policy("reward")
    policy.save(tmp_path / "helpful")
    functions, names = resolve_all([str(tmp_path / "helpful")])
    assert names == ["helpful"]
    ids = ids_of(tokenizer, TEXTS)
    table = score(functions, names, PROMPTS, TEXTS, ids, {"prompt_ids": ids_of(tokenizer, PROMPTS)})
    assert not table.messages
    assert table.values[:, 0].tolist() == pytest.approx(RewardModel(policy)(PROMPTS, TEXTS, ids), abs=1e-5)


def test_a_model_without_a_head_is_refused(make_policy, tmp_path):
    make_policy("policy").save(tmp_path / "sft")
    with pytest.raises(UserError, match="sft: not a reward model"):
        RewardModel(str(tmp_path / "sft"))


def test_an_ensembles_disagreement_is_known_and_can_cost(make_policy, tokenizer):
    """Heads that say 1, 2 and 6 of everything: mean 3, standard deviation sqrt(14/3); half of it taken off."""
    policy = make_policy("policy")
    policy.add_head("reward", count=3)
    policy.heads["reward"].weight.data.zero_()
    policy.heads["reward"].bias.data = torch.tensor([1.0, 2.0, 6.0])
    model = RewardModel(policy)
    assert model(PROMPTS, TEXTS, ids_of(tokenizer, TEXTS)) == pytest.approx([3.0] * 3)
    assert model.stds == pytest.approx([(14 / 3) ** 0.5] * 3)
    wary = RewardModel(policy, disagreement_penalty=0.5)
    assert wary(PROMPTS, TEXTS, ids_of(tokenizer, TEXTS)) == pytest.approx([3 - 0.5 * (14 / 3) ** 0.5] * 3)
    with pytest.raises(UserError, match="disagreement_penalty needs a reward model of several heads"):
        RewardModel(make_policy("reward"), disagreement_penalty=0.5)
