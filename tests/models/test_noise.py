"""NEFTune's noise: how large it is for each token, and that it is gone afterwards."""

from __future__ import annotations

import torch
from torch import nn

from rlhf_fast.data.batch import Example, TokenBatch
from rlhf_fast.models.noise import embedding_noise

D = 4096  # wide, so that the largest of many draws lies just below the bound


def example(ids: list[int]) -> Example:
    return Example(ids, [False] * (len(ids) - 1) + [True])


def test_each_token_has_the_noise_of_its_examples_length_packed_or_not():
    """Uniform within 5 / sqrt(L * D): the largest of L * D draws within 1% of it, the mean size half of it."""
    torch.manual_seed(0)
    embeddings = nn.Embedding(50, D)
    examples = [example(list(range(n))) for n in (4, 25)]
    batch = TokenBatch.pack(examples, shared_prefix=False)
    with torch.no_grad(), embedding_noise(embeddings, batch, 5.0):
        noise = embeddings(batch.input_ids[None])[0] - embeddings.weight[batch.input_ids]
    for part, length in zip(noise.split([4, 25]), (4, 25)):
        bound = 5.0 / (length * D) ** 0.5
        assert 0.99 * bound < float(part.abs().max()) <= bound * (1 + 1e-3)
        torch.testing.assert_close(part.abs().mean(), torch.tensor(bound / 2), rtol=0.03, atol=0)
        assert abs(float(part.mean())) < 0.02 * bound
    assert torch.equal(embeddings(batch.input_ids), embeddings.weight[batch.input_ids])


def test_a_shared_prompt_counts_to_the_length_of_every_response():
    """Two responses of 2 tokens behind one prompt of 20: 22 tokens each, whatever part of them lies in the rows."""
    examples = [Example([*range(20), r, r], [False] * 20 + [True] * 2) for r in (30, 31)]
    batch = TokenBatch.pack(examples)
    assert batch.shared == [0, 20]
    embeddings = nn.Embedding(50, D)
    with torch.no_grad(), embedding_noise(embeddings, batch, 5.0):
        noise = embeddings(batch.input_ids[None])[0] - embeddings.weight[batch.input_ids]
    assert 0.98 < float(noise[-2:].abs().max()) / (5.0 / (22 * D) ** 0.5) < 1.01
