"""A trained reward model as a reward function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.data.batch import Example, TokenBatch
from rlhf_fast.data.templates import encode_prompt, encode_prompt_completion
from rlhf_fast.errors import UserError
from rlhf_fast.models import Policy, attach, load
from rlhf_fast.rewards.verifiers import text_of

KINDS = ("reward", "cost")  # what a model may be trained to score: good, or harm


class RewardModel:
    """Score prompt and completion with a reward model's scalar head, read at the last token.

    Token ids are scored as they were sampled, never tokenized again, provided that this model's tokenizer reads the
    completions' text from them; a model with another tokenizer gets the text in its own.

    Args:
        path: a folder of a reward model, or a Policy that has the role.
        role: the role that scores; that which the model was trained for when None.
        max_tokens: most tokens in one pass.
        disagreement_penalty: an ensemble's score is the mean over its heads less so many times their standard deviation:
            responses unlike the training data, on which heads part, earn less (Coste et al. 2023, arXiv:2310.02743). A
            cost gets it added.
    Raises:
        UserError: the model has no scalar head for the role, or a penalty on disagreement and only one head.
    """

    def __init__(
        self, path: Any, *, role: str | None = None, max_tokens: int = 16384, disagreement_penalty: float = 0.0
    ) -> None:
        self.policy = load(path)
        role = role or (self.policy.role if self.policy.role in KINDS else "reward")
        self.role, self.max_tokens, self.disagreement_penalty = role, max_tokens, disagreement_penalty
        self.stds: list[float] = []  # of the last call's completions: standard deviation over an ensemble's heads
        self.__name__ = Path(path).resolve().name if isinstance(path, (str, Path)) else role
        if role not in self.policy.heads:
            raise UserError(
                f"{self.__name__}: not a reward model (it has no '{role}' head). Train one with `rlhf-fast reward`."
            )

        if disagreement_penalty and self.num_heads == 1:
            raise UserError(
                f"{self.__name__}: disagreement_penalty needs a reward model of several heads; train one with num_heads"
            )

    @property
    def kind(self) -> str:
        """``cost`` when high scores are bad, else ``reward``."""
        return "cost" if self.role.startswith("cost") else "reward"

    def place_beside(self, policy: Policy) -> str:
        """Where it runs, in words."""
        return "an adapter on the policy's base" if self.policy is policy else "a model of its own in memory"

    @property
    def num_heads(self) -> int:
        """Heads of the ensemble; 1 is a plain reward model."""
        return self.policy.heads[self.role].count

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        prompt_ids: Sequence[Sequence[int]] | None = None,
        **_: Any,
    ) -> list[float]:
        """Scores of B completions. ``prompt_ids`` are the prompts as they were generated from."""
        examples = self._examples(prompts, completions, completion_ids, prompt_ids)
        scores = torch.empty(len(examples), self.num_heads)
        training = self.policy.training
        self.policy.eval()
        try:
            with torch.no_grad():
                for rows in self._batches(examples):
                    batch = TokenBatch.pack([examples[i] for i in rows], self.policy.device)
                    scores[rows] = self.policy.head_scores(batch, role=self.role).cpu()
        finally:
            self.policy.train(training)
        stds = scores.std(1, correction=0)
        self.stds = stds.tolist()
        worse = self.disagreement_penalty * stds
        return (scores.mean(1) + worse if self.kind == "cost" else scores.mean(1) - worse).tolist()

    def _examples(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        prompt_ids: Sequence[Sequence[int]] | None,
    ) -> list[Example]:
        tokenizer = self.policy.tokenizer
        read = tokenizer.batch_decode(
            list(completion_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if read != [text_of(c) for c in completions]:  # the ids are another tokenizer's
            return [encode_prompt_completion(p, c, tokenizer) for p, c in zip(prompts, completions)]
        if prompt_ids is None:
            prompt_ids = [encode_prompt(p, tokenizer) for p in prompts]
        return [Example([*p, *c], [False] * len(p) + [True] * len(c)) for p, c in zip(prompt_ids, completion_ids)]

    def _batches(self, examples: list[Example]) -> Iterator[list[int]]:
        """Indices of examples that fit ``max_tokens`` together, in order: responses to one prompt are neighbours."""
        rows: list[int] = []
        tokens = 0
        for i in range(len(examples)):
            if rows and tokens + len(examples[i]) > self.max_tokens:
                yield rows
                rows, tokens = [], 0
            rows.append(i)
            tokens += len(examples[i])
        if rows:
            yield rows


def attach_reward_models(
    policy: Policy, folders: str | Sequence[str], kind: str = "reward", disagreement_penalty: float = 0.0
) -> list[RewardModel]:
    """The reward models (or, as ``kind`` says, cost models) in ``folders``, each as an adapter on the base of ``policy``
    where it can be.

    Raises:
        UserError: a folder holds no such model, or one of one head where disagreement is to cost something.
    """
    models = []
    for number, folder in enumerate([folders] if isinstance(folders, str) else folders, start=1):
        name = kind if number == 1 else f"{kind}_{number}"
        judge = attach(policy, kind, folder, name)
        role = name if judge is policy else kind
        models.append(RewardModel(judge, role=role, disagreement_penalty=disagreement_penalty))
        models[-1].__name__ = name.replace(kind, f"{kind}_model")  # in the metrics
    return models
