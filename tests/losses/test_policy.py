"""The GRPO family's table: gates and the unbiased KL beside what they stand for; what a loss does not read is refused."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast.kernels import BACKENDS, available, use_backend
from rlhf_fast.losses.policy import (
    LOSS_TYPES,
    Options,
    check,
    group_policy_loss,
    sapo_gate,
    unbiased_kl,
    vespo_gate,
)

# two responses: three tokens of which the second is masked (and unreadable), and two
LOG_RATIOS = [0.3, math.nan, -0.7, 0.2, 0.1]
MASK = torch.tensor([True, False, True, True, True])
ENDS = torch.tensor([0, 3, 5], dtype=torch.int32)


def gate(function, log_ratios, advantages, options=None, mask=MASK, ends=ENDS):
    numbers = (torch.tensor(x, dtype=torch.float64) for x in (log_ratios, advantages))
    return function(*numbers, mask, ends, options or Options())[mask].tolist()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sapo_s_gate_makes_the_gradient_of_its_loss(level):
    """-4/tau sigmoid(tau (ratio - 1)) A, differentiated by autograd, over -A times the gradient of log pi."""
    options = Options(sapo_temperature_pos=2.0, sapo_temperature_neg=5.0, importance_sampling_level=level)
    got = gate(sapo_gate, LOG_RATIOS, [1.5] * 3 + [-0.5] * 2, options)
    want = []
    for tokens, advantage, tau in (([0.3, -0.7], 1.5, 2.0), ([0.2, 0.1], -0.5, 5.0)):
        x = torch.tensor(tokens, dtype=torch.float64, requires_grad=True)
        at_level = x if level == "token" else x.mean().expand(2)
        loss = -4 / tau * torch.sigmoid(tau * (at_level.exp() - 1)) * advantage
        want += (torch.autograd.grad(loss.sum(), x)[0] / -advantage).tolist()
    assert got == pytest.approx(want, rel=1e-6)


def test_vespo_s_gate_is_one_number_a_response():
    """Of W = exp(-0.4) where the advantage is 0 or more, and exp(0.3) where it is less."""
    options = Options(vespo_k_pos=1.5, vespo_lambda_pos=0.5, vespo_k_neg=3.0, vespo_lambda_neg=2.0)
    first, second = math.exp(-0.4), math.exp(0.3)
    want = [first**1.5 * math.exp(0.5 * (1 - first))] * 2 + [second**3 * math.exp(2 * (1 - second))] * 2
    assert gate(vespo_gate, LOG_RATIOS, [0.0] * 3 + [-1.0] * 2, options) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("function", [sapo_gate, vespo_gate], ids=["sapo", "vespo"])
def test_gates_are_1_where_the_policy_has_not_moved_and_finite_wherever_it_went(function):
    assert gate(function, [0.0] * 5, [1.0] * 3 + [-1.0] * 2) == [1.0] * 4
    for far in (-300.0, 300.0):
        gates = gate(function, [far] * 5, [1.0] * 3 + [-1.0] * 2)
        assert max(gates) < 1e-6 and min(gates) >= 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ["sapo", "vespo"])
def test_a_gated_loss_is_its_paper_s_on_every_backend(loss_type, backend):
    """Loss, gradient and KL beside a loop in plain floats: gates, REINFORCE, means over responses (SAPO) or tokens (VESPO)."""
    device = "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
    if reason := available("policy", backend, "policy_loss", torch.zeros(1, device=device)):
        pytest.skip(f"{backend}: {reason}")
    o = Options()
    new, old, reference = [-1.0, math.nan, -2.0, -0.5, -1.5], [-1.3, -1.0, -1.3, -0.7, -1.6], [-1.2] * 5
    advantages, responses = [1.5] * 3 + [-0.5] * 2, [[0, 2], [3, 4]]
    loss, kl, slopes, mean_kl = 0.0, 0.0, [0.0] * 5, 0.0
    for response in responses:
        w_all = math.exp(sum(new[t] - old[t] for t in response))
        for t in response:
            ratio, a = math.exp(new[t] - old[t]), advantages[t]
            tau = o.sapo_temperature_pos if a > 0 else o.sapo_temperature_neg
            k, decay = (o.vespo_k_pos, o.vespo_lambda_pos) if a >= 0 else (o.vespo_k_neg, o.vespo_lambda_neg)
            p = 1 / (1 + math.exp(-tau * (ratio - 1)))
            gate = 4 * p * (1 - p) * ratio if loss_type == "sapo" else w_all**k * math.exp(decay * (1 - w_all))
            share = 1 / (2 * len(response)) if loss_type == "sapo" else 1 / 4
            d = reference[t] - new[t]
            loss += -gate * a * new[t] * share
            kl += 0.3 * (math.exp(d) - d - 1) * share
            mean_kl += (math.exp(d) - d - 1) / 4
            slopes[t] = (-gate * a + 0.3 * (1 - math.exp(d))) * share
    numbers = [torch.tensor(x, device=device) for x in (new, old, advantages)]
    numbers[0].requires_grad_()
    with use_backend(backend):
        got, metrics = group_policy_loss(
            *(loss_type, *numbers, MASK.to(device), o),
            ref_logprobs=torch.tensor(reference, device=device),
            beta=0.3,
            unbiased=False,
            denominator=2.0 if loss_type == "sapo" else 4.0,
            cu_seqlens=ENDS.to(device),
        )
        got.backward()
    assert float(got.detach()) == pytest.approx(loss + kl, rel=1e-5)
    assert float(metrics["kl"]) == pytest.approx(mean_kl, rel=1e-5)
    assert numbers[0].grad.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-7)


def test_the_unbiased_kl_has_the_kl_s_gradient_under_any_policy_that_sampled():
    """One token of three words, all that can be sampled weighed by how likely that is: exact, nothing is drawn.

    Of k3 alone the gradient is another one.
    """
    theta = torch.tensor([0.2, -0.5, 0.9], dtype=torch.float64, requires_grad=True)
    reference, sampler = (torch.tensor(x, dtype=torch.float64).log() for x in ([0.8, 0.15, 0.05], [0.1, 0.6, 0.3]))
    policy = theta.log_softmax(0)
    (want,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), theta)
    everything = {"how": "token", "denominator": 1.0, "cu_seqlens": torch.tensor([0, 1], dtype=torch.int32)}
    expected = torch.zeros((), dtype=torch.float64)
    for word in range(3):
        one, policy = slice(word, word + 1), theta.log_softmax(0)
        kl, mean = unbiased_kl(policy[one], sampler[one], reference[one], torch.tensor([True]), **everything)
        assert float(mean) == pytest.approx(float(kl.detach()))
        expected = expected + sampler[word].exp() * kl
    torch.testing.assert_close(torch.autograd.grad(expected, theta)[0], want)
    policy = theta.log_softmax(0)
    d = reference - policy
    (biased,) = torch.autograd.grad((policy.detach().exp() * (d.exp() - d - 1)).sum(), theta)
    assert not torch.allclose(biased, want, atol=0.05)


def test_the_unbiased_kl_reads_no_masked_token():
    old, reference = (torch.tensor(x, dtype=torch.float64) for x in ([-1.0, math.nan, -2.0, -1.0, -1.5], [-1.2] * 5))
    new = old.clone().requires_grad_()
    kl, mean = unbiased_kl(
        new, old, reference, MASK, how="sequence", denominator=2.0, cu_seqlens=ENDS, level="sequence"
    )
    k3 = [math.exp(-1.2 - x) - (-1.2 - x) - 1 for x in (-1.0, -2.0, -1.0, -1.5)]
    assert float(kl.detach()) == pytest.approx((sum(k3[:2]) / 2 + sum(k3[2:]) / 2) / 2)
    assert float(mean) == pytest.approx(sum(k3) / 4)
    (grad,) = torch.autograd.grad(kl, new)
    assert float(grad[1]) == 0.0 and bool(grad[MASK].isfinite().all())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("option", Options._fields)
def test_an_option_that_a_loss_does_not_read_is_refused(loss_type, option):
    """And one that it reads is not."""
    other = {"importance_sampling_level": "sequence"}.get(option, 1.5)
    given = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    options = Options(**{**given, option: other})
    if option in LOSS_TYPES[loss_type].options:
        check(loss_type, options)
    else:
        with pytest.raises(
            ValueError, match=f"{option} is {other} and has no effect with loss_type {loss_type}; it be"
        ):
            check(loss_type, options)


@pytest.mark.parametrize(
    ("loss_type", "options", "message"),
    [
        ("cispo", {}, "loss_type cispo needs epsilon_high"),
        ("dapo", {"delta": 0.9}, "delta is 0.9; it bounds"),
        ("sapo", {"sapo_temperature_neg": 0.0}, "sapo_temperature_neg is 0.0; it must be above 0"),
        ("vespo", {"vespo_k_pos": -1.0}, "vespo_k_pos is -1.0; it must be above 0"),
        ("sapo", {"importance_sampling_level": "sequence_token"}, "sequence_token is not defined for loss_type sapo"),
    ],
)
def test_options_out_of_range_are_refused(loss_type, options, message):
    with pytest.raises(ValueError, match=message):
        check(loss_type, Options(**options))
