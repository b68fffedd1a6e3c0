"""One small call of every public operation: what the tests of compilation, operators and repeatability run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_fast import kernels

NAN = float("nan")
# masked tokens, an empty sequence, and one without an unmasked token
MASK = torch.tensor([1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1]).bool()
CU_SEQLENS = torch.tensor([0, 4, 6, 6, 8, 12], dtype=torch.int32)
SEQUENCES = len(CU_SEQLENS) - 1


class Call:
    """A public function of its differentiable inputs, everything else bound, and such inputs."""

    def __init__(self, run: Callable[..., tuple[Tensor, ...]], *leaves: Tensor):
        self.run, self.leaves = run, leaves

    def results_and_gradients(self, trained: bool = True) -> list[Tensor]:
        return evaluate(self.run, self.leaves, trained)


def evaluate(run: Callable[..., tuple[Tensor, ...]], leaves: tuple[Tensor, ...], trained: bool = True) -> list[Tensor]:
    """Results, then the leaves' gradients under uneven upstream ones, if there are any and they are wanted."""
    leaves = [x.detach().clone().requires_grad_(trained) for x in leaves]
    results = run(*leaves)
    wanted = [x for x in results if x.requires_grad]
    upstream = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).view(x.shape) for x in wanted]
    grads = torch.autograd.grad(wanted, leaves, upstream) if wanted else ()
    return [x.detach() for x in (*results, *grads)]


def _random(dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def _flat(result) -> tuple[Tensor, ...]:
    """A tensor, a tuple of them, or a loss with its metrics, as one tuple."""
    if isinstance(result, Tensor):
        return (result,)
    return tuple(y for x in result for y in (x.values() if isinstance(x, dict) else (x,)))


def calls(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Call]:
    """By public name. Tokens are packed, as in training; masked ones are NaN unless they are leaves."""
    random = _random(dtype, device)
    mask, cu_seqlens = MASK.to(device), CU_SEQLENS.to(device)
    labels = torch.tensor([3, -100, 0, 10, 4], device=device)
    old, ref, rollout, values = (torch.where(mask, random(len(mask)) - 2, NAN) for _ in range(4))
    scores, rewards = random(SEQUENCES), torch.where(torch.arange(6, device=device) == 4, NAN, random(6))
    packed = {"cu_seqlens": cu_seqlens}

    def policy(logprobs, entropy):
        terms = {"ref_logprobs": ref, "kl_coef": 0.2, "rollout_logprobs": rollout, "is_clip": 1.5}
        return kernels.policy_loss(
            logprobs, old, scores, mask, dual_clip=1.5, level="sequence", entropy=entropy, entropy_coef=0.1,
            aggregate="sequence", **terms, **packed,
        )  # fmt: skip

    def head(hidden, weight, x, b):
        options = {"low_rank": (x, b), "softcap": 4.0, "logit_scale": 1.2, "entropy": True}
        return kernels.linear_logprobs(hidden, weight, labels, **options)

    cache, lengths = random(2, 3, 2, 7, 5), torch.tensor([7, 0, 4], device=device)

    def decode(query):
        return kernels.decode_attention(query, *cache, lengths, window=5)

    def shaped(logprobs):
        return kernels.shaped_rewards(scores, logprobs, ref, mask, kl_coef=0.1, clip=1.0, **packed)

    def kl_shaped(*_):
        return kernels.kl_shaped_gae(scores, old, ref, values, mask, kl_coef=0.1, bootstrap=scores, **packed)

    bases, bias = [random(4, 6), random(4, 6), random(6, 4)], random(4)

    def linear(x, a, b):
        first = kernels.LoraWeights(bases[0], a, b, 0.5, bias)
        return kernels.lora_linear(x, first, kernels.LoraWeights(bases[1], a * 2, b * 2))

    def mlp(x, a, b, norm):
        up, down = kernels.LoraWeights(bases[1], a * 2, b * 2), kernels.LoraWeights(bases[2], b.T, a.T, 2.0)
        return kernels.lora_mlp(kernels.rms_norm(x, norm), kernels.LoraWeights(bases[0], a, b, 0.5, bias), up, down)

    found = {
        "lora_linear": (linear, random(3, 6), random(2, 6), random(4, 2)),
        "lora_mlp": (mlp, random(3, 6), random(2, 6), random(4, 2), random(6)),
        "decode_attention": (decode, random(3, 4, 5)),
        "rms_norm": (lambda x, w: kernels.rms_norm(x, w), random(2, 3, 6), random(6)),
        "token_logprobs": (lambda x: kernels.token_logprobs(x, labels, temperature=0.7, entropy=True), random(5, 11)),
        "linear_logprobs": (head, random(5, 3), random(11, 3), random(5, 2), random(11, 2)),
        "linear_cross_entropy": (lambda h, w: kernels.linear_cross_entropy(h, w, labels), random(5, 3), random(11, 3)),
        "sequence_logprobs": (lambda x: kernels.sequence_logprobs(x, mask, average=True, **packed), random(len(mask))),
        "gae": (lambda: kernels.gae(old, values, mask, 0.9, 0.8, bootstrap=scores, **packed),),
        "shaped_rewards": (shaped, random(len(mask)) - 2),
        "kl_shaped_gae": (kl_shaped,),
        "whiten": (lambda x: kernels.whiten(x, mask), random(len(mask))),
        "group_advantages": (lambda: kernels.group_advantages(rewards, 3),),
        "kl_penalty": (lambda a, b: kernels.kl_penalty(a, b, "k3"), random(2, 5), random(2, 5)),
        "policy_loss": (policy, random(len(mask)) * 0.3 - 2, random(len(mask))),
        "value_loss": (lambda v: kernels.value_loss(v, values, old, mask, **packed), random(len(mask)) - 2),
        "dpo_loss": (lambda c, r: kernels.dpo_loss(c, r, *random_pair, kind="robust", label_smoothing=0.1), *(
            random(5), random(5))),
        "pairwise_reward_loss": (lambda c, r: kernels.pairwise_reward_loss(c, r, margin=random_pair[0], center=0.1), *(
            random(5), random(5))),
        "ranked_reward_loss": (lambda s: kernels.ranked_reward_loss(s, mask.view(3, 4)), random(3, 4)),
    }  # fmt: skip
    random_pair = (random(5), random(5))
    return {name: Call(lambda *x, run=run: _flat(run(*x)), *leaves) for name, (run, *leaves) in found.items()}
