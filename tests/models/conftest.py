"""A two-layer Qwen2 with grouped queries and a word-level tokenizer: the smallest model with every part that matters."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rlhf_fast.data.batch import Example

VOCAB = 64


@pytest.fixture
def tokenizer():
    vocab = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture
def examples():
    """Ragged on purpose: lengths 7, 12, 3 span three buckets, one has no prompt, one is a single token."""
    torch.manual_seed(1)
    shapes = [(7, 3), (12, 5), (3, 1), (9, 0), (1, 0)]
    return [
        Example(torch.randint(2, VOCAB, (length,)).tolist(), [False] * prompt + [True] * (length - prompt))
        for length, prompt in shapes
    ]
