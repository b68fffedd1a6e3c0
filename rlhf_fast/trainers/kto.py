"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306): responses that were found good or bad, no pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf_fast.data.batch import Example, Labelled
from rlhf_fast.data.prepare import Report, prepare_labelled
from rlhf_fast.losses.preference import UNPAIRED

from .config import TrainerConfig, above, at_least, one_of
from .reference import precomputed, response_logprobs
from .trainer import Trainer, Window


@dataclass(kw_only=True)
class KTOConfig(TrainerConfig):
    output_dir: str = "runs/kto"  # the run folder: model, checkpoints, metrics, plots
    max_length: int = 1024  # tokens of prompt and response; longer rows are cut, and how many is reported
    beta: float = 0.1  # how dearly leaving the reference is paid
    loss_type: str = "kto"  # kto, or apo_zero_unpaired, which needs no estimate of the KL
    desirable_weight: float = 1.0  # of good responses in the loss; raise the rarer kind's
    undesirable_weight: float = 1.0  # of bad responses in the loss
    precompute_ref_log_probs: bool = False  # one reference pass over the data, kept on disk, instead of one per step
    allow_truncation: bool = False  # go on when more than 1% of the rows are cut

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss_type", self.loss_type, UNPAIRED)
        above(self, 0, "beta")
        at_least(self, 0, "desirable_weight", "undesirable_weight")

    @property
    def needs_reference(self) -> bool:
        return True


class KTOTrainer(Trainer):
    """Raise what was found good and lower what was found bad, each judged against the policy's drift as a whole.

    That drift, KL(policy || reference), is estimated once per step and over all of it, on prompts with another prompt's
    response: no split into micro-batches changes the loss.
    """

    config_class = KTOConfig
    method = "kto"
    headline = ("loss", "rewards/chosen", "rewards/rejected")
    learning_rates = (1e-6, 5e-6)

    def add_roles(self) -> None:
        self.policy.add_reference()
        self.say(f"reference: {self.policy.reference}")

    @property
    def needs_kl(self) -> bool:
        return UNPAIRED[self.args.loss_type].needs_kl

    @classmethod
    def tokenize(cls, records, tokenizer, args: KTOConfig, **options) -> tuple[list[Labelled], Report]:
        limits = {"max_length": args.max_length, "allow_truncation": args.allow_truncation}
        rows, report = prepare_labelled(records, tokenizer, **limits, **options)
        good = sum(r.label for r in rows)
        report.audit.insert(0, f"{report.name}: {good:,} desirable, {len(rows) - good:,} undesirable")
        return rows, report

    def complete_data(self, records: list[Labelled]) -> list[Labelled]:
        return self._with_reference(records, precomputed) if self.args.precompute_ref_log_probs else records

    def _with_reference(self, records: Sequence[Labelled], logprobs: Callable) -> list[Labelled]:
        """With the reference's log-probabilities of each response, and of the one it is mismatched with."""
        own = logprobs(self, records)
        other = logprobs(self, _mismatched(records)) if self.needs_kl else own
        return [replace(r, ref_logprobs=[*x, *y]) for r, x, y in zip(records, own, other)]

    def size(self, record: Labelled) -> float:
        return sum(record.example.response_mask)

    def counts(self, records: list[Labelled]) -> tuple[float, ...]:
        return sum(r.example.weight for r in records), sum(map(self.size, records))

    def examples(self, record: Labelled) -> list[Example]:
        return [record.example]

    def collect(self, records: Sequence[Labelled]) -> list[Labelled]:
        """With the reference's log-probabilities, and the KL of the step."""
        if not self.args.precompute_ref_log_probs:
            records = self._with_reference(records, response_logprobs)
        if not self.needs_kl:
            return list(records)
        policy = response_logprobs(self, _mismatched(records), role=self.policy.role)
        ratios = [now - r.ref_logprobs[1] for (now,), r in zip(policy, records)]
        total, count = self.ranks.sum(sum(ratios), len(ratios))
        return [replace(r, kl=max(total / count, 0.0)) for r in records]

    def losses(self, records: list[Labelled], window: Window) -> Iterator[tuple[Tensor, dict, float]]:
        a = self.args
        batch = self.pack([r.example for r in records])
        sums = self.response_sums(self.model(batch), batch)
        ratios = sums - sums.new_tensor([r.ref_logprobs[0] for r in records])
        good = torch.tensor([r.label for r in records], device=sums.device)
        losses = UNPAIRED[a.loss_type].formula(ratios, good, records[0].kl, a.beta)
        weights = torch.where(good, a.desirable_weight, a.undesirable_weight)
        weights = weights * sums.new_tensor([r.example.weight for r in records])
        figures: dict = {"kl": records[0].kl} if self.needs_kl else {}
        number = sum(r.label for r in records)
        for name, which, count in (("chosen", good, number), ("rejected", ~good, len(records) - number)):
            for what, values in (("rewards", a.beta * ratios), ("logps", sums)):
                figures[f"{what}/{name}"] = (values.detach() * which).sum() / max(count, 1), count
        yield (weights * losses).sum() / window.records, figures, len(records)


def _mismatched(records: Sequence[Labelled]) -> list[Labelled]:
    return [replace(r, example=r.mismatched) for r in records]
