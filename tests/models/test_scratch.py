"""A model made from nothing is an ordinary folder, learns, and fits its corpus."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_fast.data import encode_messages, encode_prompt_completion, token_audit
from rlhf_fast.errors import UserError
from rlhf_fast.models.scratch import PRESETS, describe, new_model

TEXTS = [f"{a}+{b}={a + b} and the apples are ready" for a in range(10, 30) for b in range(10, 15)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return new_model("nano", TEXTS, tmp_path_factory.mktemp("models") / "nano", quiet=True)


def test_the_folder_loads_with_the_auto_classes(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    assert (
        model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    )
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (folder / "model.safetensors").exists() and len(token_audit(tokenizer, vocab_size=len(tokenizer))) == 1


def test_any_text_round_trips_and_digits_stay_single(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("the apples\n\n 1234  five", "naïve e\u0301 日本語 🙂\t\r\n", "  lead and trail  "):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("20+1234=1254").input_ids)
    assert tokens == list("20+1234=1254")
    assert "Ġapples" in tokenizer.get_vocab()


def test_the_chat_template_marks_the_answer_and_role_names_are_single_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    example = encode_messages([{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}], tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
    assert "".join(tokens) == "<|im_start|>userĊ1+2=<|im_end|>Ċ<|im_start|>assistantĊ3<|im_end|>"
    assert [t for t, m in zip(tokens, example.response_mask) if m] == ["3", "<|im_end|>"]
    assert {"user", "assistant", "system"} <= set(tokens) | set(tokenizer.get_vocab())


def test_the_vocabulary_is_no_larger_than_the_corpus_supports(tmp_path):
    """Three special tokens, 256 bytes, and merges only of what occurs twice."""
    folder = new_model("base", ["ab", "xy"], tmp_path / "m", quiet=True, hidden_size=32, num_hidden_layers=1,
                       num_attention_heads=2)  # fmt: skip
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    assert 259 <= len(vocabulary) < 290 and "ab" not in vocabulary
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == len(vocabulary)


def test_a_fresh_model_predicts_uniformly_and_its_signal_keeps_its_size(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, model.config.vocab_size, (8, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(ids, labels=ids, output_hidden_states=True)
    uniform = torch.tensor(float(model.config.vocab_size)).log()
    assert uniform - 0.1 < out.loss < uniform + 0.6
    first, last = (out.hidden_states[i].pow(2).mean().sqrt() for i in (0, -2))
    assert 0.5 < last / first < 5


def test_it_learns_a_handful_of_rows_by_heart(folder):
    """Small models with the usual 0.02 initialisation hardly move in so few steps."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([encode_prompt_completion(f"{a}+7=", str(a + 7), tokenizer).input_ids for a in range(13, 21)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
    out = model.generate(ids[:, :5], max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids[:, :5]))
    answers = [tokenizer.decode(row[5:], skip_special_tokens=True) for row in out]
    assert answers == [str(a + 7) for a in range(13, 21)]


def test_weights_depend_on_the_seed_and_nothing_else(tmp_path):
    def weights(name, seed):
        new_model("nano", TEXTS, tmp_path / name, seed=seed, quiet=True)
        return load_file(tmp_path / name / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights("a", 0)
    assert torch.equal(torch.get_rng_state(), before)  # making a model draws nothing from the caller's stream
    torch.manual_seed(2)
    assert torch.equal(first, weights("b", 0)) and not torch.equal(first, weights("c", 1))


def test_sizes_are_printed_exactly(folder, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(folder)
    new_model("nano", TEXTS, tmp_path / "m")
    printed = capsys.readouterr().out
    count = sum(p.numel() for p in model.parameters())
    assert f"{count:,} parameters" in printed and describe(model) in printed and str(tmp_path / "m") in printed


def test_a_corpus_may_be_text_or_any_data_file(tmp_path):
    (tmp_path / "c.txt").write_text("the apples\n" * 50, encoding="utf-8")
    rows = [{"messages": [{"role": "user", "content": "the apples"}], "n": 3}] * 50
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name in ("c.txt", "c.jsonl"):
        folder = new_model("nano", tmp_path / name, tmp_path / (name + ".model"), quiet=True)
        assert "Ġapples" in AutoTokenizer.from_pretrained(folder).get_vocab()


def test_presets_grow():
    widths = [(p["vocab_size"], p["hidden_size"], p["num_hidden_layers"]) for p in PRESETS.values()]
    assert widths == sorted(widths) and all(p["hidden_size"] % p["num_attention_heads"] == 0 for p in PRESETS.values())


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        (("micro", TEXTS), {}, "Unknown preset 'micro': choose one of nano, tiny"),
        (("nano", []), {}, "holds no text"),
        (("nano", "no/such.txt"), {}, "no file or folder 'no/such.txt'"),
        (("nano", TEXTS), {"vocab_size": 100}, "at least 259 tokens"),
        (("nano", TEXTS), {"hiden_size": 64}, "LlamaConfig has no field 'hiden_size'"),
        (("nano", TEXTS), {"num_attention_heads": 7}, "even multiple of num_attention_heads 7"),
    ],
)
def test_mistakes_are_named_and_leave_nothing_behind(tmp_path, arguments, options, expected):
    with pytest.raises(UserError) as error:
        new_model(*arguments, tmp_path / "m", quiet=True, **options)
    assert expected in str(error.value) and not (tmp_path / "m").exists()


def test_an_existing_model_is_not_overwritten(folder):
    with pytest.raises(UserError, match="already holds a model"):
        new_model("nano", TEXTS, folder)
