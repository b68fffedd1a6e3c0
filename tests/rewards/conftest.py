"""A tokenizer of single characters, a tiny reward model, and a sandbox."""

from __future__ import annotations

import string

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rlhf_fast.errors import UserError
from rlhf_fast.models import load
from rlhf_fast.rewards.sandbox import Bwrap, Limits, check_sandbox

VOCAB = ["<eos>", "<unk>", *string.ascii_lowercase, *string.digits, *" +=#.-$,"]


def character_tokenizer(vocab: list[str]) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocab)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def sandbox():
    """A sandbox that withstands its own test, or a skip with the reason why there is none."""
    try:
        found = Bwrap()
        check_sandbox(found, Limits())
    except UserError as error:
        pytest.skip(str(error))
    return found


@pytest.fixture(scope="session")
def tokenizer():
    return character_tokenizer(VOCAB)


@pytest.fixture(scope="session")
def other_tokenizer():
    """The same characters under other ids."""
    return character_tokenizer([*VOCAB[:2], *reversed(VOCAB[2:])])


@pytest.fixture
def make_policy(tokenizer):
    """make_policy(role="policy", tokenizer=...) -> Policy, the same weights every time."""

    def make(role: str = "policy", tokenizer=tokenizer):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = Qwen2Config(
                vocab_size=len(VOCAB), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, eos_token_id=0, bos_token_id=None,
            )  # fmt: skip
            policy = load(Qwen2ForCausalLM(config), tokenizer=tokenizer, device="cpu", role=role)
            if role == "reward":
                policy.add_head("reward")
                torch.nn.init.normal_(next(policy.heads["reward"].parameters()))
            return policy

    return make
