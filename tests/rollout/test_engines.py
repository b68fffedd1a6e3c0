"""The in-process engines, each in turn, against the plainest possible loops: no cache, no padding, no batch."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf_fast.errors import UserError
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.rollout import Request, completions_for, decode

# lengths 1 to 9, so that every batch is ragged; the last holds the EOS id 0, which is also the padding id
PROMPTS = [[5], [7, 9, 11], [30, 31, 32, 33, 34, 35, 36, 37, 38], [12, 13], [20, 0, 21, 0, 22]]
EOS = 0


def next_logits(policy, ids):
    """(V,) float32 logits after ``ids``: one sequence, no padding, no cache."""
    with torch.no_grad(), policy.generation_model("policy") as model:
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def forced_logprobs(policy, prompt, ids, temperature):
    """Log-probability of each of ``ids`` after ``prompt``, by teacher forcing."""
    with torch.no_grad(), policy.generation_model("policy") as model:
        logits = model(torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)


def argmax_loop(policy, prompt, steps, eos=(EOS,)):
    ids = []
    for _ in range(steps):
        ids.append(int(next_logits(policy, prompt + ids).argmax()))
        if ids[-1] in eos:
            break
    return ids


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "mistral", "gemma3"])
def test_greedy_equals_an_argmax_loop(make_policy, architecture, make_engine):
    policy = make_policy(architecture)
    samples = make_engine(policy).generate([Request(p, max_new_tokens=12, temperature=0.0) for p in PROMPTS])
    for prompt, (sample,) in zip(PROMPTS, samples):
        assert sample.ids == argmax_loop(policy, prompt, 12)
        torch.testing.assert_close(
            torch.tensor(sample.logprobs), forced_logprobs(policy, prompt, sample.ids, 1.0), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("architecture", ["qwen2", "mistral"])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.5])
def test_logprobs_are_those_of_teacher_forcing_at_the_sampling_temperature(
    make_policy, architecture, temperature, make_engine
):
    """Three samples a prompt, so that shared prefill, ragged padding and rows that leave the batch all take part."""
    policy = make_policy(architecture)
    requests = [Request(p, n=3, max_new_tokens=20, temperature=temperature, seed=4) for p in PROMPTS]
    for prompt, group in zip(PROMPTS, make_engine(policy).generate(requests)):
        for sample in group:
            torch.testing.assert_close(
                torch.tensor(sample.logprobs),
                forced_logprobs(policy, prompt, sample.ids, temperature),
                atol=1e-5,
                rtol=0,
            )


def test_temperatures_and_lengths_may_differ_within_a_batch(policy, make_engine):
    requests = [Request(PROMPTS[0], max_new_tokens=3, temperature=0.0), Request(PROMPTS[1], max_new_tokens=9, seed=1)]
    (greedy,), (sampled,) = make_engine(policy).generate(requests)
    assert greedy.ids == argmax_loop(policy, PROMPTS[0], 3)
    assert sampled.ids == make_engine(policy).generate(requests[1:])[0][0].ids
    assert len(sampled.ids) > 3


def test_samples_follow_the_softmax(policy, make_engine):
    """4,000 first tokens; every observed share within 5 standard errors of its probability."""
    (samples,) = make_engine(policy, size=4000).generate(
        [Request(PROMPTS[1], n=4000, max_new_tokens=1, temperature=1.5, seed=3)]
    )
    expected = (next_logits(policy, PROMPTS[1]) / 1.5).softmax(-1)
    shares = torch.bincount(torch.tensor([s.ids[0] for s in samples]), minlength=len(expected)) / 4000
    error = (expected * (1 - expected) / 4000).sqrt()
    assert ((shares - expected).abs() <= 5 * error + 1e-3).all()
    assert len({s.ids[0] for s in samples}) > 3  # not a test of a point mass


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.5}])
def test_top_k_and_top_p_keep_the_likeliest_and_leave_logprobs_alone(policy, filters, make_engine):
    """Kept by hand: sort, cut to top_k, renormalise, keep tokens until their sum reaches top_p."""
    logits = next_logits(policy, PROMPTS[1])
    probabilities, order = logits.softmax(-1).sort(descending=True)
    kept = probabilities[: filters.get("top_k", len(order))]
    kept = kept / kept.sum()
    count = int((kept.cumsum(0) - kept < filters.get("top_p", 1.0)).sum())
    allowed = order[:count].tolist()
    (samples,) = make_engine(policy, size=2000).generate(
        [Request(PROMPTS[1], n=2000, max_new_tokens=1, seed=5, **filters)]
    )
    drawn = Counter(s.ids[0] for s in samples)
    assert set(drawn) == set(allowed)
    for token, p in zip(allowed, (kept[:count] / kept[:count].sum()).tolist()):
        assert abs(drawn[token] / 2000 - p) < 5 * (p * (1 - p) / 2000) ** 0.5 + 1e-3
    for sample in samples[:20]:
        assert sample.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[sample.ids[0]]), abs=1e-5)


def test_a_seeded_sample_does_not_depend_on_the_batch_it_is_in(policy, make_engine):
    requests = [Request(p, n=3, max_new_tokens=10, seed=i) for i, p in enumerate(PROMPTS)]
    together = make_engine(policy).generate(requests)
    ids = [[s.ids for s in group] for group in together]
    for size in (1, 4):
        assert ids == [[s.ids for s in g] for g in make_engine(policy, size=size).generate(requests)]
    assert ids[3:] == [[s.ids for s in g] for g in make_engine(policy).generate(requests[3:])]
    assert len({tuple(i) for group in ids for i in group}) == 15  # the samples of a group differ


def test_unseeded_requests_follow_torchs_global_seed_and_seeded_ones_leave_it_alone(policy, make_engine):
    engine = make_engine(policy)

    def draw(**options):
        return [s.ids for s in engine.generate([Request(PROMPTS[1], n=2, max_new_tokens=10, **options)])[0]]

    torch.manual_seed(7)
    first, second = draw(), draw()
    torch.manual_seed(7)
    assert draw() == first != second
    before = torch.get_rng_state()
    draw(seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_every_eos_id_ends_a_sample_and_is_kept(policy, make_engine):
    """Two EOS ids in generation_config, one of them also the padding id; sampling at 3 makes both appear."""
    policy.model.generation_config.eos_token_id = [0, 1]
    (samples,) = make_engine(policy).generate([Request(PROMPTS[1], n=120, max_new_tokens=60, temperature=3.0, seed=0)])
    endings = Counter(s.ids[-1] for s in samples if s.finish_reason == "stop")
    assert endings[0] > 5 and endings[1] > 5 and set(endings) == {0, 1}
    for sample in samples:
        assert not {0, 1} & set(sample.ids[:-1])
        assert len(sample.logprobs) == len(sample.ids)
        assert (sample.finish_reason == "stop") == (sample.ids[-1] in (0, 1))


def test_the_tokenizers_eos_ends_a_sample_that_the_models_config_does_not_mention(policy, make_engine):
    policy.model.generation_config.eos_token_id = 1
    (samples,) = make_engine(policy).generate([Request(PROMPTS[1], n=60, max_new_tokens=60, temperature=3.0, seed=0)])
    assert {s.ids[-1] for s in samples if s.finish_reason == "stop"} == {0, 1}


def test_a_sample_out_of_tokens_says_length(policy, make_engine):
    (sample,) = make_engine(policy).generate([Request(PROMPTS[2], max_new_tokens=2, temperature=0.0)])[0]
    assert len(sample.ids) == 2 and sample.finish_reason == "length"


def test_the_models_context_is_never_exceeded(policy, make_engine):
    """64 positions: a prompt of 60 leaves 4; a prompt of 64 leaves none."""
    policy.model.generation_config.eos_token_id = None
    short, long = [9], [9] * 60
    engine = make_engine(policy)
    (a,), (b,) = engine.generate([Request(p, max_new_tokens=30, temperature=0.0) for p in (short, long)])
    assert b.ids == argmax_loop(policy, long, 4) and b.finish_reason == "length"
    assert len(a.ids) == 30 or a.finish_reason == "stop"
    with pytest.raises(UserError, match="prompt 1 has 64 tokens"):
        engine.generate([Request(short), Request([9] * 64)])


def test_a_stop_string_ends_a_sample_at_the_token_that_completes_it(policy, tokenizer, make_engine):
    free = make_engine(policy).generate([Request(p, max_new_tokens=20, seed=2) for p in PROMPTS])
    texts = [tokenizer.decode(group[0].ids) for group in free]
    stop = texts[1][3:5]  # two characters that prompt 1 is known to produce
    stopped = make_engine(policy).generate([Request(p, max_new_tokens=20, seed=2, stop=(stop, "@@")) for p in PROMPTS])
    for text, (before,), (after,) in zip(texts, free, stopped):
        cut = text.find(stop)
        if cut < 0:
            assert after.ids == before.ids
        else:
            assert tokenizer.decode(after.ids) == text[: cut + len(stop)]
            assert after.finish_reason == "stop"
            assert after.logprobs == pytest.approx(before.logprobs[: len(after.ids)], abs=1e-6)


def test_the_models_own_generation_settings_do_not_leak_in(make_policy, make_engine):
    requests = [Request(p, n=2, max_new_tokens=15, seed=6) for p in PROMPTS]
    plain = make_engine(make_policy()).generate(requests)
    policy = make_policy()
    settings = policy.model.generation_config
    settings.update(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.2, repetition_penalty=5.0, num_beams=3, max_length=3,
        min_new_tokens=9, no_repeat_ngram_size=1, bad_words_ids=[[8]], num_return_sequences=2, use_cache=False,
        stop_strings=["a"], suppress_tokens=[9], cache_implementation="static",
    )  # fmt: skip
    before = copy.deepcopy(settings.to_dict())
    assert [[s.ids for s in g] for g in make_engine(policy).generate(requests)] == [[s.ids for s in g] for g in plain]
    assert policy.model.generation_config is settings and settings.to_dict() == before


def test_the_model_is_left_as_it_was_found(make_policy, make_engine):
    policy = make_policy(peft_config=lora_config(r=2))
    policy.model.gradient_checkpointing_enable()
    policy.model.config.use_cache = False
    policy.train()
    settings, active = policy.model.generation_config, policy.adapters.active
    attention = policy.model.config._attn_implementation
    make_engine(policy).generate([Request(PROMPTS[1], n=2, max_new_tokens=4)])
    assert all(module.training for module in policy.modules())
    assert policy.model.config.use_cache is False and policy.model.is_gradient_checkpointing
    assert policy.model.generation_config is settings and policy.adapters.active == active
    assert policy.model.config._attn_implementation == attention
    assert policy.model.generation_config is settings


def test_an_error_inside_generation_also_leaves_the_model_as_found(policy, make_engine):
    settings = policy.model.generation_config
    with torch.no_grad():
        policy.model.lm_head.weight.fill_(float("nan"))
    policy.train()
    with pytest.raises(RuntimeError, match="not finite"):
        make_engine(policy).generate([Request(PROMPTS[1])])
    assert policy.model.generation_config is settings and policy.model.training


def test_samples_carry_the_version_that_was_announced(policy, make_engine):
    engine = make_engine(policy)
    engine.update(None, 3)
    assert engine.generate([Request([5], max_new_tokens=1)])[0][0].policy_version == 3
    with pytest.raises(UserError, match="cannot load"):
        engine.update("some/adapter", 4)


def test_a_role_writes_with_its_own_weights(make_policy, make_engine):
    policy = make_policy(peft_config=lora_config(r=4))
    base = make_engine(policy, role="reference").generate([Request(PROMPTS[2], max_new_tokens=10, temperature=0.0)])
    with torch.no_grad():
        for name, parameter in policy.adapters.parameters("policy").items():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    request = [Request(PROMPTS[2], max_new_tokens=10, temperature=0.0)]
    assert make_engine(policy, role="reference").generate(request) == base
    (adapted,) = make_engine(policy).generate(request)[0]
    assert adapted.ids == argmax_loop(policy, PROMPTS[2], 10)
    assert adapted != base[0][0]


def test_text_has_no_special_tokens_and_answers_in_the_prompts_form(policy, tokenizer, make_engine):
    engine = make_engine(policy)
    (samples,) = engine.generate([Request(PROMPTS[1], n=40, max_new_tokens=60, temperature=3.0, seed=0)])
    texts = decode(samples, tokenizer)
    assert not any("<eos>" in t or "<end>" in t for t in texts)
    assert texts[0] == "".join(tokenizer.convert_ids_to_tokens([i for i in samples[0].ids if i > 2]))
    messages = [{"role": "user", "content": "hi"}]
    assert completions_for(["hi", messages], ["a", "b"]) == ["a", [{"role": "assistant", "content": "b"}]]


def test_a_stop_id_ends_a_sample_and_is_kept(policy, make_engine):
    free = make_engine(policy).generate([Request(p, max_new_tokens=20, seed=2) for p in PROMPTS])
    stop = free[2][0].ids[4]
    requests = [
        Request(p, max_new_tokens=20, seed=2, stop_ids=(stop,) if i == 2 else ()) for i, p in enumerate(PROMPTS)
    ]
    stopped = make_engine(policy).generate(requests)
    for i, ((before,), (after,)) in enumerate(zip(free, stopped)):
        cut = before.ids.index(stop) + 1 if i == 2 else len(before.ids)
        assert after.ids == before.ids[:cut]
    assert stopped[2][0].finish_reason == "stop"


@pytest.mark.parametrize("temperature", [0.3, 1.5])
def test_filtered_logprobs_are_those_of_transformers_processors(policy, make_engine, temperature):
    """Every token of three samples, in float64, with all filters and the penalty at once; beside a plain sample, which has none."""
    options = {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3}
    requests = [Request(p, n=3, max_new_tokens=12, temperature=temperature, seed=7, **options) for p in PROMPTS]
    *groups, (plain,) = make_engine(policy, size=4).generate([*requests, Request(PROMPTS[0], max_new_tokens=5)])
    assert plain.filtered_logprobs is None
    for prompt, group in zip(PROMPTS, groups):
        for sample in group:
            for t, token in enumerate(sample.ids):
                seen = torch.tensor([prompt + sample.ids[:t]])
                scores = next_logits(policy, seen[0].tolist()).double()[None]
                for processor in (
                    RepetitionPenaltyLogitsProcessor(1.3),
                    TemperatureLogitsWarper(temperature),
                    TopKLogitsWarper(20),
                    TopPLogitsWarper(0.9),
                    MinPLogitsWarper(0.02),
                ):
                    scores = processor(seen, scores)
                expected = float(scores.log_softmax(-1)[0, token])
                assert sample.filtered_logprobs[t] == pytest.approx(expected, abs=1e-5)
            forced = forced_logprobs(policy, prompt, sample.ids, temperature)
            torch.testing.assert_close(torch.tensor(sample.logprobs), forced, atol=1e-5, rtol=0)


def test_greedy_with_a_repetition_penalty_is_that_of_transformers(policy, make_engine):
    requests = [Request(p, max_new_tokens=15, temperature=0.0, repetition_penalty=1.5) for p in PROMPTS]
    for prompt, (sample,) in zip(PROMPTS, make_engine(policy, size=3).generate(requests)):
        with policy.generation_model() as model:
            ids = torch.tensor([prompt])
            out = model.generate(ids, max_new_tokens=15, do_sample=False, repetition_penalty=1.5, pad_token_id=0)
        assert sample.ids == out[0, len(prompt) :].tolist()


def test_a_role_that_wrote_does_not_stay_switched_on(make_policy, make_engine):
    policy = make_policy(peft_config=lora_config(r=2))
    policy.adapters.use("policy")
    make_engine(policy, role="reference").generate([Request(PROMPTS[1], max_new_tokens=2)])
    assert policy.adapters.active == "policy"
