"""The slot engine against ``transformers.generate`` and training's own log-probabilities; what it computes, keeps and gives
back."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch

from rlhf_fast.data.batch import Example, TokenBatch
from rlhf_fast.errors import UserError
from rlhf_fast.kernels import decode_attention
from rlhf_fast.models import load
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.rollout import GenerateEngine, Request, SlotEngine, engine_for, slots
from rlhf_fast.rollout.slot_cache import Pack, SlotCache, slot_attention

# lengths 1 to 9, more prompts than slots; the last holds the EOS id
PROMPTS = [[5], [7, 9, 11], [30, 31, 32, 33, 34, 35, 36, 37, 38], [12, 13], [20, 0, 21, 0, 22]]


def stir(policy, std=0.3):
    """Make the policy's adapter change something."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.adapters.parameters("policy").items():
            if "lora_B" in name:
                parameter.normal_(std=std)
    return policy


def generated(policy, prompt, count):
    """Greedy tokens of ``transformers.generate``, this prompt alone."""
    with policy.generation_model() as model:
        ids = torch.tensor([prompt])
        return model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)[0, len(prompt) :].tolist()


def seen_shapes(policy):
    """(rows, tokens) of every pass from now on."""
    shapes = []
    policy.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, out: shapes.append(inputs[0].shape)
    )
    return shapes


WRITERS = ["qwen2", "llama", "gemma", "mistral", "gpt2", "gemma3", "phi3", "qwen3"]
ON_A_BASE = [(name, base) for name in WRITERS for base in ("plain", "adapter", "adapter on nf4")]


@pytest.mark.parametrize(("architecture", "base"), [*ON_A_BASE, ("qwen2", "nf4"), ("llama", "nf4"), ("gemma", "nf4")])
def test_greedy_is_transformers_generate_token_for_token(make_policy, tokenizer, tmp_path, architecture, base):
    """Three slots for five prompts, so that slots are taken over; long prompts come in chunks of 4."""
    adapter = lora_config(r=4) if "adapter" in base else None
    policy = make_policy(architecture, peft_config=adapter)
    if "nf4" in base:
        pytest.importorskip("bitsandbytes")
        make_policy(architecture).save(tmp_path)
        policy = load(tmp_path, device="cpu", load_in_4bit=True, peft_config=adapter)
    if adapter is not None:
        before = [generated(policy, p, 16) for p in PROMPTS]
        stir(policy)
        assert [generated(policy, p, 16) for p in PROMPTS] != before  # the adapter matters
    engine = engine_for(policy, slots=3)
    assert isinstance(engine, SlotEngine)
    engine.prefill_tokens = 4
    samples = engine.generate([Request(p, max_new_tokens=16, temperature=0.0) for p in PROMPTS])
    for prompt, (sample,) in zip(PROMPTS, samples):
        assert sample.ids == generated(policy, prompt, 16)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}, {"top_k": 7}])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.5])
def test_logprobs_are_those_that_training_computes(make_policy, temperature, filters):
    """``Policy.logprobs`` on the packed samples; windows of 5 tokens, an adapter, slots that are taken over."""
    policy = stir(make_policy("mistral", peft_config=lora_config(r=4)), std=0.1)
    options = {"max_new_tokens": 24, "temperature": temperature, **filters}
    groups = SlotEngine(policy, slots=4).generate([Request(p, n=3, seed=i, **options) for i, p in enumerate(PROMPTS)])
    pairs = [(p, s) for p, group in zip(PROMPTS, groups) for s in group]
    batch = TokenBatch.pack([Example([*p, *s.ids], [False] * len(p) + [True] * len(s.ids)) for p, s in pairs])
    with torch.no_grad():
        trained = policy.logprobs(batch, temperature=temperature)[batch.response_rows]
    written = torch.tensor([x for _, s in pairs for x in s.logprobs])
    torch.testing.assert_close(written, trained, atol=1e-5, rtol=0)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9, "repetition_penalty": 1.2}])
def test_the_same_seeds_give_the_same_tokens_at_any_number_of_slots(policy, filters):
    requests = [Request(p, n=4, max_new_tokens=30, seed=i, **filters) for i, p in enumerate(PROMPTS)]
    at_one, at_three, at_sixteen = (
        [[s.ids for s in g] for g in SlotEngine(policy, slots=slots).generate(requests)] for slots in (1, 3, 16)
    )
    assert at_one == at_three == at_sixteen
    assert len({tuple(ids) for group in at_one for ids in group}) == 20
    shuffled = SlotEngine(policy, slots=5, prefill_tokens=3).generate(requests[::-1])
    assert [[s.ids for s in g] for g in shuffled[::-1]] == at_one


