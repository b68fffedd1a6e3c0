"""The DPO family's table: every row by hand, in plain floats, and what does not go together."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast.losses.preference import (
    DIVERGENCES,
    PAIRED,
    UNPAIRED,
    Coefficients,
    Pairs,
    check,
    length_discount,
    on_policy_weights,
)

# log-probabilities, reference's, lengths; uneven so that sums differ from means and orders from one another
CHOSEN, REJECTED = [-6.0, -9.0, -2.5, -30.0], [-7.0, -4.0, -2.0, -50.0]
REF_CHOSEN, REF_REJECTED = [-7.5, -8.0, -2.0, -33.0], [-6.5, -5.0, -3.5, -45.0]
N_CHOSEN, N_REJECTED = [2, 5, 3, 10], [4, 2, 1, 20]
SHIFT = 0.13


def pairs(dtype=torch.float64, **changed) -> Pairs:
    values = dict(
        zip(Pairs._fields, (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, N_CHOSEN, N_REJECTED, [1.0, 2.0, 0.5, 3.0]))
    )
    values = {name: torch.tensor(x, dtype=dtype) for name, x in values.items()} | changed
    return Pairs(**values, shift=SHIFT)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def smoothed(x, e):
    return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)


def log_odds(x):
    return math.log(math.exp(x) / (1 - math.exp(x)))


W = [a - b for a, b in zip(CHOSEN, REF_CHOSEN)]
L = [a - b for a, b in zip(REJECTED, REF_REJECTED)]
NLL = [1.0, 2.0, 0.5, 3.0]
B, E, TAU, GAMMA, ALPHA = 0.3, 0.1, 0.4, 0.7, 0.6


def each(formula):
    """The formula of w, l and their lengths, for each pair."""
    return [formula(*row) for row in zip(W, L, N_CHOSEN, N_REJECTED)]


def sort_apart(a, b):
    return [x - y for x, y in zip(sorted(a), sorted(b))]


MARGINS = ([c - r for c, r in zip(CHOSEN, REJECTED)], [c - r for c, r in zip(REF_CHOSEN, REF_REJECTED)])
MEANS = list(zip((c / n for c, n in zip(CHOSEN, N_CHOSEN)), (r / n for r, n in zip(REJECTED, N_REJECTED))))
# written from the papers, with plain floats; label_smoothing E where a row takes it
EXPECTED = {
    "sigmoid": each(lambda w, l, m, n: smoothed(B * (w - l), E)),
    "ipo": each(lambda w, l, m, n: (w / m - l / n - 1 / (2 * B)) ** 2),
    "hinge": each(lambda w, l, m, n: max(0.0, 1 - B * (w - l))),
    "robust": each(
        lambda w, l, m, n: (-(1 - E) * log_sigmoid(B * (w - l)) + E * log_sigmoid(B * (l - w))) / (1 - 2 * E)
    ),
    "exo_pair": each(
        lambda w, l, m, n: (
            sigmoid(B * (w - l)) * math.log(sigmoid(B * (w - l)) / (1 - E))
            + sigmoid(B * (l - w)) * math.log(sigmoid(B * (l - w)) / E)
        )
    ),
    "nca_pair": each(lambda w, l, m, n: -log_sigmoid(B * w) - (log_sigmoid(-B * w) + log_sigmoid(-B * l)) / 2),
    "sppo_hard": each(lambda w, l, m, n: (w - 1 / (2 * B)) ** 2 + (l + 1 / (2 * B)) ** 2),
    "apo_zero": each(lambda w, l, m, n: 1 - sigmoid(B * w) + sigmoid(B * l)),
    "apo_down": each(lambda w, l, m, n: sigmoid(B * w) + 1 - sigmoid(B * (w - l))),
    "bco_pair": each(lambda w, l, m, n: -log_sigmoid(B * w) - log_sigmoid(-B * l)),
    "bco": each(lambda w, l, m, n: -log_sigmoid(B * w - SHIFT) - log_sigmoid(-(B * l - SHIFT))),
    "sigmoid_norm": each(lambda w, l, m, n: smoothed(B * (w / m - l / n), E)),
    "discopop": each(
        lambda w, l, m, n: (
            -log_sigmoid(B * (w - l)) * (1 - sigmoid(B * (w - l) / TAU))
            + math.exp(-B * (w - l)) * sigmoid(B * (w - l) / TAU)
        )
    ),
    "aot": [smoothed(B * d, E) for d in sort_apart(*MARGINS)],
    "aot_unpaired": [smoothed(B * d, E) for d in sort_apart(W, L)],
    "sft": NLL,
    "orpo": [nll - B * log_sigmoid(log_odds(w) - log_odds(l)) for nll, (w, l) in zip(NLL, MEANS)],
    "simpo": [smoothed(B * (w - l) - GAMMA, E) for w, l in MEANS],
    "cpo": [smoothed(B * (c - r), E) + ALPHA * nll for c, r, nll in zip(CHOSEN, REJECTED, NLL)],
}


def coefficients(name: str, **more) -> Coefficients:
    """Every option that the row reads away from its default, the divergence excepted."""
    options = {"label_smoothing": E, "discopop_tau": TAU, "simpo_gamma": GAMMA, "cpo_alpha": ALPHA}
    return Coefficients(beta=B, **{k: v for k, v in options.items() if k in PAIRED[name].options}, **more)


def test_every_row_has_numbers_here():
    assert set(EXPECTED) == set(PAIRED)


def test_three_losses_by_hand():
    """w = 3/2, l = -1/2, beta 1: DPO log(1 + e^-2); 2 and 4 tokens: normalised log(1 + e^-(3/4 + 1/8)); BCO with shift 1/2
    log(1 + e^-1) + log(1 + e^-1)."""
    one = Pairs(*(torch.tensor([x]) for x in (-6.0, -7.0, -7.5, -6.5, 2.0, 4.0, 0.0)), shift=0.5)
    want = {"sigmoid": math.log1p(math.exp(-2)), "sigmoid_norm": math.log1p(math.exp(-0.875))}
    want["bco"] = 2 * math.log1p(math.exp(-1))
    for name, loss in want.items():
        assert PAIRED[name].formula(one, Coefficients(beta=1.0)).item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("name", PAIRED)
def test_every_row_is_its_papers_formula(name):
    got = PAIRED[name].formula(pairs(), coefficients(name))
    torch.testing.assert_close(got, torch.tensor(EXPECTED[name], dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PAIRED)
def test_gradients_are_those_of_the_formula(name):
    inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (CHOSEN, REJECTED)]
    assert torch.autograd.gradcheck(
        lambda c, r: PAIRED[name].formula(pairs(chosen=c, rejected=r), coefficients(name)), inputs
    )


RATIOS = {  # f'(e^x) of the divergence f, up to constants that cancel between chosen and rejected
    "reverse_kl": lambda x: x,
    "forward_kl": lambda x: -1 / math.exp(x),
    "js_divergence": lambda x: math.log(2 * math.exp(x) / (math.exp(x) + 1)),
    "alpha_divergence": lambda x: math.exp(x * (0.7 - 1)) / (0.7 - 1),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_divergence_takes_the_place_of_the_log_ratio(divergence):
    f = RATIOS[divergence]
    alpha = {"f_alpha_divergence_coef": 0.7} if divergence == "alpha_divergence" else {}
    c = Coefficients(beta=B, f_divergence_type=divergence, **alpha)
    got = PAIRED["sigmoid"].formula(pairs(), c)
    want = [-log_sigmoid(B * (f(w) - f(l))) for w, l in zip(W, L)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_the_alpha_divergence_ends_in_the_reverse_kl():
    near = Coefficients(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 + 1e-5)
    at = Coefficients(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0)
    torch.testing.assert_close(pairs().scores(at)[0], torch.tensor(W, dtype=torch.float64))
    torch.testing.assert_close(pairs().scores(near)[0], torch.tensor(W, dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("gap", [-3000.0, 3000.0])
def test_hopeless_and_perfect_pairs_stay_finite(name, gap):
    """Sums of long responses differ by thousands, which is where e^-x overflows a float32."""
    chosen = torch.tensor([min(gap, 0.0)], requires_grad=True)
    rest = (torch.tensor([x]) for x in (min(-gap, 0.0), 0.0, 0.0, 100.0, 100.0, 1.0))
    loss = PAIRED[name].formula(Pairs(chosen, *rest), coefficients(name))
    if name != "sft":
        loss.sum().backward()
        assert chosen.grad.isfinite().all()
    assert loss.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("ratio", [-3000.0, -95.0, 3000.0])
def test_divergences_of_hopeless_responses_stay_finite(divergence, ratio):
    """500 tokens at -0.19 nats each are enough for e^95. Both responses of a pair may be that unlikely."""
    x = torch.tensor([ratio], requires_grad=True)
    at = Coefficients(f_divergence_type=divergence, f_alpha_divergence_coef=0.5)
    scores = DIVERGENCES[divergence](x, at)
    loss = (scores - scores.detach()).square() + torch.nn.functional.softplus(-scores)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert scores.square().isfinite().all()
    assert gradient.isfinite().all()


def test_kto_by_hand():
    """Ratios 2 and -1 against a KL of 1/2, beta 1: good 1 - s(3/2) and 1 - s(-3/2), bad 1 - s(-3/2) and 1 - s(3/2)."""
    ratios = torch.tensor([2.0, -1.0, 2.0, -1.0], dtype=torch.float64)
    good = torch.tensor([True, True, False, False])
    got = UNPAIRED["kto"].formula(ratios, good, 0.5, 1.0)
    assert got.tolist() == pytest.approx([1 - sigmoid(1.5), 1 - sigmoid(-1.5), 1 - sigmoid(-1.5), 1 - sigmoid(1.5)])
    got = UNPAIRED["apo_zero_unpaired"].formula(ratios, good, 0.5, 0.3)
    assert got.tolist() == pytest.approx([1 - sigmoid(0.6), 1 - sigmoid(-0.3), sigmoid(0.6), sigmoid(-0.3)])


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["sigmoid"], {"beta": 0.0}, "beta is 0.0; it must be above 0"),
        (["sigmoid"], {"label_smoothing": 0.5}, "label_smoothing is 0.5; it must be a share of swapped labels"),
        (
            ["ipo"],
            {"label_smoothing": 0.1},
            "label_smoothing has no effect with loss_type ipo; it belongs to sigmoid, rob",
        ),
        (["exo_pair"], {}, "exo_pair needs label_smoothing above 0"),
        (["cpo"], {"simpo_gamma": 0.1}, "simpo_gamma has no effect with loss_type cpo; it belongs to simpo"),
        (["orpo", "sft"], {"cpo_alpha": 0.1}, "cpo_alpha has no effect with loss_type orpo, sft; it belongs to cpo"),
        (["sigmoid"], {"f_divergence_type": "kl"}, "f_divergence_type is kl; it must be one of reverse_kl, forward_kl"),
        (["nca_pair"], {"f_divergence_type": "forward_kl"}, "f_divergence_type has no effect with loss_type nca_pair"),
        (["ipo", "bco"], {"f_divergence_type": "forward_kl"}, "bco knows no divergence but reverse_kl, got"),
        (["ipo"], {"f_alpha_divergence_coef": 0.9}, "belongs to f_divergence_type alpha_divergence"),
        (["discopop"], {"discopop_tau": 0.0}, "discopop_tau is 0.0; it must be above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(names, options, message):
    with pytest.raises(ValueError, match=message):
        check(names, Coefficients(**options))


def test_what_goes_together_passes():
    check(["sigmoid", "sft"], Coefficients(f_divergence_type="js_divergence", label_smoothing=0.1))
    check(["hinge", "simpo"], Coefficients(simpo_gamma=1.0))


def test_tokens_beyond_the_shorter_response_are_discounted():
    """Pairs of 1 and 3, and of 2 and 2 response tokens behind prompts of one; a prompt's own weight is never read."""
    mask = torch.tensor([0, 1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    ends = torch.tensor([0, 2, 6, 9, 12], dtype=torch.int32)
    assert length_discount(mask, ends, 0.25)[mask].tolist() == [1, 1, 0.25, 0.25, 1, 1, 1, 1]


def test_a_pair_weighs_what_its_tokens_are_to_the_average_one():
    """WPO in plain floats, eq. 2 as it is written: the geometric means of p(token) / sum of p^2, of both responses."""
    chosen, rejected = [(0.5, 0.25, 0.25), (0.7, 0.2, 0.1)], [(0.1, 0.6, 0.3)]  # distributions; each token is the first

    def sums(power):
        return [sum(math.log(p[0] ** power / sum(x**power for x in p)) for p in r) for r in (chosen, rejected)]

    want = 1.0
    for response in (chosen, rejected):
        ratios = [p[0] / sum(x * x for x in p) for p in response]
        want *= math.prod(ratios) ** (1 / len(ratios))
    logprobs = torch.tensor([sums(1)], dtype=torch.float64, requires_grad=True)
    weights = on_policy_weights(logprobs, torch.tensor([sums(2)], dtype=torch.float64), torch.tensor([[2.0, 1.0]]))
    assert weights.tolist() == pytest.approx([want], rel=1e-12)
    assert not weights.requires_grad
