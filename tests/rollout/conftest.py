"""A tokenizer of single characters and tiny random models, sharp enough that greedy and sampled tokens mean something."""

from __future__ import annotations

import string

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf_fast.models import load

VOCAB = ["<eos>", "<end>", "<unk>", *string.ascii_lowercase, *string.digits, *" +=#.-$,"]  # 47 tokens
SHAPE = {"vocab_size": len(VOCAB), "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 0}
BODY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One character, one token; the padding token is the EOS token, as in many published models."""
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCAB)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"end_token": "<end>"},
    )


def qwen():
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, **BODY, tie_word_embeddings=False))


def gpt2():
    """Learned positions: a padded prompt must still start at position 0."""
    return GPT2LMHeadModel(GPT2Config(**SHAPE, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3))


def mistral():
    """A window of 5 tokens, far shorter than the sequences: its cache layers drop what left the window."""
    return MistralForCausalLM(MistralConfig(**SHAPE, **BODY, sliding_window=5))


def gemma3():
    """Soft-capped logits, and layers of both kinds in one cache."""
    body = {**BODY, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
    layers = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **body, layer_types=layers, final_logit_softcapping=3.0))


ARCHITECTURES = {"qwen2": qwen, "gpt2": gpt2, "mistral": mistral, "gemma3": gemma3}


@pytest.fixture
def make_policy(tokenizer):
    """make_policy(architecture="qwen2", **options of models.load) -> Policy, the same weights every time."""

    def make(architecture: str = "qwen2", **options):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return load(ARCHITECTURES[architecture](), tokenizer=tokenizer, device="cpu", **options)

    return make


@pytest.fixture
def policy(make_policy):
    return make_policy()
