"""Losses of policy and critic over (B, T) tokens: PPO's clip with a k3 KL, one advantage per response, token mean."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from types import SimpleNamespace

import torch

from bench.harness import BOTH, FORWARD, GRAPH, Contender, Task, needs, ours
from bench.peers.advantages import make_tokens
from rlhf_fast.kernels import kl_penalty, policy_loss, value_loss

CLIP, KL_COEF = 0.2, 0.04
SHAPES = {"cpu": ((512, 1024),), "cuda": ((2048, 1024),), "dry": ((3, 7),)}


def make_policy(shape, dtype, device):
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, device=device)

    old = normal(*shape).abs_().neg_()
    tokens = {"logprobs": old + 0.2 * normal(*shape), "old_logprobs": old, "ref_logprobs": old + 0.2 * normal(*shape)}
    mask = make_tokens(shape, dtype, device)["mask"]
    return {**{k: v.to(dtype) for k, v in tokens.items()}, "advantages": normal(shape[0]).to(dtype), "mask": mask}


def make_values(shape, dtype, device):
    inputs, generator = make_tokens(shape, dtype, device), torch.Generator(device).manual_seed(1)
    old = inputs["values"] + 0.3 * torch.randn(shape, generator=generator, device=device).to(dtype)
    returns = inputs["values"] + torch.randn(shape, generator=generator, device=device).to(dtype)
    return {"values": inputs["values"], "old_values": old, "returns": returns, "mask": inputs["mask"]}


METRICS = ("clip_low", "clip_high", "clip_region", "approx_kl", "ratio_mean", "ratio_max", "kl")


def fused_policy(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    options = {"clip_low": CLIP, "ref_logprobs": ref_logprobs, "kl_coef": KL_COEF}
    loss, metrics = policy_loss(logprobs, old_logprobs, advantages, mask, **options)
    return loss, *(metrics[name] for name in METRICS)


def eager_policy(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    """Loss and the metrics that every trainer logs."""
    count, advantages = mask.sum(), advantages[:, None]
    log_ratio = logprobs - old_logprobs
    ratio, delta = log_ratio.exp(), ref_logprobs - logprobs
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    kl = delta.exp() - delta - 1
    total = ((loss + KL_COEF * kl) * mask).sum() / count
    with torch.no_grad():
        low, high = (ratio < 1 - CLIP) & (advantages < 0), (ratio > 1 + CLIP) & (advantages > 0)
        means = [(x * mask).sum() / count for x in (low, high, low | high, ratio - 1 - log_ratio, ratio, kl)]
        largest = (ratio * mask).amax()
    return total, *means[:5], largest, means[5]


def eager_policy_loss_alone(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    advantages = advantages[:, None]
    ratio, delta = (logprobs - old_logprobs).exp(), ref_logprobs - logprobs
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return ((loss + KL_COEF * (delta.exp() - delta - 1)) * mask).sum() / mask.sum()


def trl_policy(logprobs, old_logprobs, ref_logprobs, advantages, mask):
    """GRPOTrainer's own method on a trainer without a model; its metrics go to the host, as they do in training."""
    from trl import GRPOTrainer

    trainer = _trl_trainer()
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logprobs, old_logprobs, None)
    inputs = {"prompt_ids": mask[:, :0], "prompt_mask": mask[:, :0], "completion_ids": mask, "completion_mask": mask}
    per_token = {"old_per_token_logps": old_logprobs, "ref_per_token_logps": ref_logprobs}
    return GRPOTrainer._compute_loss(trainer, None, {**inputs, **per_token, "advantages": advantages})


@cache
def _trl_trainer():
    """The attributes that GRPOTrainer._compute_loss of TRL 1.16 reads: one process, loss_type bnpo (a token mean)."""
    same = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x, num_processes=1
    )
    settings = {"importance_sampling_level": "token", "loss_type": "bnpo", "beta": KL_COEF, "epsilon_low": CLIP}
    off = dict.fromkeys(("aux_loss_enabled", "use_vllm", "_entropy_bonus_enabled"), False)
    return SimpleNamespace(
        **settings,
        **off,
        epsilon_high=CLIP,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        model=SimpleNamespace(training=True),
        accelerator=same,
        current_gradient_accumulation_steps=1,
        _metrics={"train": _Forgetful()},
    )


class _Forgetful(defaultdict):
    """A metrics log that does not grow over the thousands of calls of a benchmark."""

    def __missing__(self, name):
        return []


def fused_value(values, old_values, returns, mask):
    loss, metrics = value_loss(values, old_values, returns, mask, clip=CLIP)
    return loss, metrics["clip_fraction"], metrics["value_mean"], metrics["return_mean"]


def eager_value(values, old_values, returns, mask):
    """As in TRL's former PPOTrainer, with the metrics."""
    count = mask.sum()
    clipped = old_values + (values - old_values).clamp(-CLIP, CLIP)
    first, second = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * (torch.maximum(first, second) * mask).sum() / count
    with torch.no_grad():
        outside = (values - old_values).abs() > CLIP
        metrics = [(x * mask).sum() / count for x in (outside & (second > first), values, returns)]
    return loss, *metrics


def fused_kl(logprobs, ref_logprobs):
    return kl_penalty(logprobs, ref_logprobs, "k3")


def eager_kl(logprobs, ref_logprobs):
    delta = ref_logprobs - logprobs
    return delta.exp() - delta - 1


def make_kl(shape, dtype, device):
    return {k: v for k, v in make_policy(shape, dtype, device).items() if k in ("logprobs", "ref_logprobs")}


def tasks(device):
    def task(op, make, definition, contenders, wanted, family="policy"):
        passes = {FORWARD: (), BOTH: (wanted,)}
        if device == "cuda":
            passes |= {BOTH + GRAPH: (wanted,)}
        return Task(op, family, make, definition, contenders, passes, SHAPES)

    policy = (
        *ours(fused_policy, "policy", "policy_loss", device),
        Contender("torch eager", eager_policy),
        Contender("torch eager, no metrics", eager_policy_loss_alone, outputs=1),
        Contender("torch.compile", eager_policy, compiled=True),
        Contender("torch.compile, no metrics", eager_policy_loss_alone, outputs=1, compiled=True),
        Contender("TRL", trl_policy, needs("trl"), outputs=1),
    )
    value = (
        *ours(fused_value, "policy", "value_loss", device),
        Contender("torch eager", eager_value),
        Contender("torch.compile", eager_value, compiled=True),
    )
    kl = (
        *ours(fused_kl, "kl", "kl_penalty", device),
        Contender("torch eager", eager_kl),
        Contender("torch.compile", eager_kl, compiled=True),
    )
    return [
        task("policy_loss", make_policy, eager_policy, policy, "logprobs"),
        task("value_loss", make_values, eager_value, value, "values"),
        task("kl_penalty", make_kl, eager_kl, kl, "logprobs", family="kl"),
    ]
