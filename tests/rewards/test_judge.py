"""The reward `judge`, before a scripted server and with a local model; what it cannot score is a fault."""

from __future__ import annotations

import re

import pytest
import torch

from bench.scripted import ScriptedServer
from rlhf_fast.errors import UserError
from rlhf_fast.rewards import check_columns, resolve, score


def grader(messages):
    """The grade that a response names; nonsense for others."""
    response = re.search(r"<response>\n(.*?)\n</response>", messages[0]["content"], re.DOTALL)[1]
    return f"Well. [[{response.removeprefix('worth ')}]]" if response.startswith("worth") else "I cannot say."


def longest(messages):
    """Prefers the longer response; between equally long ones the first shown, as a biased judge would."""
    shown = re.findall(r"<response (.)>\n(.*?)\n</response", messages[0]["content"], re.DOTALL)
    order = sorted(shown, key=lambda item: -len(item[1]))
    return "[[" + " > ".join(label for label, _ in order) + "]]"


def table(judge, prompts, completions, **columns):
    return score([judge], ["judge"], prompts, completions, [[1]] * len(prompts), columns)


def test_a_grade_is_a_score_and_anything_else_a_fault():
    with ScriptedServer(grader, plan=[None] * 3 + [400]) as server:
        judge = resolve({"name": "judge", "url": server.url, "concurrency": 1})
        found = table(judge, ["p"] * 4, ["worth 10", "worth 1", "worthless", "worth 7"])
    assert found.values[:2, 0].tolist() == [1.0, 0.0] and found.values[2:].isnan().all()
    assert found.faults == {"judge": 2}
    assert sorted("no verdict in [[ ]]" in m for m in found.messages) == [False, True]
    assert any("answered 400" in m for m in found.messages)


@pytest.mark.parametrize(("together", "calls"), [(2, 2 + 6), (4, 2 + 2)])
def test_in_a_group_a_score_is_the_share_of_the_others_that_one_beats(together, calls):
    """Prompts interleaved; of p's three, two are equally long: the judge's liking for the first makes them a tie."""
    with ScriptedServer(longest) as server:
        judge = resolve({"name": "judge", "url": server.url, "mode": "group", "together": together})
        found = table(judge, ["p", "q", "p", "p", "q", "r"], ["aaaa", "a", "bb", "cc", "aaa", "alone"])
        assert len(server.calls) == calls
    assert found.values[:5, 0].tolist() == [1.0, 0.0, 0.25, 0.25, 1.0]
    assert found.values[5].isnan() and "nothing to compare" in found.messages[0]


def test_verdicts_are_paid_for_once_also_by_a_later_run(tmp_path):
    options = {"name": "judge", "mode": "score", "cache": str(tmp_path / "verdicts.jsonl")}
    with ScriptedServer(grader) as server:
        for _ in range(2):
            judge = resolve({**options, "url": server.url})
            assert table(judge, ["p"] * 3, ["worth 4", "worth 4", "worth 7"]).values[:, 0].tolist() == pytest.approx(
                [1 / 3, 1 / 3, 2 / 3]
            )
        assert len(server.calls) == 2


def test_a_column_that_the_rubric_shows_is_missed_at_the_start(tmp_path):
    rubric = tmp_path / "r.txt"
    rubric.write_text("{prompt} {responses} Truth: {answer}")
    with ScriptedServer(lambda m: "[[1]]" if m[0]["content"].endswith("Truth: 7") else "[[10]]") as server:
        judge = resolve({"name": "judge", "url": server.url, "rubric": str(rubric)})
        with pytest.raises(UserError, match="needs a column 'answer'"):
            check_columns([judge], ["judge"], ["prompt_ids"])
        check_columns([judge], ["judge"], ["answer"])
        assert table(judge, ["p", "p"], ["r", "r"], answer=[7, 8]).values[:, 0].tolist() == [0, 1]


def test_a_local_judge_scores_with_the_same_code(make_policy):
    """Random weights give no verdict: every sample is a fault, none a score, and no generator of the run is touched."""
    judge = resolve({"name": "judge", "model": make_policy(), "max_new_tokens": 3, "rubric": "score"})
    judge.panel.rubric.text = "{prompt}{responses}"  # the context is 64 characters
    state = torch.get_rng_state()
    found = table(judge, ["a", "b"], ["c", "d"])
    assert torch.equal(state, torch.get_rng_state())
    assert found.faults == {"judge": 2} and "no verdict" in found.messages[0] and judge.panel.unread == 2


def test_a_mistake_is_told_at_the_start():
    with pytest.raises(UserError, match="mode is score or group"):
        resolve({"name": "judge", "mode": "best", "url": "http://127.0.0.1:1"})
    with pytest.raises(UserError, match="cannot be reached"):
        resolve({"name": "judge", "url": "http://127.0.0.1:1"})
    with pytest.raises(UserError, match="name a model to ask"):
        resolve("judge")
