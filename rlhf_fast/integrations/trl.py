"""TRL 1.16's trainers on these kernels. One line, before or after the trainer is made:

    import rlhf_fast.integrations.trl as fast
    fast.patch()

Every trainer of TRL (SFT, DPO, GRPO, RLOO, KTO) gets its log-probabilities from one function of hidden states and LM
head, which makes the logits twice: three V-sized GEMMs with a frozen head, four with a trained one.
:func:`rlhf_fast.kernels.linear_logprobs` in its place needs two and three. The older functions of logits, which TRL's
experimental trainers use, become :func:`rlhf_fast.kernels.token_logprobs`. Losses and metrics keep their names.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.integrations.replace import check_signature, replace_everywhere
from rlhf_fast.kernels import kl_penalty, linear_logprobs, policy_loss, sequence_logprobs, token_logprobs

__all__ = ["FusedGRPO", "patch", "patched", "unpatch"]

_HEAD = "_ChunkedLogProbFunction"
_HEAD_INPUTS = ("hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping")
_SIGNATURES = {
    _HEAD: ("ctx", *_HEAD_INPUTS, "logit_scale", "outputs"),
    "selective_log_softmax": ("logits", "index", "temperature", "row_mask"),
    "entropy_from_logits": ("logits", "chunk_size"),
    "selective_log_softmax_and_entropy": ("logits", "index", "entropy_requires_grad", "temperature", "row_mask"),
}
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_LOG_HALF = -0.6931472

_originals: dict[str, object] = {}  # TRL's functions while ours stand in for them


def patch(*, entropy_gradient: bool = False) -> None:
    """Put these kernels into TRL, in this process, until :func:`unpatch`. A second call only changes the option.

    Args:
        entropy_gradient: the loss has an entropy term (GRPO's ``entropy_coef``): make the gradient of the entropy
            along with that of the log-probability, three GEMMs with a frozen head. Without it the result is the same,
            but the first GEMMs are done over when the gradient is asked for.
    Raises:
        UserError: TRL is missing, or its functions take other parameters than 1.16's; nothing is changed then.
    """
    utils = _trl_utils()
    replacements = {
        _HEAD: _FusedHead(_originals.get(_HEAD) or getattr(utils, _HEAD), entropy_gradient),
        "selective_log_softmax": _selective_log_softmax,
        "entropy_from_logits": _entropy_from_logits,
        "selective_log_softmax_and_entropy": _selective_log_softmax_and_entropy,
    }
    for name, new in replacements.items():
        current = getattr(utils, name)
        _originals.setdefault(name, current)
        if name == _HEAD:
            setattr(utils, name, new)  # looked up at every call, in this module only
        else:
            replace_everywhere("trl", current, new)


def unpatch() -> None:
    """Give TRL its own functions back, in modules imported since :func:`patch` too. Does nothing if not patched."""
    if not _originals:
        return
    utils = _trl_utils(check=False)
    for name, original in _originals.items():
        replace_everywhere("trl", getattr(utils, name), original)
    _originals.clear()


@contextmanager
def patched(*, entropy_gradient: bool = False) -> Iterator[None]:
    """:func:`patch` for the time of a ``with`` block. What was in place before is in place again afterwards."""
    before = getattr(_trl_utils(), _HEAD) if _originals else None
    patch(entropy_gradient=entropy_gradient)
    try:
        yield
    finally:
        if before is None:
            unpatch()
        else:
            setattr(_trl_utils(check=False), _HEAD, before)


class _FusedHead:
    """Stands in for TRL's autograd function; ``apply`` takes and returns what that does."""

    def __init__(self, original: type, entropy_gradient: bool):
        self.original, self.entropy_gradient = original, entropy_gradient

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """Return logprobs, entropy, log_sum_sq_probs, mean_logits and is_top1, (N,) each, None if not in ``outputs``.

        Args:
            hidden: (N, D) float; weight: (V, D); bias: (V,); targets: (N,) in [0, V).
            chunk_size: of the vocabulary, TRL's; our chunks are rows and choose their own size.
        """
        theirs = (temperature, chunk_size, final_logit_softcapping, logit_scale)
        if hasattr(weight, "ds_id"):  # DeepSpeed ZeRO-3: TRL's function gathers the head again for its backward pass
            return self.original.apply(hidden, weight, bias, targets, *theirs, outputs)
        dtype = _compute_dtype(hidden)
        head = (hidden.to(dtype), weight.to(dtype), bias)
        options = {"temperature": temperature, "softcap": final_logit_softcapping, "logit_scale": logit_scale}
        together = self.entropy_gradient and "entropy" in outputs
        logprobs, entropy = linear_logprobs(
            *head[:2], targets, bias=bias, entropy=True if together else "detached", **options
        )
        extras = _without_gradient(self.original, head, targets, theirs, outputs, logprobs, entropy)
        if not together and "entropy" in outputs:
            entropy = _EntropyOnDemand.apply(entropy, *head, targets, options)
        return logprobs, entropy if "entropy" in outputs else None, *extras


class _EntropyOnDemand(torch.autograd.Function):
    """Pass an entropy through; make its gradient, from the start, only if the loss asks for it."""

    @staticmethod
    def forward(ctx, entropy, hidden, weight, bias, targets, options):
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.options, ctx.needs = options, ctx.needs_input_grad[1:4]
        return entropy.view_as(entropy)

    @staticmethod
    def backward(ctx, grad):
        *head, targets = ctx.saved_tensors
        with torch.enable_grad():
            head = [None if x is None else x.detach().requires_grad_(need) for x, need in zip(head, ctx.needs)]
            _, entropy = linear_logprobs(*head[:2], targets, bias=head[2], entropy=True, **ctx.options)
        wanted = [x for x, need in zip(head, ctx.needs) if need]
        grads = iter(torch.autograd.grad(entropy, wanted, grad) if wanted else ())
        return None, *(next(grads) if need else None for need in ctx.needs), None, None


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


@torch.no_grad()
def _without_gradient(original, head, targets, theirs, outputs, logprobs, entropy) -> tuple[Tensor | None, ...]:
    """The fields that only metrics and weights need: log_sum_sq_probs, mean_logits and is_top1."""
    hidden, weight, bias = head
    temperature, _, softcap, logit_scale = theirs

    def by_trl(name: str, rows: Tensor | slice = slice(None)) -> Tensor:
        return original.apply(hidden[rows], weight, bias, targets[rows], *theirs, (name,))[1 + _OUTPUTS.index(name)]

    log_sum_sq_probs = by_trl("log_sum_sq_probs") if "log_sum_sq_probs" in outputs else None
    mean_logits = is_top1 = None
    if "mean_logits" in outputs and softcap is None:
        # the mean over the vocabulary of a linear map is one dot product with the mean row
        offset = 0.0 if bias is None else bias.float().mean()
        mean_logits = (hidden.float() @ weight.mean(0, dtype=torch.float32) + offset) * (logit_scale / temperature)
    elif "mean_logits" in outputs:
        mean_logits = by_trl("mean_logits")
    if "is_top1" in outputs:
        # p > 1/2 is certainly the largest; and as the largest is at least exp(-entropy), less than that is not
        is_top1 = logprobs > _LOG_HALF + 1e-3
        undecided = ~is_top1 & (logprobs > -entropy - 1e-3)
        if undecided.any():
            is_top1[undecided] = by_trl("is_top1", undecided)
    return log_sum_sq_probs, mean_logits, is_top1


def _selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
    if index.shape != logits.shape[:-1]:  # K labels per position
        return _originals["selective_log_softmax"](logits, index, temperature, row_mask)
    return token_logprobs(logits, _labels(index, row_mask), temperature=temperature)


def _entropy_from_logits(logits, chunk_size=128):
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return token_logprobs(logits, labels, entropy=True)[1]


def _selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None):
    entropy = True if entropy_requires_grad else "detached"
    return token_logprobs(logits, _labels(index, row_mask), temperature=temperature, entropy=entropy)


