"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) and its relatives, with and without a reference."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.batch import Example, Preference, TokenBatch
from rlhf_fast.data.prepare import Report, prepare_preferences
from rlhf_fast.data.sources import BadRow
from rlhf_fast.errors import UserError
from rlhf_fast.losses.preference import PAIRED, Coefficients, Pairs, Row, check, length_discount, on_policy_weights

from .config import TrainerConfig, one_of
from .figures import implicit_rewards, preference_figures
from .reference import precomputed, response_logprobs
from .trainer import Trainer, Window


@dataclass(kw_only=True)
class DPOConfig(TrainerConfig):
    output_dir: str = "runs/dpo"  # the run folder: model, checkpoints, metrics, plots
    max_length: int = 1024  # tokens of prompt and response; longer rows are cut, and how many is reported
    beta: float = 0.1  # how dearly leaving the reference is paid; without one the scale of the margin: simpo wants 2
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])  # of losses/preference.py; several are summed
    loss_weights: list[float] | None = None  # one per loss_type; None weighs them all 1
    ld_alpha: float | None = None  # weight of tokens beyond the shorter response's length, 0 to 1 (LD-DPO); none: 1
    use_weighting: bool = False  # pairs weigh as much as the policy itself would write them (WPO, arXiv:2406.11827)
    label_smoothing: float = 0.0  # assumed share of swapped labels
    f_divergence_type: str = "reverse_kl"  # to the reference: reverse_kl, forward_kl, js_divergence, alpha_divergence
    f_alpha_divergence_coef: float = 0.5  # alpha of alpha_divergence; 1 is the reverse KL
    discopop_tau: float = 0.05  # discopop: temperature of its switch between two losses
    simpo_gamma: float = 0.5  # simpo: margin by which chosen should win, in units of beta * log-probability per token
    cpo_alpha: float = 1.0  # cpo: weight of the chosen response's likelihood
    precompute_ref_log_probs: bool = False  # one reference pass over the data, kept on disk, instead of one per step
    allow_truncation: bool = False  # go on when more than 1% of the rows are cut

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        if not self.loss_type:
            raise UserError(f"loss_type is empty; name at least one of {', '.join(PAIRED)}")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise UserError(
                f"loss_weights has {len(self.loss_weights)} entries for {len(self.loss_type)} loss_type; give one each"
            )
        for kind in self.loss_type:
            one_of("loss_type", kind, PAIRED)
        try:
            check(self.loss_type, self.coefficients)
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.ld_alpha is not None:
            if not 0 <= self.ld_alpha <= 1:
                raise UserError(f"ld_alpha is {self.ld_alpha}; it is a weight from 0 to 1, or unset")
            for kind in self.loss_type:
                if not self.needs_reference or not (PAIRED[kind].reference or kind == "sft"):
                    raise UserError(f"ld_alpha weighs the log-ratios to a reference; loss_type {kind} has none")
        for kind in self.loss_type if self.use_weighting else ():
            if PAIRED[kind].coupled or kind == "sft":
                raise UserError(f"use_weighting weighs comparisons of a pair, and loss_type {kind} is none")
        if self.precompute_ref_log_probs and not self.needs_reference:
            raise UserError(f"precompute_ref_log_probs: loss_type {', '.join(self.loss_type)} needs no reference")

    @property
    def needs_reference(self) -> bool:
        return any(PAIRED[kind].reference for kind in self.loss_type)

    @property
    def coefficients(self) -> Coefficients:
        return Coefficients(*(getattr(self, name) for name in Coefficients._fields))


