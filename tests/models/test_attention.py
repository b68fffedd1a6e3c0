"""Attention over packed rows: every family of models, windows, and prompts that neighbours share."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import types

import pytest
import torch
import transformers

from rlhf_fast.data.batch import Example, Span, TokenBatch
from rlhf_fast.errors import UserError
from rlhf_fast.models import attention, load
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.models.attention import (
    IMPLEMENTATIONS,
    Segments,
    _misfit,
    check_implementation,
    packed_attention,
    refusal,
)
from rlhf_fast.run.determinism import deterministic

VOCAB = 64
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1}
# both kinds of layer, and a window of 5 that is shorter than prompts and responses alike
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
FAMILIES = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Gemma2": {**WINDOW, "attn_logit_softcapping": None, "final_logit_softcapping": 30.0},
    "Gemma3Text": {**WINDOW, "query_pre_attn_scalar": 8},
    "GPT2": {"n_inner": 48},
}


def family(name, **more):
    """A two-layer model of the family, the same each time."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **FAMILIES[name], **more})
    stem = "GPT2LMHeadModel" if name == "GPT2" else f"{name.removesuffix('Text')}ForCausalLM"
    return getattr(transformers, stem)(config).eval()


@pytest.fixture
def examples():
    """Four responses to a prompt of 9 tokens, a row of its own, a pair to a prompt of 11; one response is one token."""
    torch.manual_seed(1)
    rows = []
    for prompt, responses in ((9, (4, 7, 1, 6)), (3, (5,)), (11, (6, 3))):
        asked = torch.randint(2, VOCAB, (prompt,)).tolist()
        for length in responses:
            answer = torch.randint(2, VOCAB, (length,)).tolist()
            rows.append(Example([*asked, *answer], [False] * prompt + [True] * length))
    return rows


def responses(values, batch, examples):
    """The entries of response tokens, example by example: what sharing must not change."""
    assert int(batch.response_mask.sum()) == sum(sum(e.response_mask) for e in examples)
    return values[batch.response_rows]


def one_at_a_time(model, examples):
    """Log-probabilities of all response tokens by transformers alone."""
    model.set_attn_implementation("eager")
    rows = []
    for e in examples:
        logprobs = model(torch.tensor([e.input_ids])).logits[0].log_softmax(-1)
        rows += [logprobs[t - 1, e.input_ids[t]] for t in range(1, len(e)) if e.response_mask[t]]
    return torch.stack(rows)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_logprobs_equal_those_of_each_sequence_alone(name, shared, tokenizer, examples):
    with torch.no_grad():
        want = one_at_a_time(family(name), examples)
        policy = load(family(name), tokenizer=tokenizer)
        batch = TokenBatch.pack(examples, shared_prefix=shared)
        assert len(batch.input_ids) == sum(map(len, examples)) - shared * (3 * 9 + 11)
        got = responses(policy.logprobs(batch), batch, examples)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def passes(policy, examples, shared):
    """Everything that trainers compute, and the gradients of all of it."""
    torch.manual_seed(4)
    batch = TokenBatch.pack(examples, shared_prefix=shared)
    logprobs, entropy = (responses(x, batch, examples) for x in policy.logprobs(batch, entropy=True))
    values, scores = responses(policy.values(batch), batch, examples), policy.scores(batch)
    outputs = [logprobs, entropy, values, scores, policy.logprobs(batch, greedy_hits=True)[-1]]
    loss = sum((x * torch.randn_like(x)).sum() for x in outputs[:4])
    loss.backward()
    return outputs, {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_shared_prompt_changes_no_output_and_no_gradient(name, lora, checkpointing, tokenizer, examples):
    """Log-probabilities, entropies, values and scores to 1e-6, gradients to 2e-6 of the largest."""
    results = []
    for shared in (False, True):
        adapter = lora_config(r=4, target_modules=["c_attn", "c_proj"] if name == "GPT2" else "all-linear")
        policy = load(family(name), tokenizer=tokenizer, peft_config=adapter if lora else None).train()
        policy.add_head("value"), policy.add_head("reward")
        for module in policy.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        torch.manual_seed(6)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.02)
        # values and scores read the policy's own weights here, so that one backward pass reaches everything
        policy.model_for = lambda role, policy=policy: policy.model
        if checkpointing:
            policy.checkpoint_activations()
        results.append(passes(policy, examples, shared))
    (plain, gradients), (shared, shared_gradients) = results
    for want, got in zip(plain, shared):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert gradients.keys() == shared_gradients.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    for parameter, want in gradients.items():
        torch.testing.assert_close(shared_gradients[parameter], want, rtol=0, atol=2e-6 * largest, msg=parameter)