@pytest.mark.parametrize(
    "more", [{"top_p": 0.9}, {"top_k": 5, "repetition_penalty": 1.3}, {"temperature": 0.0}], ids=str
)
def test_a_seed_gives_the_same_tokens_beside_requests_with_other_settings(policy, more):
    mine = [Request(p, n=2, max_new_tokens=20, seed=i) for i, p in enumerate(PROMPTS)]
    others = [Request(p, n=2, max_new_tokens=9, seed=9, **more) for p in PROMPTS]
    alone = SlotEngine(policy, slots=8).generate(mine)
    beside = SlotEngine(policy, slots=8).generate([r for pair in zip(mine, others) for r in pair])[::2]
    assert [[s.ids for s in g] for g in beside] == [[s.ids for s in g] for g in alone]


def test_after_running_out_of_memory_the_engine_writes_as_before(policy, monkeypatch):
    """The third layer of a cache that grows finds no room: half a cache would be written out of bounds."""
    engine = SlotEngine(policy, slots=4)
    short = [Request(p, n=2, max_new_tokens=4, seed=1) for p in PROMPTS]
    long = [Request(p, n=2, max_new_tokens=60, seed=1) for p in PROMPTS]
    engine.generate(short)
    whole = SlotEngine(policy, slots=4).generate(long)
    resized, calls = SlotCache._resized, []

    def fails_once(cache, old):
        calls.append(old)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")
        return resized(cache, old)

    monkeypatch.setattr(SlotCache, "_resized", fails_once)
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(long)
    assert engine.generate(long) == whole


def test_more_random_numbers_than_are_drawn_at_a_time(make_policy, monkeypatch):
    """Blocks of 4 numbers and one block of all: the same stream."""
    policy = make_policy()
    requests = [Request(p, n=2, max_new_tokens=30, seed=i, temperature=1.5) for i, p in enumerate(PROMPTS)]
    whole = SlotEngine(policy, slots=3).generate(requests)
    monkeypatch.setattr("rlhf_fast.rollout.session.BLOCK", 4)
    assert SlotEngine(policy, slots=3).generate(requests) == whole


def test_a_change_of_weights_shows_in_the_very_next_request(make_policy):
    policy = make_policy(peft_config=lora_config(r=4))
    engine = SlotEngine(policy, slots=2)
    request = [Request(PROMPTS[2], max_new_tokens=16, temperature=0.0)]
    before = engine.generate(request)[0][0]
    stir(policy)
    engine.update(None, 1)
    after = engine.generate(request)[0][0]
    assert after.ids == generated(policy, PROMPTS[2], 16) != before.ids
    assert (before.policy_version, after.policy_version) == (0, 1)


def test_sixteen_siblings_share_one_prefill_even_over_three_slots(policy):
    shapes = seen_shapes(policy)
    SlotEngine(policy, slots=3).generate([Request(PROMPTS[2], n=16, max_new_tokens=8, seed=0)])
    assert [tuple(s) for s in shapes if s[1] > 1] == [(1, 9)]


def test_short_prompts_are_prefilled_side_by_side_and_only_live_samples_are_decoded(policy):
    """20 prompt tokens in one pass without padding; then as many rows as samples are still being written."""
    shapes = seen_shapes(policy)
    samples = SlotEngine(policy).generate(
        [Request(p, n=3, max_new_tokens=40, temperature=3.0, seed=1) for p in PROMPTS]
    )
    assert tuple(shapes[0]) == (1, 20)
    lengths = [len(s.ids) for group in samples for s in group]
    assert len(set(lengths)) > 2  # they end at different times
    assert [s[0] for s in shapes[1:]] == [sum(n > t for n in lengths) for t in range(1, max(lengths))]


def test_a_free_slot_is_taken_at_once(policy):
    """Two slots: every step gives two samples a token, as long as samples wait."""
    with SlotEngine(policy, slots=2).session() as session:
        for prompt in PROMPTS:
            session.add(Request(prompt, n=2, max_new_tokens=12, seed=1))
        while session.queue:
            assert len(session.step()) == 2


def live_bytes():
    return sum(x.nbytes for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.layout == torch.strided)


def test_memory_does_not_grow_with_the_number_of_requests(policy):
    """The most bytes of tensors that a pass finds, for 120 requests and 360; already the first are more than prompts are prefilled ahead
    of (512 tokens)."""
    found = []
    policy.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, out: found.append(
            live_bytes() if inputs[0].shape[1] > 1 else 0
        )  # at prefills, the peaks
    )
    peaks = []
    for count in (120, 360):
        SlotEngine(policy, slots=4).generate([Request(PROMPTS[2], max_new_tokens=2, seed=i) for i in range(count)])
        peaks.append(max(found))
        found.clear()
    assert peaks[1] <= peaks[0] * 1.02


