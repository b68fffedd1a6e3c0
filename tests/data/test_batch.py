"""How examples become rows: end to end, and once what neighbours share."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from rlhf_fast.data.batch import (
    SHARING_GAIN,
    Example,
    Experience,
    TokenBatch,
    packed,
    packed_length,
    shared_runs,
    unpack,
)


def example(prompt, response, **more):
    return Example([*prompt, *response], [False] * len(prompt) + [True] * len(response), **more)


def test_a_shared_prompt_by_hand():
    """[7 8 9 | 1 2 | 3 | 4 5], then a row of its own: the first token of a response is predicted by the prompt's last row."""
    group = [example([7, 8, 9], r, weight=w) for r, w in (([1, 2], 1.0), ([3], 2.0), ([4, 5], 3.0))]
    batch = TokenBatch.pack([*group, example([7], [6, 6])])
    assert batch.input_ids.tolist() == [7, 8, 9, 1, 2, 3, 4, 5, 7, 6, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 0, 1, 2]
    assert batch.response_rows.tolist() == [3, 4, 5, 6, 7, 9, 10]
    assert batch.predictor_rows.tolist() == [2, 3, 2, 2, 6, 8, 9]
    assert batch.response_mask.nonzero()[:, 0].tolist() == batch.response_rows.tolist()
    assert (batch.cu_seqlens.tolist(), batch.cu_seqlens.dtype) == ([0, 5, 6, 8, 11], torch.int32)
    assert (batch.lengths, batch.shared) == ([5, 1, 2, 3], [0, 3, 3, 0])
    assert batch.weights.tolist() == [1.0] * 5 + [2.0] + [3.0] * 2 + [1.0] * 3
    assert len(batch) == 4 and batch.num_response_tokens == 7


def test_switched_off_everything_lies_end_to_end():
    batch = TokenBatch.pack([example([7, 8, 9], [1]), example([7, 8, 9], [2])], shared_prefix=False)
    assert batch.input_ids.tolist() == [7, 8, 9, 1, 7, 8, 9, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3] * 2
    assert batch.predictor_rows.tolist() == [2, 6]
    assert batch.shared == [0, 0]


@pytest.mark.parametrize(("response", "shares"), [(7, True), (8, False)])
def test_a_prompt_is_shared_where_it_saves_enough(response, shares):
    """Two responses to a prompt of 6: 2 (6 + 7) / (6 + 14) is 1.3, 2 (6 + 8) / (6 + 16) is 1.27."""
    pair = [example(range(6), [9] * response)] * 2
    assert SHARING_GAIN == 1.3
    assert shared_runs(pair) == ([(2, 6)] if shares else [(1, 0), (1, 0)])


def test_no_response_token_is_shared():
    """Responses that begin alike, and conversations whose first turn both are trained on."""
    alike = [example([1, 2, 3, 4], [5, 6, 7]), example([1, 2, 3, 4], [5, 6, 8])]
    assert shared_runs(alike) == [(2, 4)]
    turns = [Example([*range(9), last], [False] * 5 + [True, True] + [False, False, True]) for last in (20, 21)]
    assert shared_runs(turns) == [(2, 5)]
    uneven = [Example(list(range(9)), [False] * k + [True] * (9 - k)) for k in (7, 6)]
    assert shared_runs(uneven) == [(2, 6)]
    assert shared_runs([Example([1, 2, 3], [True] * 3)] * 4) == [(1, 0)] * 4


def test_an_example_without_a_response_keeps_its_last_token():
    """So that a score can be read there: [1 2 3 | 4, 4 5 5, 4]."""
    batch = TokenBatch.pack([example([1, 2, 3, 4], r) for r in ([], [5, 5], [])])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 4, 5, 5, 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 3, 4, 5, 3]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8]
    assert (batch.response_rows.tolist(), batch.predictor_rows.tolist()) == ([5, 6], [4, 5])
    assert shared_runs([example([1], [])] * 3) == [(1, 0)] * 3  # one token each: nothing is left to share
    assert TokenBatch.pack([]).input_ids.tolist() == []