def test_responses_see_their_prompt_and_themselves(model, tokenizer, examples):
    """Another sibling, another prompt: bit for bit nothing. Their own prompt: everything."""
    policy = load(model, tokenizer=tokenizer)

    def logprobs(changed=None, at=0):
        rows = [Example(list(e.input_ids), e.response_mask) for e in examples]
        for i in [changed] if isinstance(changed, int) else changed or []:
            rows[i].input_ids[at] = 2 + (rows[i].input_ids[at] + 7) % 60
        batch = TokenBatch.pack(rows)
        assert len(batch.input_ids) == 55  # 9 + 4 + 7 + 1 + 6, 3 + 5, 11 + 6 + 3
        return policy.logprobs(batch)[batch.response_rows].split([4, 7, 1, 6, 5, 6, 3])

    before, sibling, prompt = logprobs(), logprobs(1, at=10), logprobs([0, 1, 2, 3], at=2)
    assert [torch.equal(a, b) for a, b in zip(before, sibling)] == [True, False, True, True, True, True, True]
    assert [torch.equal(a, b) for a, b in zip(before, prompt)] == [False] * 4 + [True] * 3


@functools.cache
def problem(dtype=torch.float64):
    """A prompt with two responses, one of a single token, and a row of its own; query heads in pairs."""
    torch.manual_seed(2)
    spans = [Span(0, 6), Span(6, 5, 0, 6), Span(11, 1, 0, 6), Span(12, 9)]
    sees = torch.zeros(21, 21, dtype=torch.bool)
    for s in spans:
        for i in range(s.length):
            sees[s.start + i, s.prefix_start : s.prefix_start + s.prefix_length] = True
            sees[s.start + i, s.start : s.start + i + 1] = True
    q, k, v = (torch.randn(1, h, 21, 8, dtype=dtype) for h in (4, 2, 2))
    return spans, sees, q, k, v


@pytest.mark.parametrize("window", [None, 1, 4, 7, 11])
def test_attention_is_the_softmax_of_its_definition(window):
    """float64, written out with one mask over all rows; a window counts a prompt's positions and its response's alike."""
    spans, sees, *inputs = problem()
    inputs = [x.clone().requires_grad_() for x in inputs]
    position = torch.tensor([*range(6), *range(6, 11), 6, *range(9)])
    if window is not None:
        sees = sees & (position[:, None] - position[None] < window)
    q, k, v = inputs
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    want = ((q @ k.mT * 0.3).masked_fill(~sees, -torch.inf).softmax(-1) @ v).transpose(1, 2)
    segments = Segments(spans, torch.device("cpu"))
    got, _ = packed_attention(None, *inputs, None, segments=segments, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    weights = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, inputs, weights), torch.autograd.grad(want, inputs, weights)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_the_gradient_of_a_shared_row_is_summed_in_float32():
    """A thousand ones in bfloat16, which alone would stop at 256."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU's index_add does so anyhow
    x = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True, device=device)
    attention._take(x, torch.tensor([1] * 1000 + [2], device=device)).sum().backward()
    assert x.grad.tolist() == [[0.0, 0.0], [1000.0, 1000.0], [1.0, 1.0]] and x.grad.dtype == torch.bfloat16


def test_no_mask_is_built_for_rows_of_their_own():
    """Masks grow with the square of the length; plain causal attention needs none, a prompt's responses share one."""
    plain = Segments([Span(0, 1000), Span(1000, 600), Span(1600, 3)], torch.device("cpu"))
    assert [b.mask(None) for b in plain.buckets[0]] == [None, None]
    shared = Segments([Span(0, 100), *(Span(100 + 20 * i, 20, 0, 100) for i in range(8))], torch.device("cpu"))
    assert [None if b.mask(None) is None else tuple(b.mask(None).shape) for b in shared.buckets[0]] == [None, (20, 120)]


