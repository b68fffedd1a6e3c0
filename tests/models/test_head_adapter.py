"""LoRA on lm_head: what transformers and PEFT compute with logits, without them; on, off, saved, merged, tied or not."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rlhf_fast.data.batch import Example, TokenBatch
from rlhf_fast.errors import UserError
from rlhf_fast.models import load
from rlhf_fast.models.adapters import lora_config, nf4_config
from rlhf_fast.models.fingerprint import fingerprint

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
TARGETS = ["q_proj", "lm_head"]
ties = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
formats = pytest.mark.parametrize("in_4bit", [False, True], ids=["plain", "nf4"])


@pytest.fixture(autouse=True)
def four_bit_needs_bitsandbytes(request):
    if "nf4" in request.node.name:
        pytest.importorskip("bitsandbytes")


@pytest.fixture
def folder(tokenizer, tmp_path):
    """folder(tied) -> a folder with a tiny model and the tokenizer."""

    def make(tied=False):
        torch.manual_seed(0)
        config = Qwen2Config(**SIZES, eos_token_id=1, pad_token_id=0, tie_word_embeddings=tied, initializer_range=0.1)
        Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make


def adapted(base, dropout=0.0, **options):
    policy = load(base, peft_config=lora_config(r=4, dropout=dropout, target_modules=TARGETS), **options)
    torch.manual_seed(5)
    for parameter in policy.adapters.parameters("policy").values():
        parameter.data.normal_(0, 0.1)
    return policy


def by_peft(base, run, in_4bit=False, dtype=torch.float32):
    """The run's adapter on its base, by transformers and PEFT alone."""
    quantized = {"quantization_config": nf4_config(dtype, torch.device("cpu"))} if in_4bit else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager", **quantized)
    return PeftModel.from_pretrained(model.train(), run, is_trainable=True)


def by_logits(model, examples, temperature=1.0):
    """(N,) float64 log-probabilities from the model's logits, each sequence alone, 0 outside the responses."""
    rows = []
    for e in examples:
        log_p = (model(torch.tensor([e.input_ids])).logits[0] / temperature).double().log_softmax(-1)
        picked = log_p[:-1].gather(1, torch.tensor(e.input_ids[1:], dtype=torch.long)[:, None])[:, 0]
        picked = torch.where(torch.tensor(e.response_mask[1:], dtype=torch.bool), picked, 0.0)
        rows.append(torch.cat([picked.new_zeros(1), picked]))
    return torch.cat(rows)


def of_policy(policy, only=""):
    """Parameters of the policy's adapter, by PEFT's names."""
    parameters = policy.adapters.parameters("policy").items()
    return {f"base_model.model.{name}": p for name, p in parameters if only in name}


def of_peft(model, only=""):
    found = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    return {name: p for name, p in found.items() if only in name}


def gradients(logprobs, parameters):
    upstream = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)
    found = torch.autograd.grad((logprobs * upstream).sum(), list(parameters.values()))
    return dict(zip(parameters, found))


@ties
@formats
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_it_equals_transformers_and_peft_in_every_gradient(folder, tmp_path, examples, tied, in_4bit, checkpointing):
    policy = adapted(folder(tied), load_in_4bit=in_4bit).train()
    policy.save(tmp_path / "run")
    if checkpointing:
        policy.checkpoint_activations()
    theirs = by_peft(tmp_path / "base", tmp_path / "run", in_4bit)
    want = by_logits(theirs, examples, temperature=0.7)
    got = policy.logprobs(TokenBatch.pack(examples), temperature=0.7)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    found, right = gradients(got, of_policy(policy)), gradients(want, of_peft(theirs))
    assert found.keys() == right.keys() and sum("lm_head" in name for name in found) == 2
    for name, gradient in right.items():
        assert (found[name] - gradient).norm() <= 2e-6 * gradient.norm(), name


def test_on_a_bfloat16_base_it_errs_no_more_than_peft(folder, tmp_path, examples):
    """Against the same weights in float64. Adapters are fp32 and so are their gradients."""
    policy = adapted(folder(), dtype=torch.bfloat16).train()
    policy.save(tmp_path / "run")
    theirs = by_peft(tmp_path / "base", tmp_path / "run", dtype=torch.bfloat16)
    exact = by_peft(tmp_path / "base", tmp_path / "run", dtype=torch.bfloat16).double()
    right, plain = by_logits(exact, examples), by_logits(theirs, examples)
    got = policy.logprobs(TokenBatch.pack(examples))
    assert (got - right).norm() <= 2 * (plain - right).norm()
    right, plain = gradients(right, of_peft(exact, "lm_head")), gradients(plain, of_peft(theirs, "lm_head"))
    for name, found in gradients(got, of_policy(policy, "lm_head")).items():
        assert found.dtype == torch.float32
        assert (found - right[name]).norm() <= 2 * (plain[name] - right[name]).norm(), name


@ties
@formats
def test_off_it_is_the_base_and_a_critic_never_touches_it(folder, examples, tied, in_4bit):
    base, batch = folder(tied), TokenBatch.pack(examples)
    fresh = load(base, load_in_4bit=in_4bit)
    policy = adapted(base, load_in_4bit=in_4bit)
    policy.add_reference()
    policy.add_role("value", trainable=True, head=True)
    want = fresh.logprobs(batch).detach()
    assert torch.equal(policy.logprobs(batch, role="reference"), want)
    assert not torch.equal(policy.logprobs(batch).detach(), want)
    assert fingerprint(policy.model) == fingerprint(fresh.model)
    policy.values(batch).sum().backward()
    assert all(p.grad is None for p in of_policy(policy).values())


