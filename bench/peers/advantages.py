"""Advantages of (B, T) responses, padded on the right: what trainers have. Masks are prefixes of random length."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from bench.harness import FORWARD, GRAPH, Contender, Task, ours
from rlhf_fast.kernels import gae, group_advantages, kl_shaped_gae, shaped_rewards, whiten

GAMMA, LAM, KL_COEF, GROUP = 0.99, 0.95, 0.05, 8
SHAPES = {"cpu": ((512, 1024),), "cuda": ((512, 4096), (4096, 128)), "dry": ((3, 7),)}


def make_tokens(shape, dtype, device):
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, device=device)

    lengths = torch.randint(1, shape[1] + 1, shape[:1], generator=generator, device=device)
    mask = torch.arange(shape[1], device=device) < lengths[:, None]
    return {"rewards": normal(*shape).mul_(0.1).to(dtype), "values": normal(*shape).to(dtype), "mask": mask}


def make_scored(shape, dtype, device):
    """One score per response, log-probabilities of policy and reference."""
    inputs = make_tokens(shape, dtype, device)
    generator = torch.Generator(device).manual_seed(1)
    logprobs = torch.randn(shape, generator=generator, device=device).abs_().neg_()
    ref = logprobs + 0.1 * torch.randn(shape, generator=generator, device=device)
    scores = torch.randn(shape[0], generator=generator, device=device)
    tokens = {"logprobs": logprobs.to(dtype), "ref_logprobs": ref.to(dtype)}
    return {"scores": scores, **tokens, "values": inputs["values"], "mask": inputs["mask"]}


def make_rewards(shape, dtype, device):
    return {"rewards": torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)}


def fused_gae(rewards, values, mask):
    return gae(rewards, values, mask, GAMMA, LAM)


def loop_gae(rewards, values, mask):
    """The loop over time of PPO implementations, TRL's former PPOTrainer among them."""
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    last, reversed_advantages = 0, []
    for t in reversed(range(values.shape[1])):
        next_values = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        delta = rewards[:, t] + GAMMA * next_values - values[:, t]
        last = delta + GAMMA * LAM * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], dim=1).masked_fill(~mask, 0)
    return advantages, advantages + values


def doubling_gae(rewards, values, mask):
    """log2(T) vectorised steps: after each, an entry sums twice as many of the temporal differences ahead of it."""
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantages = rewards + GAMMA * pad(values[:, 1:], (0, 1)) - values
    step = 1
    while step < values.shape[1]:
        advantages = advantages + (GAMMA * LAM) ** step * pad(advantages[:, step:], (0, step))
        step *= 2
    advantages = advantages.masked_fill(~mask, 0)
    return advantages, advantages + values


def fused_shaped_rewards(scores, logprobs, ref_logprobs, values, mask):
    return shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=KL_COEF)


def eager_shaped_rewards(scores, logprobs, ref_logprobs, values, mask):
    rewards = (-KL_COEF * (logprobs - ref_logprobs)).masked_fill(~mask, 0)
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def fused_kl_shaped_gae(scores, logprobs, ref_logprobs, values, mask):
    return kl_shaped_gae(scores, logprobs, ref_logprobs, values, mask, kl_coef=KL_COEF, gamma=GAMMA, lam=LAM)


def loop_kl_shaped_gae(scores, logprobs, ref_logprobs, values, mask):
    rewards = eager_shaped_rewards(scores, logprobs, ref_logprobs, values, mask)
    advantages, returns = loop_gae(rewards, values, mask)
    return eager_whiten(advantages, mask), returns, rewards, (logprobs - ref_logprobs).masked_fill(~mask, 0)


def doubling_kl_shaped_gae(scores, logprobs, ref_logprobs, values, mask):
    rewards = eager_shaped_rewards(scores, logprobs, ref_logprobs, values, mask)
    advantages, returns = doubling_gae(rewards, values, mask)
    return eager_whiten(advantages, mask), returns, rewards, (logprobs - ref_logprobs).masked_fill(~mask, 0)


def fused_whiten(x, mask):
    return whiten(x, mask)


def eager_whiten(x, mask):
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean) ** 2 * mask).sum() / count
    return ((x - mean) * (variance + 1e-8).rsqrt()).masked_fill(~mask, 0)


def fused_group_advantages(rewards):
    return group_advantages(rewards, GROUP)


def eager_group_advantages(rewards):
    groups = rewards.view(-1, GROUP)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1)


def tasks(device):
    passes = {FORWARD: ()} | ({FORWARD + GRAPH: ()} if device == "cuda" else {})

    def task(op, make, definition, contenders, shapes=SHAPES, moved=None):
        passed = {name: () for name in passes}
        return Task(op, "advantages", make, definition, contenders, passed, shapes, moved=moved)

    def entrants(op, function, loop, doubling):
        return (
            *ours(function, "advantages", op, device),
            Contender("Python loop", loop, passes=(FORWARD,)),
            Contender("log-doubling", doubling),
            Contender("log-doubling, torch.compile", doubling, compiled=True),
        )

    def plain(op, function, eager):
        return (
            *ours(function, "advantages", op, device),
            Contender("torch eager", eager),
            Contender("torch.compile", eager, compiled=True),
        )

    # rewards, values and mask in, advantages and returns out
    traffic = {
        "gae": lambda shape, size, passed: shape[0] * shape[1] * (2 * size + 1 + 8),
        "kl_shaped_gae": lambda shape, size, passed: shape[0] * shape[1] * (3 * size + 1 + 16),
    }
    shaped = plain("shaped_rewards", fused_shaped_rewards, eager_shaped_rewards)
    both = entrants("kl_shaped_gae", fused_kl_shaped_gae, loop_kl_shaped_gae, doubling_kl_shaped_gae)
    groups = {"cpu": ((4096,),), "cuda": ((4096,),), "dry": ((16,),)}
    return [
        task("gae", make_tokens, loop_gae, entrants("gae", fused_gae, loop_gae, doubling_gae), moved=traffic["gae"]),
        task("kl_shaped_gae", make_scored, loop_kl_shaped_gae, both, moved=traffic["kl_shaped_gae"]),
        task("shaped_rewards", make_scored, eager_shaped_rewards, shaped),
        task("whiten", make_whiten, eager_whiten, plain("whiten", fused_whiten, eager_whiten)),
        task(
            "group_advantages",
            make_rewards,
            eager_group_advantages,
            plain("group_advantages", fused_group_advantages, eager_group_advantages),
            groups,
        ),
    ]


def make_whiten(shape, dtype, device):
    inputs = make_tokens(shape, dtype, device)
    return {"x": inputs["values"], "mask": inputs["mask"]}
