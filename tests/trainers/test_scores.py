"""What responses are worth: running moments against torch's, whitening over several processes, the KL controller."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast.data.batch import Example, Experience
from rlhf_fast.kernels import whiten
from rlhf_fast.trainers.scores import Scores, kl_factor, punish_overlong, whiten_over_ranks


class Alone:
    """The ranks of a run of one process."""

    def __len__(self):
        return 1

    def sum(self, *numbers):
        return numbers


ALONE = Alone()


def experiences(rewards, length=3):
    return [Experience(Example([1] * (length + 1), [False] + [True] * length), reward=r) for r in rewards]


def settled(scores, rewards):
    batch = experiences(rewards)
    scores.settle(batch)
    return [e.reward for e in batch]


def test_scores_are_normalised_by_all_that_was_seen_so_far():
    """Batches of different sizes, one score that is missing, a mean far from 0."""
    scores, seen = Scores(True, 1.0, None, ALONE), []
    for rewards in ([101.0, 103.0], [90.0, math.nan, 120.0, 100.0], [100.5]):
        got = settled(scores, rewards)
        seen += [r for r in rewards if not math.isnan(r)]
        all_of_it = torch.tensor(seen, dtype=torch.float64)
        want = [(r - float(all_of_it.mean())) / float(all_of_it.std()) for r in rewards]
        assert got == pytest.approx(want, nan_ok=True)


def test_the_moments_survive_a_checkpoint():
    whole, first, second = (Scores(True, 1.0, None, ALONE) for _ in range(3))
    settled(whole, [1.0, 2.0]), settled(first, [1.0, 2.0])
    second.load_state(first.state())
    assert settled(second, [5.0]) == settled(whole, [5.0])


def test_equal_scores_are_not_divided_by_nothing():
    assert settled(Scores(True, 1.0, None, ALONE), [7.0, 7.0]) == [0.0, 0.0]


def test_scores_are_scaled_and_then_cut():
    assert settled(Scores(False, 2.0, 3.0, ALONE), [1.0, 2.0, -4.0, math.nan]) == pytest.approx(
        [2.0, 3.0, -3.0, math.nan], nan_ok=True
    )


@pytest.mark.parametrize(("tokens", "penalty"), [(1, 0.0), (12, 0.0), (13, 0.25), (15, 0.75), (16, 1.0)])
def test_overlong_responses_lose_up_to_1(tokens, penalty):
    """Of 16 tokens at most, over the last 4 (arXiv:2503.14476, eq. 13)."""
    batch = experiences([0.5], length=tokens)
    punish_overlong(batch, 16, 4)
    assert batch[0].reward == 0.5 - penalty
    punish_overlong(batch, 16, 0)
    assert batch[0].reward == 0.5 - penalty


def test_whitening_over_processes_is_that_of_all_their_tokens():
    torch.manual_seed(0)
    x, mask = 5 + 3 * torch.randn(40), torch.rand(40) > 0.3
    parts = list(zip(x.split([25, 15]), mask.split([25, 15])))

    class Two:
        """The ranks of a run of two, as one of them sees it: what they sum comes with the other's share."""

        def __init__(self, other):
            self.other, self.calls = other, 0

        def __len__(self):
            return 2

        def sum(self, *numbers):
            chosen = self.other[0][self.other[1]].double()
            self.calls += 1
            mean = float(x[mask].double().mean())
            there = (len(chosen), float(chosen.sum())) if self.calls == 1 else (float((chosen - mean).square().sum()),)
            return tuple(a + b for a, b in zip(numbers, there))

    for shift in (True, False):
        got = [whiten_over_ranks(*parts[i], Two(parts[1 - i]), shift_mean=shift) for i in (0, 1)]
        torch.testing.assert_close(torch.cat(got), whiten(x, mask, shift_mean=shift), atol=1e-5, rtol=1e-5)


def test_the_kl_controller_stays_put_without_responses():
    assert kl_factor(0.0, 0.0, 1.0, 10) == 1.0
    assert kl_factor(3.0, 2.0, 1.0, 10) == pytest.approx(1 + 0.2 * 2 / 10)
    assert kl_factor(2.2, 2.0, 1.0, 10) == pytest.approx(1 + 0.1 * 2 / 10)
