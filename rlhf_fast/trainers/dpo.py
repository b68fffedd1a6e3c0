"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) and its relatives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rlhf_fast.data.batch import Example, Preference, TokenBatch
from rlhf_fast.data.prepare import prepare_preferences
from rlhf_fast.errors import UserError
from rlhf_fast.kernels import dpo_loss, sequence_logprobs
from rlhf_fast.kernels.preference import KINDS

from .config import TrainerConfig, one_of
from .trainer import Trainer, Window

AVERAGED = {"ipo"}  # losses on log-probabilities per token, not per response


@dataclass(kw_only=True)
class DPOConfig(TrainerConfig):
    output_dir: str = "runs/dpo"  # the run folder: model, checkpoints, metrics, plots
    max_length: int = 1024  # tokens of prompt and response; longer rows are cut, and how many is reported
    beta: float = 0.1  # how dearly leaving the reference is paid
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])  # ipo, hinge, robust, ...; several are summed
    loss_weights: list[float] | None = None  # one per loss_type; None weighs them all 1
    label_smoothing: float = 0.0  # assumed share of swapped labels
    precompute_ref_log_probs: bool = False  # one reference pass over the data before training instead of one per step
    allow_truncation: bool = False  # go on when more than 1% of the rows are cut

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loss_type = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise UserError(
                f"loss_weights has {len(self.loss_weights)} entries for {len(self.loss_type)} loss_type; give one each"
            )
        if len({kind in AVERAGED for kind in self.loss_type}) != 1:
            raise UserError(
                f"loss_type is {self.loss_type}; name at least one, and ipo only alone: it averages over tokens"
            )
        nothing = torch.zeros(1)
        for kind in self.loss_type:
            one_of("loss_type", kind, KINDS)
            try:
                dpo_loss(*[nothing] * 4, beta=self.beta, kind=kind, label_smoothing=self.label_smoothing)
            except ValueError as error:
                raise UserError(f"loss_type {kind}: {error}") from error


class DPOTrainer(Trainer):
    """Learn from pairs without a reward model: raise the chosen response's odds against the reference's."""

    config_class = DPOConfig
    method = "dpo"
    headline = ("loss", "rewards/accuracies", "rewards/margins")
    learning_rates = (1e-6, 5e-6)

    def add_roles(self) -> None:
        self.policy.add_reference()
        self.say(f"reference: {self.policy.reference}")

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
        return self._with_reference(preferences) if a.precompute_ref_log_probs else preferences

    def size(self, record: Preference) -> float:
        return sum(sum(e.response_mask) for e in record.responses)

    def examples(self, record: Preference) -> list[Example]:
        return record.responses

    def collect(self, records: list[Preference]) -> list[Preference]:
        """With the reference's log-probabilities. In the micro-batches that are trained: before the first step both
        models then agree to the last bit."""
        return records if self.args.precompute_ref_log_probs else self._with_reference(records)

    @torch.no_grad()
    def _with_reference(self, records: list[Preference]) -> list[Preference]:
        filled = list(records)
        for part in self.split(records):
            batch = self.pack([e for i in part for e in records[i].responses])
            sums = self._sequence_logprobs(batch, self.policy.logprobs(batch, role="reference"))
            # copies: kept beside the data, they would be of the first epoch's micro-batches, and lost in a checkpoint
            for i, pair in zip(part, sums.view(-1, 2).tolist()):
                filled[i] = replace(records[i], ref_logprobs=pair)
        return filled

    def losses(self, records: list[Preference], window: Window) -> Iterator[tuple[Tensor, dict, float]]:
        a = self.args
        batch = self.pack([e for r in records for e in r.responses])
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