class DPOTrainer(Trainer):
    """Learn from pairs without a reward model: raise the chosen response's odds against the reference's."""

    config_class = DPOConfig
    method = "dpo"
    headline = ("loss", "rewards/accuracies", "rewards/margins")
    learning_rates = (1e-6, 5e-6)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # sum and count of the implicit rewards of all finished steps, and of this one
        self.rewards = self.step_rewards = torch.zeros(2, dtype=torch.float64)

    @functools.cached_property
    def terms(self) -> list[tuple[Row, float]]:
        """The losses that are summed, each with its weight."""
        a = self.args
        return list(zip((PAIRED[kind] for kind in a.loss_type), a.loss_weights or [1.0] * len(a.loss_type)))

    def any_is(self, what: str) -> bool:
        """Whether any of the losses is ``what``: coupled, centred."""
        return any(getattr(row, what) for row, _ in self.terms)

    def add_roles(self) -> None:
        if self.args.needs_reference:
            self.policy.add_reference()
        self.say(f"reference: {self.policy.reference if self.args.needs_reference else 'none, the loss needs none'}")

    @classmethod
    def tokenize(cls, records, tokenizer, args: DPOConfig, **options) -> tuple[list[Preference], Report]:
        coupled = any(PAIRED[kind].coupled for kind in args.loss_type)

        def check(row: dict) -> None:
            if (count := len(row["responses"])) != 2:
                raise BadRow(
                    "not a pair", f"`responses` has {count} of them, and DPO compares two: a chosen, a rejected."
                )
            if coupled and (weight := row.get("weight", 1.0)) != 1.0:
                raise BadRow(
                    "weighted pair", f"`weight` is {weight}, but loss_type aot sorts pairs and has no weights."
                )

        limits = {"max_length": args.max_length, "allow_truncation": args.allow_truncation}
        return prepare_preferences(records, tokenizer, check=check, **limits, **options)

    def complete_data(self, records: list[Preference]) -> list[Preference]:
        if not self.args.precompute_ref_log_probs:
            return records
        return [replace(r, ref_logprobs=sums) for r, sums in zip(records, precomputed(self, records))]

    def size(self, record: Preference) -> float:
        return sum(sum(e.response_mask) for e in record.responses)

    def counts(self, records: list[Preference]) -> tuple[float, ...]:
        chosen = sum(r.weight * sum(r.responses[0].response_mask) for r in records)
        return sum(r.weight for r in records), sum(map(self.size, records)), chosen

    def examples(self, record: Preference) -> list[Example]:
        return record.responses

    def collect(self, records: list[Preference]) -> list[Preference]:
        """With what is fixed for a step. Copies: kept beside the data it would be of another epoch's micro-batches."""
        self.step_rewards = torch.zeros_like(self.rewards, device=self.policy.device)
        if self.args.needs_reference and not self.args.precompute_ref_log_probs:
            sums = response_logprobs(self, records)
            records = [replace(r, ref_logprobs=s) for r, s in zip(records, sums)]
        return self._couple(records) if self.any_is("coupled") else records

    def _couple(self, records: list[Preference]) -> list[Preference]:
        """Losses of pairs that are sorted among all of the step's: each pair's part, and its slopes in the two sums.

        One more pass without a gradient over the step, so that no split into micro-batches or ranks changes the loss.
        """
        policy = response_logprobs(self, records, role=self.policy.role)
        table = torch.tensor(self.ranks.gather([[*sums, *r.ref_logprobs] for sums, r in zip(policy, records)]))
        sums = table[:, :2].requires_grad_()
        ones = torch.ones(len(table))
        with torch.enable_grad():  # in an evaluation too
            pairs = Pairs(*sums.unbind(1), *table[:, 2:].unbind(1), ones, ones, nll=ones)
            total = sum(w * row.formula(pairs, self.args.coefficients).sum() for row, w in self.terms if row.coupled)
            (slopes,) = torch.autograd.grad(total, sums)
        part, first = float(total.detach()) / len(table), sum(self.ranks.gather([len(records)])[: self.ranks.index])
        return [replace(r, coupling=[part, *s]) for r, s in zip(records, slopes[first:].tolist())]

    def losses(self, records: list[Preference], window: Window) -> Iterator[tuple[Tensor, dict, float]]:
        batch = self.pack([e for r in records for e in r.responses])
        weighs = self.args.use_weighting
        passes = self.model(batch, sharpened=weighs)
        logprobs = passes[0] if weighs else passes
        sums = self.response_sums(logprobs, batch).view(-1, 2)
        plain = super().response_sums(logprobs, batch).view(-1, 2)
        pairs, weights = self._pairs(sums, plain, records, window), sums.new_tensor([r.weight for r in records])
        if weighs:
            sharpened = super().response_sums(passes[1], batch).view(-1, 2)
            weights = weights * on_policy_weights(
                plain, sharpened, torch.stack([pairs.chosen_tokens, pairs.rejected_tokens], 1)
            )
        total = sums.new_zeros(())
        for row, weight in self.terms:
            if not row.coupled:
                total = total + weight * (weights * row.formula(pairs, self.args.coefficients)).sum()
        if records[0].coupling is not None:
            coupling = sums.new_tensor([r.coupling for r in records])
            total = total + coupling[:, 0].sum() + (coupling[:, 1:] * (sums - sums.detach())).sum()
        if torch.is_grad_enabled() and self.any_is("centred"):
            # stays on the device until the step is over: a micro-step waits for nothing
            rewards = torch.cat(implicit_rewards(pairs, self.args.beta)).double()
            self.step_rewards = self.step_rewards + torch.stack([rewards.sum(), rewards.new_full((), len(rewards))])
        yield total / window.records, preference_figures(pairs, self.args.beta), len(records)

    def response_sums(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        if self.args.ld_alpha is not None:
            logprobs = logprobs * length_discount(batch.response_mask, batch.cu_seqlens, self.args.ld_alpha)
        return super().response_sums(logprobs, batch)

    def _pairs(self, sums: Tensor, plain: Tensor, records: list[Preference], window: Window) -> Pairs:
        reference: list[Any] = [None, None]
        if self.args.needs_reference:
            reference = sums.new_tensor([r.ref_logprobs for r in records]).unbind(1)
        tokens = sums.new_tensor([[sum(e.response_mask) for e in r.responses] for r in records]).unbind(1)
        nll = -plain[:, 0] * window.records / window.chosen_tokens
        shift = float(self.rewards[0] / self.rewards[1].clamp(min=1))
        return Pairs(*sums.unbind(1), *reference, *tokens, nll=nll, shift=shift)

    def after_step(self) -> None:
        if self.any_is("centred"):
            self.rewards = self.rewards + torch.tensor(self.ranks.sum(*self.step_rewards.tolist()), dtype=torch.float64)

    def extra_state(self) -> dict[str, Any]:
        return {"rewards": self.rewards}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.rewards = state["rewards"]
