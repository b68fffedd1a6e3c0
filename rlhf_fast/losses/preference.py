r"""The DPO family as one table: a variant is one row of ``PAIRED``, or of ``UNPAIRED`` where the data has no pairs.

Everything is written in the log-ratios w (chosen) and l (rejected) of policy to reference, in log-probabilities summed over
a response, unless a row says that it averages them over its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from rlhf_fast.kernels import dpo_loss
from rlhf_fast.kernels.preference import KINDS, SMOOTHED
from rlhf_fast.kernels.segments import segment_ids, sequence_sum


class Coefficients(NamedTuple):
    """What the formulas are tuned with. A row reads beta and those of its ``options``."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0


class Pairs(NamedTuple):
    """B pairs as the losses see them, each entry (B,) float."""

    chosen: Tensor  # log-probability of the preferred response under the policy
    rejected: Tensor
    ref_chosen: Tensor | None  # under the reference; None where no row of the run needs one
    ref_rejected: Tensor | None
    chosen_tokens: Tensor  # length of the preferred response
    rejected_tokens: Tensor
    nll: Tensor  # its part in the mean negative log-likelihood per token of all preferred responses of a step
    shift: Tensor | float = 0.0  # running mean of the implicit rewards, where a row centres them

    @property
    def w(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def l(self) -> Tensor:
        return self.rejected - self.ref_rejected

    def scores(self, c: Coefficients) -> tuple[Tensor, Tensor]:
        """f'(ratio) of chosen and rejected, up to a constant: the log-ratios themselves under the reverse KL."""
        return DIVERGENCES[c.f_divergence_type](self.w, c), DIVERGENCES[c.f_divergence_type](self.l, c)

    def per_token(self) -> tuple[Tensor, Tensor]:
        """Mean log-probability per token of chosen and rejected under the policy."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


# ---------------------------------------------------------------------------------- divergences (f-DPO, arXiv:2309.16240)


MAX_EXPONENT = 40.0  # float32 squares e^40 without becoming inf, and differences of two still have a gradient


def _reverse_kl(ratio: Tensor, c: Coefficients) -> Tensor:
    return ratio


def _forward_kl(ratio: Tensor, c: Coefficients) -> Tensor:
    """f(u) = -log u, f' = -1/u."""
    return -torch.expm1((-ratio).clamp(max=MAX_EXPONENT))


def _js_divergence(ratio: Tensor, c: Coefficients) -> Tensor:
    """f' = log 2u/(u + 1)."""
    return math.log(2) + logsigmoid(ratio)


def _alpha_divergence(ratio: Tensor, c: Coefficients) -> Tensor:
    """f' = (u^(a - 1) - 1) / (a - 1), whose limit at a = 1 is the reverse KL."""
    a = c.f_alpha_divergence_coef - 1.0
    return ratio if abs(a) < 1e-6 else torch.expm1((a * ratio).clamp(max=MAX_EXPONENT)) / a


DIVERGENCES: dict[str, Callable[[Tensor, Coefficients], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}


# ---------------------------------------------------------------------------------------------------------- pairs


def _smoothed(margin: Tensor, c: Coefficients) -> Tensor:
    """-log sigmoid of a margin, when a share ``label_smoothing`` of the labels is taken to be swapped."""
    return -(1 - c.label_smoothing) * logsigmoid(margin) - c.label_smoothing * logsigmoid(-margin)


def _kernel(kind: str, w: Tensor, l: Tensor, c: Coefficients) -> Tensor:
    """One of the fused losses, see :func:`rlhf_fast.kernels.dpo_loss`."""
    nothing, smoothing = torch.zeros_like(w), c.label_smoothing if kind in SMOOTHED else 0.0
    return dpo_loss(w, l, nothing, nothing, beta=c.beta, kind=kind, label_smoothing=smoothing)[0]


def _fused(kind: str) -> Callable[[Pairs, Coefficients], Tensor]:
    return lambda p, c: _kernel(kind, *p.scores(c), c)


def _ipo(p: Pairs, c: Coefficients) -> Tensor:
    """IPO on scores per token, as its authors confirmed to TRL that they compute it (arXiv:2310.12036, eq. 17)."""
    w, l = p.scores(c)
    return _kernel("ipo", w / p.chosen_tokens, l / p.rejected_tokens, c)


def _sigmoid_norm(p: Pairs, c: Coefficients) -> Tensor:
    """Length-normalised DPO (Tulu 3, arXiv:2411.15124, eq. 6)."""
    w, l = p.scores(c)
    return _kernel("sigmoid", w / p.chosen_tokens, l / p.rejected_tokens, c)


def _bco_pair(p: Pairs, c: Coefficients) -> Tensor:
    """A classifier of good and bad (arXiv:2404.04656) without its reward shift."""
    return -logsigmoid(c.beta * p.w) - logsigmoid(-c.beta * p.l)


def _bco(p: Pairs, c: Coefficients) -> Tensor:
    """BCO (arXiv:2404.04656, eq. 9): rewards against the mean of all rewards so far."""
    return -logsigmoid(c.beta * p.w - p.shift) - logsigmoid(p.shift - c.beta * p.l)


def _aot(p: Pairs, c: Coefficients) -> Tensor:
    """AOT for pairs (arXiv:2406.05882, alg. 1): the policy's margins dominate the reference's quantile by quantile."""
    margins = (p.chosen - p.rejected).sort().values - (p.ref_chosen - p.ref_rejected).sort().values
    return _smoothed(c.beta * margins, c)


def _aot_unpaired(p: Pairs, c: Coefficients) -> Tensor:
    """AOT without pairs (arXiv:2406.05882, alg. 1): chosen log-ratios dominate rejected ones quantile by quantile."""
    return _smoothed(c.beta * (p.w.sort().values - p.l.sort().values), c)


def _discopop(p: Pairs, c: Coefficients) -> Tensor:
    """DiscoPOP's log-ratio modulated loss (arXiv:2406.08414, eq. 5)."""
    w, l = p.scores(c)
    d = c.beta * (w - l)
    # e^-d and its weight as one power: by itself e^-d overflows where the weight is 0
    return softplus(-d) * torch.sigmoid(-d / c.discopop_tau) + torch.exp(logsigmoid(d / c.discopop_tau) - d)


def _sft(p: Pairs, c: Coefficients) -> Tensor:
    """Likelihood of the preferred response; beside another loss it keeps that from sinking (RPO, arXiv:2404.19733)."""
    return p.nll


def _orpo(p: Pairs, c: Coefficients) -> Tensor:
    """ORPO (arXiv:2403.07691, eqs. 6 and 7): likelihood, and beta times the log odds ratio of mean probabilities."""
    w, l = p.per_token()
    return p.nll - c.beta * logsigmoid(_log_odds(w) - _log_odds(l))


def _log_odds(logprob: Tensor) -> Tensor:
    """log p / (1 - p) of a log-probability; a certain response counts as p = 1 - 1e-7."""
    logprob = logprob.clamp(max=-1e-7)
    return logprob - torch.log(-torch.expm1(logprob))


def _simpo(p: Pairs, c: Coefficients) -> Tensor:
    """SimPO (arXiv:2405.14734, eq. 6): mean log-probabilities part by at least ``simpo_gamma``."""
    w, l = p.per_token()
    return _smoothed(c.beta * (w - l) - c.simpo_gamma, c)


def _cpo(p: Pairs, c: Coefficients) -> Tensor:
    """CPO (arXiv:2401.08417, eq. 5): DPO against a uniform reference, and the likelihood of the preferred response."""
    return _smoothed(c.beta * (p.chosen - p.rejected), c) + c.cpo_alpha * p.nll


def length_discount(mask: Tensor, cu_seqlens: Tensor, alpha: float) -> Tensor:
    """Weights of the tokens of pairs of responses: ``alpha`` beyond the length of the shorter one (LD-DPO, arXiv:2409.06411).

    Args:
        mask: True on the response tokens. (N,) bool.
        cu_seqlens: (2 B + 1,) int32, the two responses of a pair next to each other.
    Returns:
        (N,) float32.
    """
    counts = sequence_sum(mask.long(), cu_seqlens)
    of = segment_ids(cu_seqlens, len(mask))
    place = mask.cumsum(0) - (counts.cumsum(0) - counts)[of]  # in its response, from 1
    shared = counts.view(-1, 2).amin(1).repeat_interleave(2)[of]
    return torch.where(place <= shared, 1.0, alpha)


def on_policy_weights(logprobs: Tensor, sharpened: Tensor, tokens: Tensor) -> Tensor:
    r"""How likely the policy itself is to write both responses of each pair (WPO, Zhou et al. 2024, arXiv:2406.11827, eq. 2).

    .. math:: w = \prod_{y \in \{y_w, y_l\}} \exp \frac{1}{|y|} \sum_t \log
        \frac{\pi(y_t)}{\sum_v \pi(v)^2}

    Over what a token's probability is on average (the "sampled alignment"), so that what the policy samples weighs about 1.
    With :math:`\pi_{1/2} \propto \pi^2`, the policy at half the temperature, that fraction is :math:`\pi_{1/2}(y_t) / \pi(y_t)`:
    no sum over the vocabulary is needed that a log-probability does not have.

    Args:
        logprobs, sharpened: of whole responses under the policy, and under it at half the temperature. (B, 2) float.
        tokens: lengths of the responses. (B, 2)
    Returns:
        (B,) float, without a gradient.
    """
    return ((sharpened - logprobs.detach()) / tokens).sum(1).exp()


class Row(NamedTuple):
    """One loss of pairs."""

    formula: Callable[[Pairs, Coefficients], Tensor]  # losses (B,)
    options: frozenset[str] = frozenset()  # coefficients that it reads besides beta
    reference: bool = True  # it compares with a reference
    coupled: bool = False  # a pair's loss depends on the other pairs of a step: it sorts them
    centred: bool = False  # it reads the running mean of the rewards


_SMOOTHING = frozenset({"label_smoothing"})
_DIVERGENCE = frozenset({"f_divergence_type", "f_alpha_divergence_coef"})

PAIRED: dict[str, Row] = {
    "sigmoid": Row(_fused("sigmoid"), _SMOOTHING | _DIVERGENCE),
    "ipo": Row(_ipo, _DIVERGENCE),
    "hinge": Row(_fused("hinge"), _DIVERGENCE),
    "robust": Row(_fused("robust"), _SMOOTHING | _DIVERGENCE),
    "exo_pair": Row(_fused("exo_pair"), _SMOOTHING | _DIVERGENCE),
    # these see each response by itself: only the reverse KL has a log-ratio that is a reward
    "nca_pair": Row(_fused("nca_pair")),
    "sppo_hard": Row(_fused("sppo_hard")),
    "apo_zero": Row(_fused("apo_zero")),
    "apo_down": Row(_fused("apo_down")),
    "bco_pair": Row(_bco_pair),
    "bco": Row(_bco, centred=True),
    "sigmoid_norm": Row(_sigmoid_norm, _SMOOTHING | _DIVERGENCE),
    "discopop": Row(_discopop, _DIVERGENCE | {"discopop_tau"}),
    "aot": Row(_aot, _SMOOTHING, coupled=True),
    "aot_unpaired": Row(_aot_unpaired, _SMOOTHING, coupled=True),
    "sft": Row(_sft, reference=False),
    "orpo": Row(_orpo, reference=False),
    "simpo": Row(_simpo, _SMOOTHING | {"simpo_gamma"}, reference=False),
    "cpo": Row(_cpo, _SMOOTHING | {"cpo_alpha"}, reference=False),
}
assert KINDS.keys() <= PAIRED.keys()


def check(names: Iterable[str], c: Coefficients) -> None:
    """Refuse coefficients that are out of range, or that none of the losses ``names`` reads.

    Raises:
        ValueError: names the coefficient, its value, and the losses that take it.
    """
    names = list(names)
    ranges = {
        "beta": (c.beta > 0, "above 0"),
        "label_smoothing": (0 <= c.label_smoothing < 0.5, "a share of swapped labels, from 0 to below 0.5"),
        "discopop_tau": (c.discopop_tau > 0, "above 0"),
        "simpo_gamma": (c.simpo_gamma >= 0, "at least 0"),
        "cpo_alpha": (c.cpo_alpha >= 0, "at least 0"),
        "f_divergence_type": (c.f_divergence_type in DIVERGENCES, f"one of {', '.join(DIVERGENCES)}"),
    }
    for option, (good, allowed) in ranges.items():
        if not good:
            raise ValueError(f"{option} is {getattr(c, option)}; it must be {allowed}")
    if "exo_pair" in names and not c.label_smoothing:
        raise ValueError("loss_type exo_pair needs label_smoothing above 0 (its authors use 1e-3)")
    for option, default in Coefficients._field_defaults.items():
        takers = [name for name, row in PAIRED.items() if option in row.options]
        if getattr(c, option) != default and option != "beta" and not set(names) & set(takers):
            raise ValueError(
                f"{option} has no effect with loss_type {', '.join(names)}; it belongs to {', '.join(takers)}"
            )
    if c.f_alpha_divergence_coef != 0.5 and c.f_divergence_type != "alpha_divergence":
        raise ValueError("f_alpha_divergence_coef belongs to f_divergence_type alpha_divergence")
    for name in names if c.f_divergence_type != "reverse_kl" else ():
        if "f_divergence_type" not in PAIRED[name].options and PAIRED[name].formula is not _sft:
            raise ValueError(
                f"loss_type {name} knows no divergence but reverse_kl, got f_divergence_type {c.f_divergence_type}"
            )


# -------------------------------------------------------------------------------------------------------- no pairs


def _kto(ratio: Tensor, desirable: Tensor, kl: float, beta: float) -> Tensor:
    """KTO (arXiv:2402.01306, eqs. 7 and 8, without lambda): one minus the value of a gain or loss against ``kl``."""
    return torch.sigmoid(torch.where(desirable, -beta, beta) * (ratio - kl))


def _apo_zero_unpaired(ratio: Tensor, desirable: Tensor, kl: float, beta: float) -> Tensor:
    """APO-zero of its two sides apart (arXiv:2408.06266, eq. 7)."""
    return _kto(ratio, desirable, 0.0, beta)


class UnpairedRow(NamedTuple):
    """One loss of single responses, of their log-ratios, labels (B,) bool, the KL to the reference, and beta."""

    formula: Callable[[Tensor, Tensor, float, float], Tensor]
    needs_kl: bool


UNPAIRED: dict[str, UnpairedRow] = {
    "kto": UnpairedRow(_kto, needs_kl=True),
    "apo_zero_unpaired": UnpairedRow(_apo_zero_unpaired, needs_kl=False),
}
