"""What the ranks of a run agree on, seen from one of them; the others say what the test has them say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import rlhf_fast.run.distribution
from rlhf_fast.errors import RolloutError, UserError
from rlhf_fast.run.distribution import Ranks


@pytest.fixture
def ranks(monkeypatch):
    """ranks(index, other) -> one of two; the other one tells ``other`` of its failure, and hears what this one tells."""
    heard = []

    def make(index, other=None):
        def gather(mine):
            heard.append(mine[0])
            return [*mine, other] if index == 0 else [other, *mine]

        monkeypatch.setattr(rlhf_fast.run.distribution, "gather_object", gather)
        return Ranks(SimpleNamespace(num_processes=2, process_index=index))

    make.heard = heard
    return make


def failing(error):
    def work():
        raise error

    return work


def test_what_succeeds_everywhere_is_what_it_is(ranks):
    assert ranks(0).together(lambda: 7) == 7
    assert ranks.heard == [None]


@pytest.mark.parametrize("kind", [RolloutError, UserError, RuntimeError])
def test_a_failure_of_another_rank_is_raised_here_with_its_number(ranks, kind):
    with pytest.raises(kind, match=r"^process 1: the cable$") as error:
        ranks(0, (kind.__name__, "the cable")).together(lambda: 7)
    assert type(error.value) is kind


def test_a_failure_here_is_raised_as_it_is_and_told(ranks):
    mine = ValueError("nothing left")
    with pytest.raises(ValueError, match="nothing left") as error:
        ranks(1).together(failing(mine))
    assert error.value is mine and ranks.heard == [("RuntimeError", "nothing left")]


def test_of_two_failures_all_ranks_raise_the_graver_kind(ranks):
    """A run whose servers are gone is saved by all ranks: none may try while another ends for good."""
    gone = RolloutError("no samples")
    with pytest.raises(UserError, match="^process 0: no samples; process 1: no reward$") as error:
        ranks(0, ("UserError", "no reward")).together(failing(gone))
    assert type(error.value) is UserError and error.value.__cause__ is gone
    with pytest.raises(UserError, match="no reward"):
        ranks(1, ("RolloutError", "no samples")).together(failing(UserError("no reward")))


def test_the_first_rank_works_for_all(ranks, monkeypatch):
    sent = []
    monkeypatch.setattr(rlhf_fast.run.distribution, "broadcast_object_list", sent.append)
    assert ranks(0).from_main(lambda: 7) == 7
    ranks(1).from_main(failing(AssertionError("only the first works")))
    assert sent == [[7], [None]]
