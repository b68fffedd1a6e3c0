"""A two-layer model, a tokenizer of single characters, an engine that says what it is told, and plain log-probabilities."""

from __future__ import annotations

import dataclasses
import itertools
import string
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rlhf_fast.rollout import Sample
from rlhf_fast.run.metrics import read_metrics
from rlhf_fast.trainers import alarms

VOCAB = ["<eos>", "<unk>", *string.ascii_lowercase, *string.digits, *" +=#.-$,"]
TIMES = ("time", "tokens_per_second")  # what no two runs share


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One character, one token."""
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCAB)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def make_model():
    """make_model() -> the same tiny Qwen2 every time, sharp enough that its predictions differ."""

    def make(**config):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
            sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
            tokens = {"vocab_size": len(VOCAB), "eos_token_id": 0, "bos_token_id": None}
            return Qwen2ForCausalLM(Qwen2Config(**{**sizes, **tokens, "tie_word_embeddings": False, **config})).eval()

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def ids(tokenizer):
    """ids(text) -> its tokens; "." stands for <eos> nowhere: write ids("ab", end=True)."""

    def encode(text: str, end: bool = False) -> list[int]:
        return tokenizer(text)["input_ids"] + [0] * end

    return encode


@pytest.fixture
def settings(tmp_path):
    """settings(**more): the arguments of a quiet run that logs every step, each call with a folder of its own."""
    numbers = itertools.count()

    def make(**more):
        common = {"output_dir": str(tmp_path / f"run{next(numbers)}"), "quiet": True, "logging_steps": 1}
        common |= {"learning_rate": 0.1, "lr_scheduler_type": "constant", "gradient_checkpointing": False}
        return {**common, **more}

    return make


@pytest.fixture(autouse=True)
def patient_alarms(monkeypatch):
    """Models this small move by nats in a step at a rate of 0.1, on purpose; ``test_alarms`` has the limits of users."""
    far = {name: dataclasses.replace(alarm, limit=1e9) for name, alarm in alarms.ALARMS.items()}
    monkeypatch.setattr(alarms, "ALARMS", far)


@pytest.fixture
def sgd(monkeypatch):
    """Plain gradient descent in place of AdamW, which turns rounding errors of tiny gradients into whole steps."""
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)


@pytest.fixture
def plain():
    """plain(model, prompt_ids, response_ids) -> (T,) log-probabilities of the response, by transformers alone."""

    def logprobs(model, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0):
        model.set_attn_implementation("eager")
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]

    return logprobs


class Scripted:
    """An engine with an answer ready for each prompt: ``script[text of the prompt]`` is a list of responses.

    A response that ends with "!" is cut there by the length limit, every other one ends with the EOS token.
    """

    capabilities = frozenset({"token_ids", "logprobs", "seed", "n"})

    def __init__(self, tokenizer, script: dict[str, list[str]]):
        self.tokenizer, self.script = tokenizer, script
        self.requests = []

    def generate(self, requests):
        self.requests.append(list(requests))
        return [[self._sample(text) for text in self._texts(r)] for r in requests]

    def _texts(self, request) -> list[str]:
        texts = self.script[self.tokenizer.decode(request.prompt_ids)]
        return list(itertools.islice(itertools.cycle(texts), request.n))

    def _sample(self, text: str) -> Sample:
        tokens = self.tokenizer(text.rstrip("!"))["input_ids"]
        tokens += [] if text.endswith("!") else [0]
        return Sample(tokens, [-1.0] * len(tokens), "length" if text.endswith("!") else "stop")

    def update(self, adapter_dir, version):
        pass

    def reset_cache(self):
        pass

    def sleep(self):
        pass

    def wake(self):
        pass


@pytest.fixture
def scripted(tokenizer):
    return lambda script: Scripted(tokenizer, script)


@pytest.fixture
def run():
    """run(trainer, **of train) -> what it logged, weights at the end; ``steps`` are the lines of metrics.jsonl."""

    def train(trainer, **how):
        trainer.train(**how)
        lines = read_metrics(trainer.args.output_dir)
        steps = [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]
        weights = {n: p.detach().clone() for n, p in trainer.policy.named_parameters() if p.requires_grad}
        return SimpleNamespace(steps=steps, losses=[s["loss"] for s in steps if "loss" in s], weights=weights)

    return train