def test_sleeping_gives_the_cache_back_and_the_next_request_makes_it_again(policy):
    engine = SlotEngine(policy, slots=4)
    request = [Request(PROMPTS[1], n=4, max_new_tokens=9, seed=2)]
    first = engine.generate(request)
    assert (
        engine.cache.nbytes >= 2 * 2 * 4 * 2 * 8 * 11 * 4
    )  # keys and values, layers, slots, heads, size, tokens, bytes
    engine.sleep()
    assert engine.cache.nbytes == 0
    engine.wake()
    assert engine.generate(request) == first


def held_tokens(policy, engine, monkeypatch):
    """(in the slots, of prompts) tokens whose keys and values there is room for, at every pass from now on."""
    packs, made, found = weakref.WeakSet(), Pack.__init__, []
    monkeypatch.setattr(Pack, "__init__", lambda pack, *options: (packs.add(pack), made(pack, *options))[1])

    def look(*_):
        prompts = sum(sum(pack.lengths) for pack in packs if pack.layers)
        found.append((engine.cache.rows * engine.cache.length, prompts))

    policy.model.get_output_embeddings().register_forward_hook(look)  # a pack's are there by then
    return found


def test_slots_and_waiting_prompts_hold_no_more_tokens_than_allowed_and_fewer_slots_are_used(policy, monkeypatch):
    """80 tokens: beside the 9 of the first prompt, two of its samples at a time (2 * 29 + 9), later more."""
    requests = [Request(p, n=3, max_new_tokens=20, seed=i) for i, p in enumerate(PROMPTS)]
    free = [[s.ids for s in g] for g in SlotEngine(policy, slots=8).generate(requests)]
    for chunk in (4096, 4):
        engine = SlotEngine(policy, slots=8, max_tokens=80, prefill_tokens=chunk)
        found = held_tokens(policy, engine, monkeypatch)
        assert [[s.ids for s in g] for g in engine.generate(requests)] == free
        assert max(map(sum, found)) <= 80
        assert max(prompts for _, prompts in found) >= 9 and max(slots for slots, _ in found) >= 58


def test_a_request_that_can_never_fit_is_refused_and_one_that_just_fits_is_written(policy):
    """A prompt of 9, twice while its sample begins, and 12 new tokens: 30."""
    engine = SlotEngine(policy, max_tokens=30)
    (sample,) = engine.generate([Request(PROMPTS[2], max_new_tokens=12, seed=1)])[0]
    assert sample.ids == SlotEngine(policy).generate([Request(PROMPTS[2], max_new_tokens=12, seed=1)])[0][0].ids
    with pytest.raises(
        UserError, match="9 tokens, held twice when its sample begins, and up to 13 new ones.*room for 30"
    ):
        engine.generate([Request(PROMPTS[2], max_new_tokens=13)])


@pytest.mark.parametrize("first", ["one long request", "many short ones"])
def test_what_an_earlier_session_left_is_not_multiplied(policy, first, monkeypatch):
    """One sequence of 60 tokens, and eight of at most 8: never eight of 60."""
    with torch.no_grad():
        policy.model.lm_head.weight[0] = 0.0  # never the likeliest: no sample ends early
    long = [Request(PROMPTS[0], max_new_tokens=59, temperature=0.0)]
    short = [Request([5 + i], max_new_tokens=7, temperature=0.0) for i in range(8)]
    engine = SlotEngine(policy, slots=8)
    found = held_tokens(policy, engine, monkeypatch)
    for requests in (long, short) if first == "one long request" else (short, long):
        engine.generate(requests)
    assert max(slots for slots, _ in found) <= 2 * 8 * 8


def test_requests_that_come_one_by_one_do_not_copy_the_cache_each_time(policy):
    engine = SlotEngine(policy, slots=64)
    with engine.session() as session:
        for seed in range(64):
            session.add(Request(PROMPTS[1], max_new_tokens=60, temperature=0.0, seed=seed))
            if len(session.live) < 64:
                session.step()
        assert engine.cache.moves <= 16


def test_the_cache_grows_no_further_than_the_longest_sample_needs(policy):
    engine = SlotEngine(policy, slots=2)
    engine.generate([Request(PROMPTS[2], n=2, max_new_tokens=7, temperature=0.0)])
    assert engine.cache.length <= 16


