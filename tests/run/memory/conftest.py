"""The config that transformers would find beside a model of given sizes."""

from __future__ import annotations

import pytest
import transformers


@pytest.fixture
def config_of():
    """config_of(kind, shape, **more) -> the configuration of such a model."""

    def make(kind, shape, **more):
        sizes = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "vocab_size": shape.vocab}
        sizes |= {"num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "head_dim": shape.head_dim}
        sizes |= {"num_key_value_heads": shape.kv_heads, "tie_word_embeddings": shape.tied}
        return transformers.AutoConfig.for_model(kind, **{**sizes, **more})

    return make
