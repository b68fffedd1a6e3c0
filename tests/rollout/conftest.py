"""A tokenizer of single characters and tiny random models, sharp enough that greedy and sampled tokens mean something."""

from __future__ import annotations

import functools
import string
import threading
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf_fast.models import load
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.rollout import GenerateEngine, SlotEngine

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


def llama():
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **BODY, tie_word_embeddings=False))


def gemma():
    return GemmaForCausalLM(GemmaConfig(**SHAPE, **BODY, head_dim=8))


def phi3():
    """One linear for query, key and value."""
    return Phi3ForCausalLM(Phi3Config(**SHAPE, **BODY, pad_token_id=0))


def longrope(context=64):
    """Positions of a pass that reads more than 16 tokens are scaled by other factors than those of a shorter one."""
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [4.0, 5.0, 6.0, 7.0]}
    shape = {**SHAPE, "max_position_embeddings": context, "original_max_position_embeddings": 16}
    return Phi3ForCausalLM(Phi3Config(**shape, **BODY, pad_token_id=0, rope_parameters=rope))


def dynamic_rope():
    """A base that grows with the longest sequence, from the model's context on: never here."""
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **BODY, rope_parameters=rope))


def qwen3():
    """Norms of queries and keys."""
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, **BODY, head_dim=8, tie_word_embeddings=False))


def gemma2(softcap=50.0):
    """Soft-capped attention, which the slots refuse."""
    body = {**BODY, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, **body, attn_logit_softcapping=softcap))


ARCHITECTURES = {
    f.__name__: f for f in (gpt2, mistral, gemma3, llama, gemma, phi3, qwen3, gemma2, longrope, dynamic_rope)
} | {"qwen2": qwen}
ARCHITECTURES["gemma2, no soft cap"] = functools.partial(gemma2, None)


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


@pytest.fixture
def adapter_folder(make_policy, tmp_path):
    """adapter_folder(name, seed) -> a folder with a LoRA adapter of the qwen2 base that changes what it says."""

    def make(name: str, seed: int):
        policy = make_policy(peft_config=lora_config(r=4, alpha=8))
        draw = torch.Generator().manual_seed(seed)
        for key, parameter in policy.adapters.parameters("policy").items():
            if "lora_B" in key:
                parameter.data.normal_(0, 0.3, generator=draw)
        policy.adapters.save("policy", tmp_path / name)
        return tmp_path / name

    return make


class Served:
    """The real application on a real port of this machine, in a thread."""

    def __init__(self, policy, wrap=None, *, slots=4, name="base", api_key=None, max_tokens=64, cache_tokens=None):
        import uvicorn

        from rlhf_fast.rollout.serving.app import Service, build_app
        from rlhf_fast.rollout.serving.worker import ServedModels, Worker
        from rlhf_fast.rollout.slots import SlotEngine

        self.worker = Worker(SlotEngine(policy, slots=slots, max_tokens=cache_tokens))
        self.service = Service(self.worker, ServedModels(policy, name), max_tokens)
        app = build_app(self.service, api_key)
        # a middleware sees the lifespan too, and must hand it on
        config = uvicorn.Config(app if wrap is None else wrap(app), port=0, log_level="error", lifespan="on")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def start(self):
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def kill(self):
        """As a process that dies: no answer to anybody, all connections cut."""
        self.server.force_exit = self.server.should_exit = True
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()
        self.thread.join(10)
        self.worker.drain(0)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def serve():
    """serve(policy, wrap=None, **options) -> a running Served, stopped after the test."""
    pytest.importorskip("uvicorn")
    running = []

    def start(policy, wrap=None, **options):
        running.append(Served(policy, wrap, **options).start())
        return running[-1]

    yield start
    for served in running:
        served.stop()


@pytest.fixture(params=["slots", "slots, prompts in chunks", "generate"])
def make_engine(request):
    """make_engine(policy, size=128, **options) -> each engine of this process in turn, with ``size`` sequences at a time."""

    def make(policy, size: int = 128, **options):
        if request.param == "generate":
            return GenerateEngine(policy, max_batch_size=size, **options)
        chunk = 4 if "chunks" in request.param else 4096
        return SlotEngine(policy, slots=size, prefill_tokens=chunk, **options)

    return make