def test_an_error_between_steps_leaves_the_policy_as_found_and_the_engine_usable(make_policy):
    policy = make_policy(peft_config=lora_config(r=2))
    policy.train()
    policy.model.lm_head.eval()  # modes may be mixed
    attention, rng = policy.model.config._attn_implementation, torch.get_rng_state()
    engine = SlotEngine(policy)
    with pytest.raises(KeyError), engine.session() as session:
        session.add(Request(PROMPTS[1], seed=0))
        session.step()
        raise KeyError("somebody else's")
    assert policy.model.config._attn_implementation == attention and torch.equal(rng, torch.get_rng_state())
    assert policy.model.training and not policy.model.lm_head.training
    assert len(engine.generate([Request(PROMPTS[1], max_new_tokens=3, seed=0)])[0][0].ids) <= 3


@pytest.mark.parametrize("action", ["update", "sleep", "session"])
def test_weights_and_memory_stay_while_a_session_is_open(policy, action):
    engine = SlotEngine(policy)
    acts = {"update": lambda: engine.update(None, 1), "sleep": engine.sleep}
    acts["session"] = lambda: engine.session().__enter__()
    with engine.session(), pytest.raises(RuntimeError, match="session"):
        acts[action]()


def test_a_model_with_soft_capped_attention_is_left_to_generate_and_a_line_says_so(make_policy, caplog):
    with caplog.at_level(logging.WARNING, "rlhf_fast"):
        engine = engine_for(make_policy("gemma2"), slots=3)
    assert isinstance(engine, GenerateEngine) and engine.max_batch_size == 3
    (line,) = [r.message for r in caplog.records if "rollouts" in r.message]
    assert "transformers.generate" in line and "softcap" in line
    assert isinstance(engine_for(make_policy("gemma2, no soft cap")), SlotEngine)


def test_a_model_that_the_slots_compute_differently_is_left_to_generate(policy, monkeypatch, caplog):
    """Here they see the first key alone."""

    def blind(query, keys, values, lengths, **options):
        return decode_attention(query, keys, values, torch.ones_like(lengths), **options)

    monkeypatch.setattr("rlhf_fast.rollout.slot_cache.decode_attention", blind)
    assert isinstance(engine_for(policy), GenerateEngine)
    assert "differ from transformers'" in caplog.text


def test_a_model_whose_positions_change_with_length_is_left_to_generate_unless_sequences_stay_short(
    make_policy, caplog
):
    """LongRoPE with 16 tokens of 64: four tokens show nothing, and a long neighbour would turn everyone's keys."""
    policy = make_policy("longrope")
    assert slots._trial(policy, "policy") is None
    assert isinstance(engine_for(policy), GenerateEngine)
    assert "positions change for all sequences beside one of more than 16 tokens" in caplog.text
    assert isinstance(engine_for(policy, longest=17), GenerateEngine)
    engine = engine_for(policy, longest=16)
    assert isinstance(engine, SlotEngine)
    requests = [Request(p, max_new_tokens=30, temperature=0.0) for p in PROMPTS]
    for prompt, (sample,) in zip(PROMPTS, engine.generate(requests)):  # asked for more than it was made for
        assert sample.ids == generated(policy, prompt, 16 - len(prompt)) and len(prompt) + len(sample.ids) <= 16
    with pytest.raises(UserError, match="has 17 tokens, and the slots write at most 16 with this model"):
        engine.generate([Request([5] * 17)])
    assert isinstance(engine_for(make_policy("dynamic_rope")), SlotEngine)  # its context ends where it would change


def test_a_model_is_tried_once_and_every_role_of_it(make_policy, monkeypatch):
    policy, tried = make_policy(peft_config=lora_config(r=2)), []
    trial = slots._four_tokens
    monkeypatch.setattr(slots, "_four_tokens", lambda p, role: (tried.append(role), trial(p, role))[1])
    for _ in range(3):
        assert isinstance(engine_for(policy), SlotEngine)
    engine_for(policy, role="reference")
    engine_for(make_policy())
    assert tried == ["policy", "reference", "policy"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
    ],
    ids=["GPU", "CPU"],
)
def test_running_out_of_memory_is_no_reason_to_call_a_model_unfit(policy, error, monkeypatch):
    def fails(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(slots, "_four_tokens", fails)
        with pytest.raises(RuntimeError, match="memory"):
            engine_for(policy)
    assert isinstance(engine_for(policy), SlotEngine)


@pytest.mark.parametrize("keyword", ["softcap", "s_aux", "something_new"])
def test_attention_refuses_what_it_does_not_implement(policy, keyword):
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UserError, match=keyword):
        slot_attention(torch.nn.Module(), x, x, x, None, work=object(), **{keyword: 1.0})


@pytest.mark.parametrize("name", ["slots", "max_tokens", "prefill_tokens"])
def test_sizes_below_one_are_refused_by_name(policy, name):
    with pytest.raises(UserError, match=name):
        SlotEngine(policy, **{name: 0})
