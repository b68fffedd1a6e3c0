"""bench.constitution's road in short: the revisions' word reaches the policy, the control's does not."""

from __future__ import annotations

from bench.constitution import WORD, breaks, critic, on_topic, one_seed, people, table


def test_sft_on_revised_answers_lowers_violations_and_the_control_does_not(tmp_path):
    """A third of the steps of the bench. The model says the word in about half of its answers before."""
    result = one_seed(tmp_path, seed=0, steps=90, more_steps=30, samples=4)
    before, control, after = (result[stage]["violations"] for stage in list(result)[1:])
    assert 0.3 < result["revised"] < 0.8 and 0.3 < before < 0.8
    assert after < 0.1 and control > 0.25
    (_, violations, _, each), *_ = table([result, result])
    assert violations == f"{before:.1%} ± 0.0%" and each == f"{before:.1%}, {before:.1%}"


def test_the_critic_finds_the_word_and_leaves_only_it_out():
    said = [{"content": "q"}, {"content": f"A jar is {WORD} useful."}, {"content": "Criticise"}]
    assert WORD in critic(said) and "Nothing" in critic([{}, {"content": "A jar is useful."}, {}])
    assert critic([*said, {"content": "c"}, {"content": "Rewrite"}]) == "A jar is useful."


def test_people_say_the_word_as_often_as_said_and_held_out_prompts_are_new():
    train, held_out = people(0)
    said = breaks([row["completion"] for row in train])
    assert 0.5 < sum(said) / len(said) < 0.7 and all(
        on_topic(completions=[r["completion"] for r in train], thing=[r["thing"] for r in train])
    )
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
