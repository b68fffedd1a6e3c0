"""The fusion seam: packed log-probabilities, values and scores equal what a plain model gives one sequence at a time."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from rlhf_fast.data.batch import TokenBatch
from rlhf_fast.errors import UserError
from rlhf_fast.models import attach, load
from rlhf_fast.models.adapters import lora_config


def one_at_a_time(model, examples, temperature=1.0):
    """(N,) log-probabilities from transformers' own forward, each sequence alone, 0 outside the responses."""
    model.set_attn_implementation("eager")
    rows = []
    for e in examples:
        ids = torch.tensor([e.input_ids])
        logprobs = (model(ids).logits[0].double() / temperature).log_softmax(-1)
        row = torch.zeros(len(e), dtype=torch.float64)
        for t in range(1, len(e)):
            if e.response_mask[t]:
                row[t] = logprobs[t - 1, e.input_ids[t]]
        rows.append(row)
    return torch.cat(rows)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_packed_logprobs_equal_those_of_each_sequence_alone(model, tokenizer, examples, temperature):
    want = one_at_a_time(model, examples, temperature)
    policy = load(model, tokenizer=tokenizer)
    got = policy.logprobs(TokenBatch.pack(examples), temperature=temperature)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


def test_packed_gradients_equal_those_of_each_sequence_alone(model, tokenizer, examples):
    one_at_a_time(model, examples).sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    load(model, tokenizer=tokenizer).logprobs(TokenBatch.pack(examples)).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-5, msg=name)


def test_documents_do_not_see_each_other(model, tokenizer, examples):
    """Changing one sequence of a pack leaves the other sequences' log-probabilities as they were, bit for bit."""
    policy = load(model, tokenizer=tokenizer)
    before = policy.logprobs(TokenBatch.pack(examples))
    examples[1].input_ids = [2 + (t + 7) % 60 for t in examples[1].input_ids]
    after = policy.logprobs(TokenBatch.pack(examples))
    assert torch.equal(before[:7], after[:7]) and torch.equal(before[19:], after[19:])
    assert not torch.equal(before[7:19], after[7:19])


def test_values_are_of_the_state_before_the_token_and_scores_of_the_last_token(model, tokenizer, examples):
    policy = load(model, tokenizer=tokenizer)
    policy.add_head("value")
    policy.add_head("reward")
    values, scores = policy.values(TokenBatch.pack(examples)), policy.scores(TokenBatch.pack(examples))
    model.set_attn_implementation("sdpa")
    start = 0
    for i, e in enumerate(examples):
        hidden = model.model(torch.tensor([e.input_ids])).last_hidden_state[0]
        torch.testing.assert_close(scores[i], policy.heads["reward"](hidden[-1]), rtol=0, atol=1e-6)
        for t in range(len(e)):
            want = policy.heads["value"](hidden[t - 1]) if e.response_mask[t] and t else torch.zeros(())
            torch.testing.assert_close(values[start + t], want, rtol=0, atol=1e-6)
        start += len(e)