@ties
@formats
def test_it_is_saved_in_pefts_format_without_the_weight_and_merged(folder, tmp_path, examples, tied, in_4bit):
    """A merged head leaves the embeddings that it was tied to: only the head had the adapter, in PEFT too."""
    base, batch = folder(tied), TokenBatch.pack(examples)
    policy = adapted(base, load_in_4bit=in_4bit)
    want = policy.logprobs(batch)
    policy.save(tmp_path / "run")
    keys = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert [k for k in keys if "lm_head" in k] == [f"base_model.model.lm_head.lora_{x}.weight" for x in "AB"]
    again = load(tmp_path / "run")
    assert torch.equal(again.logprobs(batch), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again.export(tmp_path / "merged")
    assert torch.equal(again.logprobs(batch), want)
    merged = load(tmp_path / "merged")
    torch.testing.assert_close(merged.logprobs(batch), want, rtol=0, atol=2e-5)
    assert not json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert torch.equal(merged.model.get_input_embeddings().weight, policy.model.get_input_embeddings().weight)


def test_a_tied_head_is_owned_up_to_in_a_line_of_ours(folder, caplog):
    with warnings.catch_warnings(), caplog.at_level("INFO", logger="rlhf_fast"):
        warnings.simplefilter("error", UserWarning)
        policy = adapted(folder(tied=True))
    assert "LoRA on the head changes the head alone" in caplog.text
    assert policy.model.lm_head.weight is policy.model.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["Gemma2", "Cohere", "GPT2"])
def test_caps_scales_and_tied_heads_of_other_families(family, tokenizer, examples):
    torch.manual_seed(0)
    sizes = {**SIZES, "final_logit_softcapping": 2.0, "attn_logit_softcapping": None, "head_dim": 16}
    sizes = {"Gemma2": sizes, "Cohere": {**SIZES, "logit_scale": 0.25}}.get(family, {"vocab_size": 64, "n_embd": 64})
    sizes |= {"n_layer": 2, "n_head": 4, "n_positions": 64} if family == "GPT2" else {}
    dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0} if family == "GPT2" else {}
    config = getattr(transformers, f"{family}Config")(
        **sizes, **dropout, eos_token_id=1, pad_token_id=0, bos_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config)
    policy = load(model, tokenizer=tokenizer, peft_config=LoraConfig(r=4, target_modules=["lm_head"]))
    for parameter in policy.adapters.parameters("policy").values():
        parameter.data.normal_(0, 0.2)
    batch = TokenBatch.pack(examples)
    got, hits = policy.logprobs(batch, greedy_hits=True)
    picked, right = [], 0
    with policy.generation_model() as plain:
        for e in examples:
            log_p = plain(torch.tensor([e.input_ids])).logits[0].double().log_softmax(-1)
            for t in range(1, len(e)):
                if e.response_mask[t]:
                    picked.append(log_p[t - 1, e.input_ids[t]])
                    right += int(log_p[t - 1].argmax() == e.input_ids[t])
    torch.testing.assert_close(got[got != 0].double(), torch.stack(picked), rtol=1e-6, atol=2e-6)
    assert hits == right


def test_what_generation_picks_are_the_greedy_hits(folder, examples):
    policy = adapted(folder())
    with policy.generation_model() as ready, torch.no_grad():
        ids = ready.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, do_sample=False, eos_token_id=None)
    said = Example(ids[0].tolist(), [False] * 3 + [True] * 9)
    assert policy.logprobs(TokenBatch.pack([said]), greedy_hits=True)[-1] == 9
    policy.adapters.parameters("policy")["lm_head.lora_B.weight"].data.neg_()
    assert policy.logprobs(TokenBatch.pack([said]), greedy_hits=True)[-1] < 9


def test_its_dropout_drops_in_training_only(folder, examples):
    policy, batch = adapted(folder(), dropout=0.5), TokenBatch.pack(examples)
    for name, parameter in of_policy(policy).items():
        if "lm_head" not in name:
            parameter.data.zero_()
    assert torch.equal(policy.eval().logprobs(batch), policy.logprobs(batch))
    assert not torch.equal(policy.train().logprobs(batch), policy.logprobs(batch))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_hidden_states_are_kept_once_and_not_in_float32(folder, dropout):
    """For B's and A's gradients autograd keeps bf16 hidden states and nothing else as large."""
    policy = adapted(folder(), dropout=dropout, dtype=torch.bfloat16).train()
    hidden = torch.randn(300, SIZES["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y, _ = policy.adapters.low_rank(policy.model.lm_head, hidden)
    assert kept.pop(hidden.untyped_storage().data_ptr()) == hidden.nbytes and sum(kept.values()) <= 4 * y.nbytes
    y.sum().backward()
    a = policy.adapters.parameters("policy")["lm_head.lora_A.weight"]
    # y is linear in A, so this holds if what is made again drops the same entries
    assert (a * a.grad).sum().item() == pytest.approx(y.sum().item(), rel=1e-4)
    assert hidden.grad.any()


def test_fusion_leaves_the_head_alone(folder):
    policy = adapted(folder())
    assert policy.fusion.fused["LoRA layers"] == SIZES["num_hidden_layers"]
    assert not hasattr(type(policy.model.lm_head), "_unfused")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "puts a variant of LoRA .DoRA, lora_bias and such. on the head"),
        ({"lora_bias": True}, "puts a variant of LoRA"),
        ({"ensure_weight_tying": True}, "sets ensure_weight_tying, which puts LoRA on the embeddings"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_what_is_no_product_of_two_matrices_is_refused(folder, options, message):
    with pytest.raises(UserError, match=message):
        load(folder(True), peft_config=LoraConfig(r=2, target_modules=TARGETS, **options))
