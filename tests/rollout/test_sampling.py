"""Sampling, on numbers small enough to work out by hand and against transformers' own processors."""

from __future__ import annotations

import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf_fast.rollout import Request
from rlhf_fast.rollout.sampling import (
    Settings,
    invert_cdf,
    keep_top,
    random_stream,
    running_sums,
    sample,
    settings_row,
    spaced_seed,
)
from rlhf_fast.run.determinism import deterministic


def test_no_two_requests_share_a_stream_where_a_sample_adds_its_number_to_the_seed():
    """As in vLLM: request i's sample j draws with seed(i) + j. A thousand requests of 512 samples: half a million streams."""
    first = 42 * 1_000_003
    assert len({spaced_seed(first + i) + j for i in range(1000) for j in range(512)}) == 512_000
    assert all(0 <= spaced_seed(i) < 2**63 for i in (0, -1, first, 2**62))


def test_the_cdf_is_inverted_exactly_and_impossible_tokens_are_never_drawn():
    """Weights 0, 1, 0, 3, 0: a fourth of [0, 1) belongs to index 1, the rest to index 3."""
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]]).expand(5, -1)
    uniforms = torch.tensor([0.0, 0.2499999, 0.25, 0.999999, 1 - 2**-53], dtype=torch.float64)
    assert invert_cdf(weights, uniforms).tolist() == [1, 1, 3, 3, 3]


def test_deterministic_mode_draws_the_same_tokens_from_sums_without_rounding():
    """Of 5,000 tokens whose probabilities span 20 powers of ten; sums in any order, and an impossible token is never drawn."""
    torch.manual_seed(0)
    weights = (8 * torch.randn(50, 5000)).softmax(-1)
    weights[:, ::3] = 0.0
    uniforms = torch.rand(50, dtype=torch.float64)
    want = invert_cdf(weights, uniforms)
    kept = keep_top(weights, torch.full((50,), 40), torch.full((50,), 0.9))
    with deterministic():
        assert torch.equal(invert_cdf(weights, uniforms), want)
        assert all(
            torch.equal(a, b) for a, b in zip(keep_top(weights, torch.full((50,), 40), torch.full((50,), 0.9)), kept)
        )
        sums = running_sums(weights)
        last = running_sums(weights.flip(-1))[:, -1]
        edges = invert_cdf(
            weights, (sums[:, 2999] / sums[:, -1]).clamp(max=1 - 2**-53)
        )  # where token 3000, impossible, begins
    assert torch.equal(sums[:, -1], last)
    assert not (edges % 3 == 0).any()
    torch.testing.assert_close(sums, weights.cumsum(-1, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_token_too_unlikely_for_float32_sums_is_still_drawn():
    """One token holds all but 1e-8 of the probability: float32 sums would not see the other."""
    weights = torch.tensor([[1.0, 1e-8]])
    assert invert_cdf(weights, torch.tensor([1 - 0.5e-8], dtype=torch.float64)).item() == 1


def test_top_k_then_top_p_by_hand():
    """0.4 0.3 0.2 0.1, shuffled. Top 3 renormalise to 4/9 3/9 2/9; p = 0.5 needs the first two, p = 0.4 the first."""
    weights = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).expand(4, -1)
    kept, order = keep_top(weights, torch.tensor([3, 3, 0, 2]), torch.tensor([0.5, 0.4, 0.95, 1.0]))
    assert order[0].tolist() == [1, 3, 2, 0]
    torch.testing.assert_close(
        kept, torch.tensor([[0.4, 0.3, 0, 0], [0.4, 0, 0, 0], [0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0, 0]])
    )


def test_filters_and_penalty_are_those_of_transformers_in_their_order():
    """4,000 draws of one row with everything on: exactly the tokens that transformers keeps, with its probabilities."""
    torch.manual_seed(0)
    request = Request([3], temperature=0.7, top_k=9, top_p=0.85, min_p=0.05, repetition_penalty=1.4)
    logits, seen = torch.randn(1, 30) * 2, torch.tensor([[1, 4, 4, 20, 7]])
    scores = logits.double()
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.4),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(9),
        TopPLogitsWarper(0.85),
        MinPLogitsWarper(0.05),
    ):
        scores = processor(seen, scores)
    expected = scores.softmax(-1)[0]
    marks = torch.zeros(1, 30, dtype=torch.bool)
    marks[0, seen[0]] = True
    count = 4000
    settings = Settings.of([request], torch.tensor([settings_row(request)]).expand(count, -1))
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = sample(logits.expand(count, -1), settings, uniforms, marks.expand(count, -1))
    shares = torch.bincount(drawn.token, minlength=30) / count
    assert ((shares - expected).abs() <= 1 / count + 1e-9).all()  # evenly spaced numbers: to the last draw
    torch.testing.assert_close(drawn.filtered_logprob, expected[drawn.token].log(), atol=1e-6, rtol=0)
    plain = (logits / 0.7).log_softmax(-1)[0, drawn.token]
    torch.testing.assert_close(drawn.logprob, plain)


def test_min_p_by_hand():
    """0.4 0.3 0.2 0.1: half as likely as the likeliest are 0.4, 0.3 and, just, 0.2."""
    weights = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    zero, one = torch.zeros(1), torch.ones(1)
    kept, _ = keep_top(weights, zero, one, torch.tensor([0.5]))
    torch.testing.assert_close(kept, torch.tensor([[0.4, 0.3, 0.2, 0.0]]))


def test_a_stream_goes_on_where_it_stopped():
    whole, parts = random_stream(5, 2).random(20), random_stream(5, 2)
    assert [*parts.random(7), *parts.random(13)] == list(whole)
    assert list(random_stream(5, 3).random(20)) != list(whole)
