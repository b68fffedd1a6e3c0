"""Small real tokenizers, trained here: nothing is downloaded."""

import copy

import pytest
from tokenizers import processors

from rlhf_fast.models.scratch import train_tokenizer

# a few sentences, repeated so that words become single tokens and merges cross no space
TEXTS = [
    "The apple and the apples are ready. What is the sum? The answer is ready.",
    "Human and assistant talk about apples, sums and answers. yes no maybe",
    "12+34=46 the apple costs 7 coins, the apples cost 21 coins.",
] * 20


@pytest.fixture(scope="session")
def _trained():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture
def tokenizer(_trained):
    """ChatML with assistant markers, eos <|im_end|>, no bos. A copy: tests change it."""
    return copy.deepcopy(_trained)


@pytest.fixture
def bos_tokenizer(tokenizer):
    """Puts <s> before every text, as Llama's does."""
    return wrapping(tokenizer, "<s> $A")


@pytest.fixture
def bos_eos_tokenizer(tokenizer):
    """Puts <s> before and <|im_end|> after every text."""
    return wrapping(tokenizer, "<s> $A <|im_end|>")


def wrapping(tokenizer, pieces):
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|im_end|>") if token in pieces]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=special)
    return tokenizer
