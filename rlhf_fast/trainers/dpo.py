"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) and its relatives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf_fast.data.batch import Preference, TokenBatch
from rlhf_fast.data.prepare import prepare_preferences
from rlhf_fast.errors import UserError
from rlhf_fast.kernels import dpo_loss, sequence_logprobs

from .config import TrainerConfig
from .trainer import Trainer, Window

AVERAGED = {"ipo"}  # losses on log-probabilities per token, not per response


@dataclass(kw_only=True)
class DPOConfig(TrainerConfig):
    output_dir: str = "runs/dpo"  # the run folder: model, checkpoints, metrics, plots
    max_length: int = 1024  # tokens of prompt and response; longer rows are cut, and how many is reported
    beta: float = 0.1  # how dearly leaving the reference is paid
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])  # sigmoid, ipo, hinge, robust; several are mixed
    loss_weights: list[float] | None = None  # one per loss_type; None weighs them all 1
    label_smoothing: float = 0.0  # assumed share of swapped labels
    precompute_ref_log_probs: bool = False  # one reference pass over the data before training instead of one per step
    allow_truncation: bool = False  # go on when more than 1% of the rows are cut


class DPOTrainer(Trainer):
    """Learn from pairs without a reward model: raise the chosen response's odds against the reference's."""

    config_class = DPOConfig
    headline = ("loss", "rewards/accuracies", "rewards/margins")
    learning_rates = (1e-6, 5e-6)

    def add_roles(self) -> None:
        a = self.args
        a.loss_type = [a.loss_type] if isinstance(a.loss_type, str) else a.loss_type
        if a.loss_weights is not None and len(a.loss_weights) != len(a.loss_type):
            raise UserError(
                f"loss_weights has {len(a.loss_weights)} entries for {len(a.loss_type)} loss_type; give one each"
            )
        if len({kind in AVERAGED for kind in a.loss_type}) > 1:
            raise UserError("ipo works on averaged log-probabilities and cannot be mixed with the others")
        self.policy.add_reference()

    def prepare_data(self, records) -> list[Preference]:
        a = self.args
        preferences, report = prepare_preferences(
            records, self.tokenizer, max_length=a.max_length, allow_truncation=a.allow_truncation, **self.tokenizing
        )
        self.say(report)
        for row, preference in enumerate(preferences):
            if len(preference.responses) != 2:
                raise UserError(
                    f"row {row}: DPO needs a chosen and a rejected response, got {len(preference.responses)}"
                )
        if a.precompute_ref_log_probs:
            size = a.per_device_train_batch_size
            for start in range(0, len(preferences), size):
                self.collect(preferences[start : start + size])
        return preferences

    def size(self, record: Preference) -> float:
        return sum(sum(e.response_mask) for e in record.responses)

    @torch.no_grad()
    def collect(self, records: list[Preference]) -> list[Preference]:
        """Fill in the reference's log-probabilities where they are not known yet."""
        size = self.args.per_device_train_batch_size
        missing = [r for r in records if r.ref_logprobs is None]
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            batch = TokenBatch.pack([e for r in part for e in r.responses], self.policy.device)
            sums = self._sequence_logprobs(batch, self.policy.logprobs(batch, role="reference"))
            for record, pair in zip(part, sums.view(-1, 2).tolist()):
                record.ref_logprobs = pair
        return records

    def losses(self, records: list[Preference], window: Window) -> Iterator[tuple[Tensor, dict, float]]:
        a = self.args
        batch = TokenBatch.pack([e for r in records for e in r.responses], self.policy.device)
        chosen, rejected = self._sequence_logprobs(batch, self.model(batch)).view(-1, 2).unbind(1)
        ref_chosen, ref_rejected = torch.tensor([r.ref_logprobs for r in records], device=chosen.device).unbind(1)
        total = 0.0
        for kind, weight in zip(a.loss_type, a.loss_weights or [1.0] * len(a.loss_type)):
            losses, chosen_rewards, rejected_rewards = dpo_loss(
                chosen, rejected, ref_chosen, ref_rejected, beta=a.beta, kind=kind, label_smoothing=a.label_smoothing
            )
            total = total + weight * losses.sum()
        metrics = {
            "rewards/chosen": chosen_rewards.mean(),
            "rewards/rejected": rejected_rewards.mean(),
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float().mean(),
            "rewards/margins": (chosen_rewards - rejected_rewards).mean(),
            "logps/chosen": chosen.detach().mean(),
            "logps/rejected": rejected.detach().mean(),
        }
        yield total / window.records, metrics, len(records)

    def _sequence_logprobs(self, batch: TokenBatch, logprobs: Tensor) -> Tensor:
        average = self.args.loss_type[0] in AVERAGED
        return sequence_logprobs(logprobs, batch.response_mask, average=average, cu_seqlens=batch.cu_seqlens)
