"""Small real tokenizers, trained here: nothing is downloaded."""

import copy

import pytest

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
    """Puts <s> before every text, as Llama's does; its chat template writes <s> itself."""
    return with_bos(tokenizer)


def with_bos(tokenizer, also_eos=False):
    from tokenizers import processors

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    pieces, ids = "<s> $A", [("<s>", bos)]
    if also_eos:
        pieces, ids = pieces + " <|im_end|>", [*ids, ("<|im_end|>", eos)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=ids)
    return tokenizer
