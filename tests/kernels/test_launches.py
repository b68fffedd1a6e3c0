"""What a backward pass puts on the device: its own kernel, and nothing that autograd adds.

Autograd hands zeros to a Function for every output without a gradient, the metrics among them, unless told not to: two
launches each. A profile of the CPU shows them as aten::zeros and aten::zero_, on any backend.
"""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rlhf_fast.kernels import (
    BACKENDS,
    available,
    dpo_loss,
    kl_penalty,
    linear_logprobs,
    pairwise_reward_loss,
    policy_loss,
    sequence_logprobs,
    token_logprobs,
    use_backend,
    value_loss,
)

FAMILIES = {
    "token_logprobs": "logprobs",
    "sequence_logprobs": "logprobs",
    "linear_logprobs": "linear_logprobs",
    "policy_loss": "policy",
    "value_loss": "policy",
    "dpo_loss": "preference",
    "pairwise_reward_loss": "reward",
    "kl_penalty": "kl",
}
PAIRS = ("dpo_loss", "pairwise_reward_loss")
KERNELS = {"token_logprobs": "token_logprobs_forward", "linear_logprobs": "head_rows"}


def loss_of(op: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The op on ``x`` (4, 6), and of pairs on ``y`` too; everything else is a constant."""
    other, mask = x.detach() - 0.1, torch.ones(x.shape, dtype=torch.bool, device=x.device)
    labels = torch.tensor([0, 1, 2, 3], device=x.device)
    return {
        "token_logprobs": lambda: token_logprobs(x, labels),
        "sequence_logprobs": lambda: sequence_logprobs(x, mask),
        "linear_logprobs": lambda: linear_logprobs(x, other, labels),
        "policy_loss": lambda: policy_loss(x, other, other[:, 0], mask, ref_logprobs=other, kl_coef=0.1)[0],
        "value_loss": lambda: value_loss(x, other, other, mask)[0],
        "dpo_loss": lambda: dpo_loss(x, y, other, other)[0],
        "pairwise_reward_loss": lambda: pairwise_reward_loss(x, y),
        "kl_penalty": lambda: kl_penalty(x, other),
    }[op]()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("op", FAMILIES)
def test_a_backward_pass_makes_no_zeros(op, backend):
    device = "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 6, generator=generator).to(device).requires_grad_() for _ in range(2))
    if reason := available(FAMILIES[op], backend, KERNELS.get(op, op), x):
        pytest.skip(f"{backend}: {reason}")
    with use_backend(backend):
        loss = loss_of(op, x, y)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            torch.autograd.grad(loss, [x, y] if op in PAIRS else x, torch.ones_like(loss))
    names = {event.name for event in profiler.events()}
    assert names
    assert names.isdisjoint({"aten::zeros", "aten::zero_", "aten::zeros_like", "aten::new_zeros"}), sorted(names)