def _labels(index: Tensor, row_mask: Tensor | None) -> Tensor:
    return index if row_mask is None else index.masked_fill(row_mask == 0, -100)


def _trl_utils(check: bool = True) -> ModuleType:
    """The module of TRL that holds the functions, checked once for being those that ours were written for."""
    try:
        from trl.trainer import utils
    except ImportError as error:
        raise UserError(f"rlhf_fast.integrations.trl needs TRL: `pip install trl==1.16.0` ({error})") from error
    if not check or _originals:
        return utils
    for name, expected in _SIGNATURES.items():
        function = getattr(utils, name, None)
        if function is None:
            raise UserError(f"this TRL has no {utils.__name__}.{name}; rlhf_fast was written for TRL 1.16")
        check_signature("TRL", name, getattr(function, "forward", function), expected)
    return utils


_IMAGES = ("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles")
_IMAGES += ("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids")


class FusedGRPO:
    """Mixin: ``class FastGRPO(FusedGRPO, GRPOTrainer): pass`` is TRL's trainer on these kernels, without a patch.

    Log-probabilities come from :func:`linear_logprobs` and the loss from :func:`policy_loss`; metrics are TRL's. The
    KL times the ratio, TRL's default with ``beta``, is added in plain PyTorch; ``use_bias_correction_kl=False`` leaves
    one fused loss. What ``policy_loss`` does not know (sapo, vespo, luspo, off-policy masks, entropy terms,
    high-entropy masks, vLLM's importance correction, MoE losses) takes TRL's own loss on the same log-probabilities.

    Raises:
        UserError: on the definition of the class, if this TRL's ``_compute_loss`` has other parameters.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        base = next((b for b in cls.__mro__ if "_compute_loss" in vars(b) and b is not FusedGRPO), None)
        if base is None:
            raise UserError(f"{cls.__name__} needs TRL's GRPOTrainer behind FusedGRPO in its list of bases")
        check_signature("TRL", "GRPOTrainer._compute_loss", base._compute_loss, ("self", "model", "inputs"))
        theirs = tuple(inspect.signature(base._get_per_token_logps_and_entropies).parameters)
        missing = {"compute_entropy", *_IMAGES} - set(theirs)
        if missing:
            raise UserError(f"TRL's _get_per_token_logps_and_entropies takes no {', '.join(sorted(missing))}")

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        with patched(entropy_gradient=self._entropy_bonus_enabled):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model, inputs):
        if not self._has_fused_loss():
            return super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"]
        mask = (mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]).bool()
        logprobs, entropy, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            mask.shape[1],
            compute_entropy=True,
            **{name: inputs.get(name) for name in _IMAGES},
        )
        old, advantages = inputs.get("old_per_token_logps"), inputs["advantages"]
        ref = inputs["ref_per_token_logps"] if self.beta else None
        corrected = self.beta and self.args.use_bias_correction_kl
        aggregate, denominator = self._aggregation(inputs, mask)
        loss, stats = policy_loss(
            logprobs,
            old,
            advantages,
            mask,
            kind="cispo" if self.loss_type == "cispo" else "clip",
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            dual_clip=None if self.loss_type == "cispo" else self.args.delta,
            level=self.importance_sampling_level,
            ref_logprobs=None if corrected else ref,
            kl_coef=0.0 if corrected else self.beta,
            entropy=entropy.detach(),
            aggregate=aggregate,
            denominator=denominator,
        )
        log_ratio = self._log_ratio(logprobs, old, mask)
        if corrected:
            kl = kl_penalty(logprobs, ref, "k3") * log_ratio.exp()
            loss = loss + self.beta * sequence_logprobs(kl, mask, average=aggregate == "sequence").sum() / denominator
            stats["kl"] = sequence_logprobs(kl.detach(), mask).sum() / mask.sum().clamp(min=1)
        self._log_policy_metrics(stats, log_ratio.detach(), advantages, mask)
        return loss

    def log(self, logs, *args, **kwargs):
        """TRL's, after one transfer of all metrics: until here they are scalars on the device, which nobody waits for."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        places = [(values, i) for values in metrics.values() for i, x in enumerate(values) if isinstance(x, Tensor)]
        if places:
            for (values, i), x in zip(places, torch.stack([values[i].float() for values, i in places]).tolist()):
                values[i] = x
        super().log(logs, *args, **kwargs)

    def _has_fused_loss(self) -> bool:
        other_terms = (
            self.off_policy_mask_threshold is not None
            or self.top_entropy_quantile < 1.0
            or self._entropy_bonus_enabled
            or self.aux_loss_enabled
            or (self.use_vllm and self.vllm_importance_sampling_correction)
        )
        # below the upper clip TRL's delta also acts where the advantage is positive
        delta_fits = self.args.delta is None or self.args.delta > 1 + self.epsilon_high
        return not other_terms and delta_fits and self.loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")

    def _aggregation(self, inputs, mask: Tensor) -> tuple[str, Tensor | float]:
        """TRL's normalisers, as the way to sum and what to divide by."""
        training = self.model.training
        steps = self.current_gradient_accumulation_steps if training else 1.0
        if self.loss_type == "grpo":
            return "sequence", len(mask) * steps
        if self.loss_type == "bnpo":
            return "token", mask.sum().clamp(min=1) * steps
        if self.loss_type == "dr_grpo":
            return "constant", len(mask) * self.max_completion_length * steps
        window = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        return "token", window * steps / self.args.steps_per_generation if training else window

    def _log_ratio(self, logprobs: Tensor, old: Tensor | None, mask: Tensor) -> Tensor:
        """log pi / pi_old: of each token, (B, T), or the mean of each sequence, (B, 1)."""
        log_ratio = torch.where(mask, logprobs - (logprobs.detach() if old is None else old), 0.0)
        if self.importance_sampling_level == "token":
            return log_ratio
        return sequence_logprobs(log_ratio, mask, average=True)[:, None]

    def _log_policy_metrics(self, stats, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        count = mask.sum()
        if self.beta:
            metrics["kl"].append(self._over_processes(stats["kl"], count))
        metrics["entropy"].append(self._over_processes(stats["entropy"], count))
        shares, weights = self._clipped(log_ratio, advantages, mask)
        if log_ratio.shape == mask.shape:  # means over tokens, as the loss has made them
            means = {name: (stats[f"clip_{name}"], count) for name in ("low", "high", "region")}
        else:  # a ratio of a sequence counts once, however long it is: the loss counts its tokens
            means = {"low": (shares[0].mean(), weights.sum()), "high": (shares[1].mean(), weights.sum())}
            means["region"] = (means["low"][0] + means["high"][0], weights.sum())
        if self.loss_type == "cispo":
            metrics["cispo_clip_ratio"].append(self._over_processes(*means["high"]))
            return
        for name, (mean, weight) in means.items():
            metrics[f"clip_ratio/{name}_mean"].append(self._over_processes(mean, weight))
        # a sequence without a token has no share: 0 / 0 is NaN, which the extremes leave out, as TRL's do
        low, high = (self.accelerator.gather(share) for share in shares)
        metrics["clip_ratio/low_min"].append(_extreme(low, Tensor.amin, math.inf))
        metrics["clip_ratio/high_max"].append(_extreme(high, Tensor.amax, -math.inf))

    def _clipped(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Shares of each sequence that are clipped from below and above, (B,) each, and how many ratios they are of."""
        ratio = log_ratio.exp()
        weight = mask.float() if ratio.shape == mask.shape else torch.ones_like(ratio)
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        upper = self.epsilon_high if self.loss_type == "cispo" else 1 + self.epsilon_high
        low = ((ratio < 1 - self.epsilon_low) & (advantages < 0)) * weight
        high = ((ratio > upper) & (advantages > 0)) * weight
        return (low.sum(-1) / weight.sum(-1), high.sum(-1) / weight.sum(-1)), weight.sum(-1)

    def _over_processes(self, mean: Tensor, count: Tensor) -> Tensor:
        """The mean over all processes of one over ``count`` here, a scalar on the device."""
        total = torch.stack([mean.float() * count, count.float()])
        total, count = self.accelerator.reduce(total, reduction="sum")
        return total / count.clamp(min=1.0)


def _extreme(x: Tensor, pick, worst: float) -> Tensor:
    """Smallest or largest entry that is not NaN; NaN if all are. Nothing is read back."""
    absent = x.isnan()
    return torch.where(absent.all(), math.nan, pick(torch.where(absent, worst, x)))
