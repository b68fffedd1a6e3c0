"""Make a model from nothing: a tokenizer trained on a corpus, a small Llama with fresh weights, one folder.

For machines without downloads, for tests and for small tasks. The folder is an ordinary one: AutoModelForCausalLM and
AutoTokenizer load it, and so does everything else that takes a Hugging Face model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.data.sources import TEXT_SUFFIXES, load_records
from rlhf_fast.data.templates import CHATML
from rlhf_fast.errors import UserError

PAD, START, END = "<pad>", "<|im_start|>", "<|im_end|>"

# vocab_size is a ceiling: a small corpus gives fewer tokens
PRESETS: dict[str, dict[str, int]] = {
    "nano": {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "tiny": {"vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8},
    "medium": {"vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6},
    "base": {"vocab_size": 16384, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}

# letters with what precedes them, digits one at a time (numbers generalise), punctuation, line ends, spaces
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def new_model(
    preset: str,
    corpus: str | Path | Iterable[str],
    out_dir: str | Path,
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    quiet: bool = False,
    **overrides: Any,
) -> Path:
    """Write a from-scratch model folder: config, float32 weights, generation config, tokenizer with a chat template.

    Args:
        preset: a name in ``PRESETS``.
        corpus: what the tokenizer is trained on: a text file, a data file or data set (all its strings), or strings.
        out_dir: the folder; made if need be, and must not hold another model.
        vocab_size: ceiling of the vocabulary, at least 259 (bytes and special tokens); default the preset's.
        seed: of the weights.
        quiet: do not print the sizes.
        overrides: ``LlamaConfig`` fields that replace the preset's, for example ``hidden_size=96``.
    Returns:
        ``out_dir``.
    Raises:
        UserError: unknown preset or field, a missing or empty corpus, sizes that do not fit together.
    """
    out_dir = Path(out_dir)
    if preset not in PRESETS:
        raise UserError(f"Unknown preset {preset!r}: choose one of {', '.join(PRESETS)}.")
    if (out_dir / "config.json").exists():
        raise UserError(f"{out_dir} already holds a model. Name another folder, or remove it first.")
    sizes = {**PRESETS[preset], **overrides}
    tokenizer = train_tokenizer(_texts(corpus), vocab_size or PRESETS[preset]["vocab_size"])
    config = _config({**sizes, "vocab_size": len(tokenizer)}, tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings
    model = _fresh_model(config, seed)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    if not quiet:
        print(f"{out_dir}: {describe(model)}")
    return out_dir


def describe(model: Any) -> str:
    """One line of exact sizes, for example ``llama, 4 layers, hidden 128, ... 1,048,576 parameters``."""
    c = model.config
    parameters = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    tied = ", tied to the head" if c.tie_word_embeddings else ""
    return (
        f"{c.model_type}, {c.num_hidden_layers} layers, hidden {c.hidden_size}, {c.num_attention_heads} heads, "
        f"vocabulary {c.vocab_size:,}, {parameters:,} parameters ({embedding:,} of them embeddings{tied})"
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer: any text round-trips exactly, digits stay single, ChatML template with markers.

    It has at most ``vocab_size`` tokens, and only merges that occur at least twice in ``texts``.

    Raises:
        UserError: no text, or a vocabulary too small for 256 bytes and three special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, START, END]
    if vocab_size < 256 + len(special):
        raise UserError(
            f"A vocabulary needs at least {256 + len(special)} tokens (bytes and specials), got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_roles(texts), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, extra_special_tokens=[START], padding_side="left"
    )
    fast.chat_template = CHATML
    return fast


def _with_roles(texts: Iterable[str]) -> Iterator[str]:
    """The corpus and, often enough to become single tokens, the role names that the chat template writes."""
    empty = True
    for i, text in enumerate(text for text in texts if text.strip()):
        empty = False
        yield text
        if i % 10 == 0:
            yield "system\nuser\nassistant\n" * 2
    if empty:
        raise UserError(
            "The corpus holds no text to train a tokenizer on. Give a text file or a data set with strings."
        )


def _texts(corpus: str | Path | Iterable[str]) -> Iterable[str]:
    """The strings of a corpus: lines of a text file, every string of a data set, or the strings given."""
    if not isinstance(corpus, (str, Path)):
        return corpus
    path = Path(corpus).expanduser()
    data = path.name.endswith((*TEXT_SUFFIXES, ".gz", ".parquet"))
    if path.is_file() and not data:
        try:
            return path.read_text(encoding="utf-8").splitlines(keepends=True)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    # half a surrogate pair, as cut JSON escapes leave it, becomes a question mark
    return (s.encode(errors="replace").decode() for row in load_records(str(corpus)) for s in _strings(row))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _strings(part)


def _config(sizes: dict[str, Any], tokenizer: Any) -> Any:
    """A Llama config: with this type AutoTokenizer keeps the tokenizer as trained (Qwen2's would replace its splitting)."""
    from transformers import LlamaConfig

    hidden = sizes["hidden_size"]
    defaults = {
        "num_key_value_heads": sizes["num_attention_heads"],
        # SwiGLU has three matrices: 8/3 of the width equals a plain MLP of 4 times the width; in whole 32s
        "intermediate_size": 32 * math.ceil(hidden * 8 / 3 / 32),
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        # sqrt(2 / 5D): the usual 0.02 at D = 1024, larger in small models, where 0.02 hardly passes a signal
        # (Nguyen & Salazar 2019, arXiv:1910.05895)
        "initializer_range": round(math.sqrt(2 / (5 * hidden)), 4),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    unknown = sorted(set(sizes) - set(defaults) - set(vars(LlamaConfig())))
    if unknown:
        raise UserError(f"LlamaConfig has no field {unknown[0]!r}.")
    values = {**defaults, **sizes}
    heads = values["num_attention_heads"]
    if hidden % heads or (hidden // heads) % 2 or heads % values["num_key_value_heads"]:
        raise UserError(
            f"hidden_size {hidden} must be an even multiple of num_attention_heads {heads}, and that a multiple of "
            f"num_key_value_heads {values['num_key_value_heads']}."
        )
    return LlamaConfig(**values)


def _fresh_model(config: Any, seed: int) -> Any:
    """Initialised weights; the caller's random state is left as it was."""
    from transformers import GenerationConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        # what each layer adds to the residual stream, scaled so that the sum over layers keeps its size (GPT-2)
        scale = 1 / math.sqrt(2 * config.num_hidden_layers)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    model.generation_config = GenerationConfig(
        bos_token_id=None, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model
