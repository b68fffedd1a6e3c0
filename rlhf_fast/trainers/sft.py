"""Supervised fine-tuning: maximise the likelihood of given responses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_fast.data.batch import Example, TokenBatch
from rlhf_fast.data.packing import pack_bins
from rlhf_fast.data.prepare import Report, prepare_sft
from rlhf_fast.models.noise import embedding_noise

from .config import TrainerConfig, above, one_of
from .trainer import Trainer, Window


@dataclass(kw_only=True)
class SFTConfig(TrainerConfig):
    output_dir: str = "runs/sft"  # the run folder: model, checkpoints, metrics, plots
    max_length: int = 1024  # tokens; longer rows are cut, and how many is reported
    packing: bool = True  # fill rows of max_length tokens with whole examples; attention never crosses them
    completion_only_loss: bool = True  # train on completions, not on prompts
    assistant_only_loss: bool = True  # in conversations, train on the assistant's turns only
    loss_type: str = "nll"  # nll; dft weighs each token by its own probability, so that unlikely ones teach less
    neftune_noise_alpha: float | None = None  # noise on the embeddings in training; its authors use 5 to 15
    allow_truncation: bool = False  # go on when more than 1% of the rows are cut

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss_type", self.loss_type, ("nll", "dft"))
        above(self, 0, "neftune_noise_alpha")


class SFTTrainer(Trainer):
    """Supervised fine-tuning on ``text``, ``messages`` or ``prompt`` + ``completion`` records."""

    config_class = SFTConfig
    headline = ("loss", "mean_token_accuracy")
    learning_rates = (2e-5, 2e-4)
    keep_dropout = True

    @classmethod
    def tokenize(cls, records, tokenizer, args: SFTConfig, **options) -> tuple[list[Example], Report]:
        return prepare_sft(
            records,
            tokenizer,
            max_length=args.max_length,
            completion_only=args.completion_only_loss,
            assistant_only=args.assistant_only_loss,
            allow_truncation=args.allow_truncation,
            **options,
        )

    def arrange(self, examples: list[Example]) -> list[list[Example]]:
        a = self.args
        if not a.packing:
            return [[e] for e in examples]
        bins = pack_bins([len(e) for e in examples], a.max_length, seed=a.seed)
        return [[examples[i] for i in row] for row in bins]

    def size(self, record: list[Example]) -> float:
        return sum(e.weight * sum(e.response_mask[1:]) for e in record)

    def examples(self, record: list[Example]) -> list[Example]:
        return record

    def losses(self, records: list[list[Example]], window: Window) -> Iterator[tuple[Tensor, dict, float]]:
        batch = self.pack([e for row in records for e in row])
        logging = self.logs_this_step or not torch.is_grad_enabled()
        with self._noise(batch):
            logprobs, entropy, *hits = self.model(batch, entropy="detached", greedy_hits=logging)
        if self.args.loss_type == "dft":  # arXiv:2508.05629, eq. 9
            logprobs = logprobs * logprobs.detach().exp()
        weighted = logprobs if batch.weights is None else logprobs * batch.weights
        tokens = batch.num_response_tokens  # never 0: rows without one are dropped
        metrics = {"entropy": entropy.sum() / tokens}
        if logging:  # costs one more product with the head
            metrics["mean_token_accuracy"] = hits[0] / tokens
        yield -weighted.sum() / window.tokens, metrics, tokens

    def _noise(self, batch: TokenBatch) -> contextlib.AbstractContextManager:
        alpha = self.args.neftune_noise_alpha
        if alpha is None or not self.policy.training:
            return contextlib.nullcontext()
        return embedding_noise(self.policy.model.get_input_embeddings(), batch, alpha)
