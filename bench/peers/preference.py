"""Losses of comparisons: one row per pair, or per ranking of K responses."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from bench.harness import BOTH, FORWARD, GRAPH, Contender, Task, ours
from rlhf_fast.kernels import dpo_loss, pairwise_reward_loss, ranked_reward_loss

BETA, CENTER = 0.1, 0.01
PAIRS = {"cpu": ((64,), (4096,)), "cuda": ((64,), (4096,)), "dry": ((5,),)}
RANKINGS = {"cpu": ((1024, 8),), "cuda": ((1024, 8),), "dry": ((3, 4),)}


def make_dpo(shape, dtype, device):
    """Summed log-probabilities of responses of a hundred tokens or so."""
    generator = torch.Generator(device).manual_seed(0)

    def near(x):
        return (x + 5 * torch.randn(shape, generator=generator, device=device)).to(dtype)

    start = torch.full(shape, -150.0, device=device)
    return {name: near(start) for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")}


def make_pairs(shape, dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    return {k: torch.randn(shape, generator=generator, device=device).to(dtype) for k in ("chosen", "rejected")}


def make_rankings(shape, dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.randn(shape, generator=generator, device=device).to(dtype)
    lengths = torch.randint(2, shape[1] + 1, shape[:1], generator=generator, device=device)
    return {"scores": scores, "mask": torch.arange(shape[1], device=device) < lengths[:, None]}


def fused_dpo(chosen, rejected, ref_chosen, ref_rejected):
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=BETA)


def eager_dpo(chosen, rejected, ref_chosen, ref_rejected):
    """The arithmetic of TRL's DPOTrainer, loss_type sigmoid, with the implicit rewards that it logs."""
    chosen_gain, rejected_gain = chosen - ref_chosen, rejected - ref_rejected
    losses = -logsigmoid(BETA * (chosen_gain - rejected_gain))
    return losses, (BETA * chosen_gain).detach(), (BETA * rejected_gain).detach()


def fused_pairwise(chosen, rejected):
    return pairwise_reward_loss(chosen, rejected, center=CENTER)


def eager_pairwise(chosen, rejected):
    return -logsigmoid(chosen - rejected) + CENTER * (chosen + rejected) ** 2


def fused_ranked(scores, mask):
    return ranked_reward_loss(scores, mask)


def eager_ranked(scores, mask):
    """Plackett-Luce: each place against itself and all behind it; prefix masks."""
    scores = scores.masked_fill(~mask, -1e4)
    behind = scores.flip(1).logcumsumexp(1).flip(1)
    # the last response of a ranking has nobody behind it and counts 0
    return (behind - scores).masked_fill(~mask, 0).sum(1)


def tasks(device):
    def task(op, family, make, definition, function, wanted, shapes):
        contenders = (
            *ours(function, family, op, device),
            Contender("torch eager", definition),
            Contender("torch.compile", definition, compiled=True),
        )
        passes = {FORWARD: (), BOTH: wanted} | ({BOTH + GRAPH: wanted} if device == "cuda" else {})
        return Task(op, family, make, definition, contenders, passes, shapes)

    pair = ("chosen", "rejected")
    return [
        task("dpo_loss", "preference", make_dpo, eager_dpo, fused_dpo, pair, PAIRS),
        task("pairwise_reward_loss", "reward", make_pairs, eager_pairwise, fused_pairwise, pair, PAIRS),
        task("ranked_reward_loss", "reward", make_rankings, eager_ranked, fused_ranked, ("scores",), RANKINGS),
    ]
