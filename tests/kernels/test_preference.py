"""DPO and its relatives, by hand and in the scalar formulas of their papers."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast.kernels import dpo_loss
from rlhf_fast.kernels.preference import KINDS

FAMILY = "preference"
pytestmark = pytest.mark.usefixtures("everywhere")


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# log-ratios w of the chosen and l of the rejected response, written again from the papers with plain floats
FORMULAS = {
    "sigmoid": lambda w, l, b, e: -(1 - e) * log_sigmoid(b * (w - l)) - e * log_sigmoid(-b * (w - l)),
    "robust": lambda w, l, b, e: (-(1 - e) * log_sigmoid(b * (w - l)) + e * log_sigmoid(-b * (w - l))) / (1 - 2 * e),
    "ipo": lambda w, l, b, e: (w - l - 1 / (2 * b)) ** 2,
    "hinge": lambda w, l, b, e: max(0.0, 1 - b * (w - l)),
    "exo_pair": lambda w, l, b, e: (
        sigmoid(b * (w - l)) * math.log(sigmoid(b * (w - l)) / (1 - e))
        + sigmoid(b * (l - w)) * math.log(sigmoid(b * (l - w)) / e)
    ),
    "nca_pair": lambda w, l, b, e: -log_sigmoid(b * w) - 0.5 * log_sigmoid(-b * w) - 0.5 * log_sigmoid(-b * l),
    "sppo_hard": lambda w, l, b, e: (w - 1 / (2 * b)) ** 2 + (l + 1 / (2 * b)) ** 2,
    "apo_zero": lambda w, l, b, e: 1 - sigmoid(b * w) + sigmoid(b * l),
    "apo_down": lambda w, l, b, e: sigmoid(b * w) + 1 - sigmoid(b * (w - l)),
}
SMOOTHED = ("sigmoid", "robust", "exo_pair")


def test_every_kind_has_a_formula_here():
    assert set(FORMULAS) == set(KINDS)


def test_dpo_by_hand():
    """Log-ratios 2 and -1 at beta 1/2: margin 3/2, loss log(1 + e^-1.5), rewards 1 and -1/2."""
    loss, chosen, rejected = dpo_loss(*(torch.tensor([x]) for x in (-3.0, -6.0, -5.0, -5.0)), beta=0.5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.5)))
    assert (chosen.item(), rejected.item()) == (1.0, -0.5)


@pytest.mark.parametrize("kind", ["sigmoid", "robust"])
def test_the_first_step_costs_ln_2(kind):
    """Policy and reference agree exactly, so the margin is exactly 0."""
    x = torch.tensor([-12.3, -45.6])
    loss, chosen, rejected = dpo_loss(x, x - 1, x, x - 1, kind=kind)
    assert torch.equal(loss, torch.full((2,), 2.0).log())
    assert (chosen == 0).all() and (rejected == 0).all()


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_kind_matches_its_formula(kind, smoothing):
    if smoothing and kind not in SMOOTHED or not smoothing and kind == "exo_pair":
        pytest.skip("the smoothing does not apply")
    inputs = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    loss, chosen, rejected = dpo_loss(*inputs, beta=0.3, kind=kind, label_smoothing=smoothing)
    w, l = (inputs[0] - inputs[2]), (inputs[1] - inputs[3])
    expected = [FORMULAS[kind](a, b, 0.3, smoothing) for a, b in zip(w.tolist(), l.tolist())]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(chosen, 0.3 * w)
    torch.testing.assert_close(rejected, 0.3 * l)


@pytest.mark.parametrize("kind", FORMULAS)
def test_gradcheck(kind):
    inputs = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    smoothing = 0.1 if kind in SMOOTHED else 0.0
    assert torch.autograd.gradcheck(
        lambda *x: dpo_loss(*x, beta=0.3, kind=kind, label_smoothing=smoothing)[0], [x.requires_grad_() for x in inputs]
    )


@pytest.mark.parametrize("kind", ["sigmoid", "nca_pair", "robust", "exo_pair", "apo_zero", "apo_down"])
@pytest.mark.parametrize("gap", [-4000.0, 4000.0])
def test_hopeless_and_perfect_pairs_stay_finite(kind, gap):
    """Summed log-probabilities of long responses differ by thousands; exp of that is no float32."""
    chosen = torch.tensor([gap], requires_grad=True)
    smoothing = 0.1 if kind in SMOOTHED else 0.0
    zero = torch.zeros(1)
    loss, _, _ = dpo_loss(chosen, zero, zero, zero, beta=1.0, kind=kind, label_smoothing=smoothing)
    loss.backward()
    assert loss.isfinite().all() and chosen.grad.isfinite().all()


def test_dpo_takes_16_bit_and_empty_batches_and_detaches_rewards():
    x = torch.tensor([-3.0, -4.0]).bfloat16().requires_grad_()
    loss, chosen, _ = dpo_loss(x, x - 1, x * 2, x)
    assert loss.dtype == torch.float32 and loss.requires_grad and not chosen.requires_grad
    assert dpo_loss(*torch.zeros(4, 0))[0].shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dpo"}, "unknown kind 'dpo'; known: sigmoid, ipo"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"label_smoothing": 0.5}, "label_smoothing must be"),
        ({"label_smoothing": 0.1, "kind": "ipo"}, "no effect with kind='ipo'"),
        ({"kind": "exo_pair"}, "needs label_smoothing > 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(*torch.zeros(4, 2), **options)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="share one shape"):
        dpo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(3))