def test_a_system_prompt_does_not_keep_groups_apart_from_their_prompts():
    """All begin with 0 0; the leftover of one group comes first, then two whole groups."""
    groups = [[example([0, 0, *[g] * 8], [9, 9, i]) for i in range(n)] for g, n in ((1, 1), (2, 4), (3, 4))]
    assert shared_runs(list(itertools.chain(*groups))) == [(1, 0), (4, 10), (4, 10)]


def every_cut(count):
    """All ways to cut ``count`` neighbours into runs."""
    for ends in itertools.product([False, True], repeat=count - 1):
        bounds = [0, *(i + 1 for i, end in enumerate(ends) if end), count]
        yield list(itertools.pairwise(bounds))


def test_runs_leave_the_fewest_rows_of_all_cuts():
    """Against all 64 cuts of 7 neighbours whose prompts have prefixes in common, 60 times."""
    rng = random.Random(0)
    shared_somewhere = 0
    for _ in range(60):
        rows = [
            example([int(rng.random() < 0.2) for _ in range(rng.randint(2, 9))], [9] * rng.randint(0, 3))
            for _ in "1234567"
        ]
        fewest = sum(map(len, rows))
        for cut in every_cut(len(rows)):
            total = 0
            for a, b in cut:
                part = rows[a:b]
                limit = min(min(len(e) - 1, (e.response_mask + [True]).index(True)) for e in part)
                same = next((k for k in range(limit) if len({e.input_ids[k] for e in part}) > 1), limit)
                alone = sum(map(len, part))
                together = alone - (b - a - 1) * same
                total += together if alone >= SHARING_GAIN * together else alone
            fewest = min(fewest, total)
        assert packed_length(rows) == fewest == len(TokenBatch.pack(rows).input_ids)
        assert packed_length(rows, shared_prefix=False) == sum(map(len, rows))
        assert sum(count for count, _ in shared_runs(rows)) == 7
        shared_somewhere += fewest < sum(map(len, rows))
    assert shared_somewhere > 40


def test_every_row_is_the_token_that_its_example_has_there():
    """Random groups, pairs and rows of their own: ids, positions, masks and predictors, example by example."""
    rng = random.Random(1)
    for _ in range(50):
        rows = []
        for _ in range(4):
            prompt = [rng.randint(0, 9) for _ in range(rng.randint(1, 8))]
            rows += [
                example(prompt, [rng.randint(0, 9) for _ in range(rng.randint(0, 5))]) for _ in range(rng.randint(1, 4))
            ]
        batch = TokenBatch.pack(rows)
        predictor = dict(zip(batch.response_rows.tolist(), batch.predictor_rows.tolist()))
        for e, start, length, shared in zip(rows, batch.cu_seqlens.tolist(), batch.lengths, batch.shared):
            own = range(start, start + length)
            assert batch.input_ids[own].tolist() == e.input_ids[shared:]
            assert batch.position_ids[own].tolist() == list(range(shared, len(e)))
            assert batch.response_mask[own].tolist() == e.response_mask[shared:]
            assert not any(e.response_mask[:shared])
            for row, token in zip(own, range(shared, len(e))):
                if e.response_mask[token]:
                    assert batch.input_ids[predictor[row]] == e.input_ids[token - 1]
                    assert batch.position_ids[predictor[row]] == token - 1


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_entries_of_experiences_survive_the_way_to_the_rows_and_back(shared_prefix):
    rows = [example([1, 2, 3], [4] * n) for n in (2, 1, 3)]
    entries = [torch.tensor([0.0, 0.0, 0.0, *range(1, n + 1)]) for n in (2, 1, 3)]
    experiences = [Experience(e, 0.0, values=x) for e, x in zip(rows, entries)]
    batch = TokenBatch.pack(rows, shared_prefix=shared_prefix)
    flat = packed(experiences, "values", batch)
    assert flat[batch.response_rows].tolist() == [1, 2, 1, 1, 2, 3]
    assert flat.shape == batch.input_ids.shape
    unpack(experiences, "returns", flat, batch)
    assert all(torch.equal(e.returns, x) for e, x in zip(experiences, entries))
    assert packed(experiences, "old_logprobs", batch) is None
