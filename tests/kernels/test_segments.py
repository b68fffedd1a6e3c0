"""What every operation on packed tokens refuses, whoever computes it."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast.kernels import (
    BACKENDS,
    gae,
    kl_shaped_gae,
    policy_loss,
    segments,
    sequence_logprobs,
    use_backend,
    value_loss,
)

CALLS = {
    "policy_loss": lambda x, mask, **more: policy_loss(x, x, x, mask, **more),
    "value_loss": lambda x, mask, **more: value_loss(x, x, x, mask, **more),
    "gae": lambda x, mask, **more: gae(x, x, mask, **more),
    "sequence_logprobs": lambda x, mask, **more: sequence_logprobs(x, mask, **more),
    "kl_shaped_gae": lambda x, mask, **more: kl_shaped_gae(
        torch.zeros(len(more["cu_seqlens"]) - 1), x, x, x, mask, kl_coef=0.1, **more
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize(
    ("offsets", "entry"),
    [([1, 3], "0 is 1"), ([0, 2, 1, 3], "2 is 1"), ([0, -1, 3], "1 is -1"), ([0, 2], "1 is 2"), ([0, 9, 3], "1 is 9")],
)
def test_boundaries_that_do_not_rise_to_the_number_of_tokens_are_refused(backend, op, offsets, entry):
    x, mask = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    message = f"must rise from 0 to the number of tokens, 3; entry {entry}"
    with use_backend(f"{backend},reference"), pytest.raises(ValueError, match=message):
        CALLS[op](x, mask, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))


def test_on_a_gpu_boundaries_are_read_only_when_debugging(monkeypatch):
    """Reading them waits for the device. Tensors on "meta" stand for it: there is nothing to read."""
    read = []
    monkeypatch.setattr(segments, "check_boundaries", lambda cu_seqlens, count: read.append(count))
    mask, cu_seqlens = torch.ones(3, dtype=torch.bool, device="meta"), torch.zeros(2, device="meta")
    segments.check_tokens(mask, cu_seqlens)
    assert read == []
    monkeypatch.setenv("RLHF_FAST_DEBUG", "1")
    segments.check_tokens(mask, cu_seqlens)
    assert read == [3]
