"""Estimators of the KL divergence against their formulas and, on average, against the divergence itself."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast.kernels import kl_penalty

FAMILY = "kl"
pytestmark = pytest.mark.usefixtures("everywhere")

ESTIMATORS = ["k1", "k2", "k3", "k3+", "abs"]


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        ("k1", -0.5, 1.0),
        ("k2", 0.125, -0.5),
        ("k3", math.exp(0.5) - 1.5, 1 - math.exp(0.5)),
        ("k3+", math.exp(0.5) - 1.5, -0.5),
        ("abs", 0.5, -1.0),
    ],
)
def test_kl_by_hand(estimator, value, gradient):
    """logprob -2, reference -1.5: d = 1/2. d k2 / d logprob = -d, d k3 / d logprob = 1 - e^d; k3+ takes k2's."""
    logprob = torch.tensor(-2.0, requires_grad=True)
    kl = kl_penalty(logprob, torch.tensor(-1.5), estimator)
    kl.backward()
    assert kl.item() == pytest.approx(value)
    assert logprob.grad.item() == pytest.approx(gradient)


@pytest.mark.parametrize("estimator", ["k1", "k3", "k3+"])
def test_estimators_average_to_the_divergence(estimator):
    """The expectation under the policy, summed exactly over 5 words, is KL(policy || reference)."""
    log_p, log_q = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    exact = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close((log_p.exp() * kl_penalty(log_p, log_q, estimator)).sum(), exact)


def test_the_gradient_of_k3_plus_averages_to_that_of_the_divergence():
    """Sampled from the policy, k2's gradient is unbiased; k3's is not."""
    generator = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    logits, log_q = logits.requires_grad_(), ref.log_softmax(-1)
    log_p = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits, retain_graph=True)

    def average(estimator):
        weighted = (log_p.exp().detach() * kl_penalty(log_p, log_q, estimator)).sum()
        return torch.autograd.grad(weighted, logits, retain_graph=True)[0]

    torch.testing.assert_close(average("k3+"), exact)
    assert (average("k3") - exact).abs().max() > 0.01


def test_k3_of_nearly_equal_policies_keeps_its_digits():
    """d = 1e-3: k3 = 5.0e-7, which exp(d) - 1 - d in float32 would miss by 10%."""
    kl = kl_penalty(torch.tensor(0.0), torch.tensor(1e-3), "k3")
    assert kl.item() == pytest.approx(math.expm1(1e-3) - 1e-3, rel=2e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_takes_any_float_and_broadcasts(estimator):
    """bf16 is computed in float32, float64 stays; (2, 1) against (3,) gives (2, 3)."""
    logprobs, ref = torch.tensor([[-1.0], [-2.0]]), torch.tensor([-1.5, -1.0, -0.5])
    kl = kl_penalty(logprobs.bfloat16(), ref, estimator)
    exact = kl_penalty(logprobs.double().expand(2, 3), ref.double().expand(2, 3), estimator)
    assert kl.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=1e-6)
    assert kl_penalty(torch.zeros(0), torch.zeros(0), estimator).shape == (0,)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_gradcheck(estimator):
    inputs = torch.randn(2, 4, dtype=torch.float64).unbind()
    assert torch.autograd.gradcheck(lambda a, b: kl_penalty(a, b, estimator), [x.requires_grad_() for x in inputs])


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'; known: k1, k2"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k4")