def test_the_form_for_fused_kernels_repeats_a_prompt_before_each_response():
    """As they are documented: keys of span i are [cu_k[i], cu_k[i + 1]), causal, aligned at the end."""
    spans, *_ = problem()
    ragged = Segments(spans, torch.device("cpu")).ragged
    assert ragged.cu_q.tolist() == [0, 6, 11, 12, 21] and ragged.cu_k.tolist() == [0, 6, 17, 24, 33]
    assert (ragged.max_q, ragged.max_k) == (9, 11) and ragged.cu_q.dtype == ragged.cu_k.dtype == torch.int32
    assert ragged.key_rows.tolist() == [*range(6), *range(11), *range(6), 11, *range(12, 21)]
    assert Segments([Span(0, 4), Span(4, 2)], torch.device("cpu")).ragged.key_rows is None


def test_what_the_device_cannot_run_is_refused_when_named_and_passed_over_when_not(model, tokenizer, examples):
    cpu = torch.device("cpu")
    assert refusal("sdpa", cpu, torch.float32, 4, 2, 8, False) is None
    check_implementation("auto", cpu)
    for name in set(IMPLEMENTATIONS) - {"sdpa"}:
        assert "CUDA only" in refusal(name, cpu, torch.bfloat16, 4, 2, 8, False)
        with pytest.raises(
            UserError, match=f"attn_implementation is {name}, but it runs on CUDA only.*leave it at auto"
        ):
            check_implementation(name, cpu)
        policy = load(model, tokenizer=tokenizer)
        policy.attention = name
        with pytest.raises(UserError, match=f"attn_implementation is {name}"):
            policy.logprobs(TokenBatch.pack(examples))