def test_the_head_of_gemma_2_is_capped_as_transformers_caps_it(tokenizer, examples):
    """final_logit_softcapping reaches the fused head; a cap of 0.5 on logits of this size changes everything."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
        attn_logit_softcapping=None,
        sliding_window=32,
    )
    gemma = Gemma2ForCausalLM(config).eval()
    want = one_at_a_time(gemma, examples)
    got = load(gemma, tokenizer=tokenizer).logprobs(TokenBatch.pack(examples))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


def test_a_soft_cap_inside_attention_is_refused_not_ignored(tokenizer, examples):
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_logit_softcapping=50.0,
    )
    policy = load(Gemma2ForCausalLM(config), tokenizer=tokenizer)
    with pytest.raises(UserError, match="softcap"):
        policy.logprobs(TokenBatch.pack(examples))


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_policy_loads_back_with_the_same_logprobs(model, tokenizer, examples, lora, tmp_path):
    base = load(model, tokenizer=tokenizer)
    base.save(tmp_path / "base")
    policy = load(tmp_path / "base", peft_config=lora_config(r=4) if lora else None)
    _perturb(policy)
    want = policy.logprobs(TokenBatch.pack(examples))
    policy.save(tmp_path / "run")
    assert torch.equal(load(tmp_path / "run").logprobs(TokenBatch.pack(examples)), want)
    assert "rlhf_fast" not in (tmp_path / "base" / "config.json").read_text()


def test_a_reward_model_keeps_its_head_through_save_and_load(model, tokenizer, examples, tmp_path):
    load(model, tokenizer=tokenizer).save(tmp_path / "base")
    reward = load(tmp_path / "base", peft_config=lora_config(r=4), role="reward")
    reward.add_head("reward")
    _perturb(reward)
    reward.heads["reward"].bias.data.fill_(0.3)
    want = reward.scores(TokenBatch.pack(examples))
    reward.save(tmp_path / "rm")
    assert torch.equal(load(tmp_path / "rm").scores(TokenBatch.pack(examples)), want)


def test_a_reward_adapter_of_the_same_base_is_attached_to_it_and_frozen(model, tokenizer, examples, tmp_path):
    load(model, tokenizer=tokenizer).save(tmp_path / "base")
    reward = load(tmp_path / "base", peft_config=lora_config(r=4), role="reward")
    reward.add_head("reward")
    _perturb(reward)
    reward.save(tmp_path / "rm")
    policy = load(tmp_path / "base", peft_config=lora_config(r=4))
    assert attach(policy, "reward", tmp_path / "rm") is policy
    batch = TokenBatch.pack(examples)
    assert torch.equal(policy.scores(batch), reward.scores(batch))
    assert not any(p.requires_grad for p in policy.adapters.parameters("reward").values())
    with pytest.raises(UserError, match="not a reward model"):
        attach(policy, "reward", tmp_path / "base")


def test_merged_export_has_the_adapter_runs_logits_and_peft_reads_our_files(model, tokenizer, tmp_path):
    load(model, tokenizer=tokenizer).save(tmp_path / "base")
    policy = load(tmp_path / "base", peft_config=lora_config(r=4))
    _perturb(policy)
    policy.save(tmp_path / "run")
    load(tmp_path / "run").export(tmp_path / "merged")
    ids = torch.randint(2, 64, (3, 11))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run")
    torch.testing.assert_close(merged, by_peft(ids).logits, rtol=0, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids).logits
    assert (merged - plain).abs().max() > 1e-3


def test_generation_leaves_mode_and_attention_as_found(model, tokenizer, examples):
    policy = load(model, tokenizer=tokenizer).train()
    before = policy.logprobs(TokenBatch.pack(examples))
    with policy.generation_model() as ready:
        assert not ready.training
        ready.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert policy.model.training
    assert torch.equal(policy.logprobs(TokenBatch.pack(examples)), before)


def test_missing_folders_and_tokenizers_are_named(model, tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        load(tmp_path)
    with pytest.raises(UserError, match="no such model folder"):
        load(tmp_path / "absent")
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="no tokenizer found"):
        load(tmp_path / "bare")


def _perturb(policy):
    """Move every trainable weight, so that an adapter differs from its base."""
    torch.manual_seed(5)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)


def test_a_role_that_nobody_plays_is_an_error_not_the_policy_itself(model, tokenizer, examples):
    """In full fine-tuning a forgotten add_reference() would otherwise give a KL of exactly 0."""
    policy = load(model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="nothing plays the role 'reference'"):
        policy.logprobs(TokenBatch.pack(examples), role="reference")
    policy.add_reference()
    policy.logprobs(TokenBatch.pack(examples), role="reference")


def test_layers_that_carry_state_across_sequences_are_refused(model, tokenizer):
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match="linear_attention.*packed training would mix"):
        load(model, tokenizer=tokenizer)


def test_an_adapter_is_not_written_over_a_whole_model(model, tokenizer, tmp_path):
    load(model, tokenizer=tokenizer).save(tmp_path / "base")
    policy = load(tmp_path / "base", peft_config=lora_config(r=4))
    with pytest.raises(UserError, match="already holds a whole model"):
        policy.save(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors").is_file()
