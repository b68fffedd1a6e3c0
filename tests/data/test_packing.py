"""Bins hold everything once and never too much; the sampler's order survives a resume and any number of processes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.data.packing import IndexSampler, fullest, micro_batches, pack_bins


def test_best_fit_decreasing_by_hand():
    """8 opens a bin (2 left), 7 another (3 left); 3 fits only the second, 2 only the first, and 1 opens a third."""
    assert pack_bins([2, 8, 7, 3, 1], 10) == [[0, 1], [2, 3], [4]]


def test_micro_batches_come_largest_first_and_a_large_item_is_alone():
    """9 exceeds the 8 that fit; 5 + 3 fill them, 4 + 2 do not."""
    assert micro_batches([2, 5, 9, 3, 4], 8) == [[2], [1, 3], [0, 4]]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_micro_batches_hold_everything_once_and_never_too_much(sizes, max_tokens):
    groups = micro_batches(sizes, max_tokens)
    totals = [sum(sizes[i] for i in group) for group in groups]
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    assert totals == sorted(totals, reverse=True)
    assert all(total <= max_tokens or len(group) == 1 for total, group in zip(totals, groups))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=10), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_the_fullest_selection_is_the_best_of_all_subsets(sizes, max_tokens):
    chosen = fullest(sizes, max_tokens)
    assert len(set(chosen)) == len(chosen)
    totals = {sum(s for k, s in enumerate(sizes) if mask >> k & 1) for mask in range(1 << len(sizes))}
    best = max(t for t in totals if t <= max_tokens)
    assert sum(sizes[i] for i in chosen) == (max(sizes) if max(sizes) >= max_tokens else best)


def test_of_many_items_enough_are_considered():
    sizes = [1 + i % 300 for i in range(5000)]
    assert sum(sizes[i] for i in fullest(sizes, 1000)) == 1000
    assert [sizes[i] for i in fullest(sizes, 300)] == [300]


def test_the_tightest_bin_is_taken():
    """8 leaves 4 and 5 + 5 leave 2: the 2 fills the second bin. First fit would put it beside the 8."""
    assert pack_bins([8, 5, 5, 2], 12) == [[0], [1, 2, 3]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=60), st.none() | st.integers(0, 9))
def test_bins_hold_every_sequence_once_and_never_too_much(lengths, seed):
    bins = pack_bins(lengths, 40, seed)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 40 for b in bins)
    # two bins that are both at most half full would have been one
    assert sum(sum(lengths[i] for i in b) <= 20 for b in bins) <= 1
    assert bins == pack_bins(lengths, 40, seed)


def test_the_seed_orders_the_bins_only():
    lengths = list(range(1, 41))
    first, second = pack_bins(lengths, 40, 1), pack_bins(lengths, 40, 2)
    assert first != second and sorted(first) == sorted(second) == sorted(pack_bins(lengths, 40))


def test_a_sequence_that_fits_no_bin_is_an_error():
    with pytest.raises(ValueError, match="sequence 1 has 11 tokens, more than max_length 10"):
        pack_bins([3, 11], 10)


def test_every_epoch_is_another_permutation():
    sampler = IndexSampler(50, seed=0)
    epochs = [sampler.take(50) for _ in range(3)]
    assert all(sorted(e) == list(range(50)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and sampler.epoch == 3.0
    assert IndexSampler(50, seed=1).take(50) != epochs[0]
    assert IndexSampler(5, seed=1, shuffle=False).take(7) == [0, 1, 2, 3, 4, 0, 1]


def test_the_order_is_the_same_for_any_size_of_step_and_survives_a_resume():
    whole = IndexSampler(7, seed=3).take(30)
    sampler = IndexSampler(7, seed=3)
    parts = [sampler.take(4) for _ in range(4)]
    resumed = IndexSampler(7, seed=3)
    resumed.load_state(sampler.state())
    parts += [resumed.take(14)]
    assert [i for part in parts for i in part] == whole


def test_the_order_is_the_same_in_every_version():
    """A resumed run must read what the interrupted one would have read, so the order is pinned."""
    assert IndexSampler(8, seed=0).take(8) == [0, 2, 1, 4, 6, 7, 3, 5]


def test_the_state_of_another_data_set_is_refused():
    state = IndexSampler(7, seed=3).state()
    with pytest.raises(ValueError, match="n was 7, now 8"):
        IndexSampler(8, seed=3).load_state(state)
    with pytest.raises(ValueError, match="seed was 3, now 4"):
        IndexSampler(7, seed=4).load_state(state)
    with pytest.raises(ValueError, match="cannot sample from 0 rows"):
        IndexSampler(0, seed=0)