def documented(query, key, value, cu_q, cu_k, max_q, max_k, scale=None, window=(-1, -1)):
    """What torch.nn.attention.varlen and flash-attn document: attention span by span, windows aligned at the end."""
    outputs = []
    assert cu_q.dtype == cu_k.dtype == torch.int32 and max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    for (a, b), (c, d) in zip(*(itertools.pairwise(x.tolist()) for x in (cu_q, cu_k))):
        q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
        k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
        at = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)  # keys that lie behind, by how far
        sees = (at >= -window[1]) if window[1] >= 0 else torch.ones_like(at, dtype=torch.bool)
        sees &= (at <= window[0]) if window[0] >= 0 else True
        scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
        outputs.append((scores.masked_fill(~sees, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def kernels_as_documented(monkeypatch):
    """Neither kernel runs on a CPU: here they are what their documentation says."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa or q.shape[1] == k.shape[1]
        return documented(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size)

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_q,
        max_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
    ):
        window = (window_size[0], 0) if causal else window_size
        return documented(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, softmax_scale, window)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    attention._varlen_arguments.cache_clear()
    yield
    attention._varlen_arguments.cache_clear()


@pytest.mark.parametrize("window", [None, 1, 4, 11])
@pytest.mark.parametrize("name", sorted(set(IMPLEMENTATIONS) - {"sdpa"}))
def test_kernels_that_do_what_they_document_give_the_same_attention(name, window, kernels_as_documented):
    """The arguments that we pass, on spans with and without a shared prompt; float64, forward and backward."""
    spans, _, *inputs = problem()
    inputs = [x[0].transpose(0, 1).clone().requires_grad_() for x in inputs]
    results = []
    for run in (IMPLEMENTATIONS["sdpa"], IMPLEMENTATIONS[name]):
        for some in (spans, [Span(0, 12), Span(12, 9)]):
            out = run(*inputs, Segments(some, torch.device("cpu")), 0.3, window, 0.0)
            weights = torch.arange(float(out.numel()), dtype=out.dtype).sin().view_as(out)
            results.append([out, *torch.autograd.grad(out, inputs, weights)])
    for want, got in zip(results[:2], results[2:]):
        for a, b in zip(want, got):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-12)


def test_a_kernel_is_tried_on_a_small_problem_before_it_is_trusted(kernels_as_documented):
    """Once, and where a checkpointed layer runs first: its second run, without the trial, must save the same tensors."""
    shape = (torch.device("cpu"), torch.bfloat16, 4, 2, 16)
    for run in IMPLEMENTATIONS.values():
        assert _misfit(run, *shape) is None

    def no_window(*args):
        return IMPLEMENTATIONS["sdpa"](*args[:5], None, *args[6:])

    def no_prefix(query, key, value, segments, *rest):
        alone = Segments([Span(s.start, s.length) for s in segments.spans], segments.device)
        return IMPLEMENTATIONS["sdpa"](query, key, value, alone, *rest)

    def broken(*args):
        raise RuntimeError("no kernel image is available\nand more")

    assert _misfit(no_window, *shape) == (
        "on a small problem its output differs from scaled_dot_product_attention's (window 4)"
    )
    assert "output differs" in _misfit(no_prefix, *shape)
    assert _misfit(broken, *shape) == "it failed on a small problem (no kernel image is available)"

    calls = []

    def layer(x):
        if not calls:
            calls.append(_misfit(IMPLEMENTATIONS["varlen"], *shape))
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert calls == [None]
    torch.testing.assert_close(x.grad, x.detach().cos())


def test_flash_attn_is_told_to_repeat_its_bits_or_left_alone(kernels_as_documented, monkeypatch):
    """Versions before 2.4.1 cannot: in deterministic mode, the trial before the first call refuses them."""
    shape = (torch.device("cpu"), torch.bfloat16, 4, 2, 16)
    old = sys.modules["flash_attn"].flash_attn_varlen_func
    told = []

    def new(*args, deterministic=False, **kwargs):
        told.append(deterministic)
        return old(*args, **kwargs)

    with deterministic():
        assert "unexpected keyword argument 'deterministic'" in _misfit(IMPLEMENTATIONS["flash_attention_2"], *shape)
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", new)
    for mode, want in ((contextlib.nullcontext(), False), (deterministic(), True)):
        told.clear()
        with mode:
            assert _misfit(IMPLEMENTATIONS["flash_attention_2"], *shape) is None
        assert set(told) == {want}


def test_attention_that_is_not_causal_is_refused(tokenizer, examples):
    policy = load(family("Gemma3Text", use_bidirectional_attention=True), tokenizer=tokenizer)
    with pytest.raises(UserError, match="Gemma3Attention asks for attention with no causal mask"):
        policy.logprobs(TokenBatch.pack(examples))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize("heads", [(4, 4), (28, 4)], ids=str)
@pytest.mark.parametrize("name", sorted(set(IMPLEMENTATIONS) - {"sdpa"}))
def test_fused_kernels_equal_sdpa_on_a_gpu(name, heads, window):
    """Prompts and responses longer than a kernel's tile of 128, ragged; bfloat16 against float32, forward and backward."""
    device, (h, hk) = torch.device("cuda"), heads
    if reason := refusal(name, device, torch.bfloat16, h, hk, 128, False):
        pytest.skip(reason)
    lengths = [(0, 300, 0, 0), (300, 140, 0, 300), (440, 1, 0, 300), (441, 200, 0, 300), (641, 259, 0, 0)]
    segments = Segments([Span(*s) for s in lengths], device)
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(900, n, 128, device=device, dtype=torch.bfloat16) for n in (h, hk, hk, h))
    results = []
    for run, dtype in ((IMPLEMENTATIONS["sdpa"], torch.float32), (IMPLEMENTATIONS[name], torch.bfloat16)):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = run(*inputs, segments, None, window, 0.0)
        results.append([out, *torch.autograd.grad(out, inputs, g.to(dtype))])
    for want, got in zip(*results):
        assert float((got.float() - want).norm()) < 0.01 * float(want.norm())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_default_on_a_gpu_is_a_fused_kernel():
    reason = refusal("varlen", torch.device("cuda"), torch.bfloat16, 28, 4, 128, False)
    assert reason is None, reason
