"""What models and adapters do on a GPU: late copies to the host, fused layers, NF4, packed attention.

Each test runs on the CPU too, without streams and in float32, so that its body is tried out where there is no GPU.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_fast.data.batch import Example, TokenBatch
from rlhf_fast.models import Policy, load
from rlhf_fast.models.adapters import base_weight, lora_config
from rlhf_fast.models.attention import refusal
from rlhf_fast.models.checkpointing import HostInputs

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_gpu)])
HEAD = 64  # bitsandbytes packs blocks of 64, and the fused attention kernels take it
SIZES = {
    "vocab_size": 64,
    "hidden_size": 4 * HEAD,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}


@pytest.fixture
def small():
    """A model of three layers in float32 on the CPU."""
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)).eval()


@pytest.fixture
def folder(small, tokenizer, tmp_path):
    small.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def packed():
    """packed(device, shared) -> two prompts with three responses each; the longest row passes a kernel's tile of 128."""
    torch.manual_seed(1)
    rows = []
    for prompt, answers in ((150, (40, 1, 97)), (20, (11, 5, 130))):
        asked = torch.randint(2, 64, (prompt,)).tolist()
        for n in answers:
            rows.append(Example(asked + torch.randint(2, 64, (n,)).tolist(), [False] * prompt + [True] * n))
    return lambda device, shared=False: TokenBatch.pack(rows, torch.device(device), shared_prefix=shared)


def compute_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def perturbed(policy: Policy) -> Policy:
    for i, parameter in enumerate(policy.adapters.parameters("policy").values()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.05
        parameter.data.copy_(noise)
    return policy.train()


def gradients(policy: Policy, batch: TokenBatch) -> dict[str, Tensor]:
    policy.zero_grad()
    logprobs = policy.logprobs(batch)[batch.response_rows]
    (logprobs * torch.linspace(-1, 2, len(logprobs), device=logprobs.device)).sum().backward()
    return {name: p.grad.double().cpu() for name, p in policy.adapters.parameters("policy").items()}


def far(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The distance of all gradients over the size of all."""
    assert got.keys() == want.keys() and got
    return (
        float(sum((got[n] - want[n]).square().sum() for n in want) / sum(w.square().sum() for w in want.values()))
        ** 0.5
    )


# ---- offload

CYCLES = 5_000_000  # of a GPU's clock, milliseconds: far longer than any copy or kernel here
LAYERS, ROWS = 6, 1 << 16


class LateCopies(HostInputs):
    """Copies that start long after they are asked for: memory given away too early holds something else by then."""

    @contextlib.contextmanager
    def _beside(self, x: Tensor):
        with super()._beside(x) as stream:
            if stream is not None:
                torch.cuda._sleep(CYCLES)
            yield stream


class SlowLayer(torch.autograd.Function):
    """sin(x) w, both ways long after the host has queued it: a copy that does not wait for it finds poison."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return _late(x, lambda: x.sin() * w)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, w = ctx.saved_tensors
        return _late(x, lambda: grad * x.cos() * w), grad * x.sin()


def _late(x: Tensor, compute) -> Tensor:
    if x.is_cuda:
        torch.cuda._sleep(CYCLES)
    out = compute()
    # whoever gets freed memory next writes over it
    for _ in range(2):
        torch.empty_like(x).fill_(float("nan"))
    return out


def through_layers(run, x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """The result of the layers, and the gradients of the input and of their weights."""
    leaves = [x.detach().requires_grad_(), *weights]
    h = leaves[0] * 1
    for w in weights:
        h = run(SlowLayer.apply, h, w, use_reentrant=False)
    result = h.detach().clone()
    return [result, *torch.autograd.grad(h, leaves, torch.ones_like(h))]


@devices
@pytest.mark.parametrize("store", [HostInputs, LateCopies])
def test_inputs_come_back_as_they_left_however_late_the_copies_run(device, store):
    """Bit for bit, over four steps that reuse the host's buffers, of growing and shrinking sizes."""
    generator = torch.Generator().manual_seed(0)
    inputs = store()
    for rows in (ROWS, ROWS, ROWS // 2, ROWS * 2):
        x, *weights = (torch.randn(rows, generator=generator).to(device) for _ in range(LAYERS + 1))
        weights = [w.requires_grad_() for w in weights]
        want = through_layers(checkpoint, x, weights)
        got = through_layers(inputs.checkpoint, x, weights)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
    assert inputs.moved_bytes == 4 * LAYERS * int(4.5 * ROWS)
    assert len(inputs.free) == LAYERS


@on_a_gpu
def test_the_device_holds_two_inputs_at_a_time_on_cuda():
    """Sixteen checkpointed inputs of 16 MiB: all of them without a store; with it the one in use and the next."""
    size, layers = 1 << 22, 16
    x = torch.ones(size, device="cuda")
    weights = [torch.ones(1, device="cuda", requires_grad=True) for _ in range(layers)]

    def peak(run) -> float:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        h = x.detach().requires_grad_()
        for w in weights:
            # the host waits: memory that a copy still reads is no more freed than that of a live tensor
            h = run(lambda h, w: torch.sin(h * w), h, w, use_reentrant=False)
            torch.cuda.synchronize()
        h.sum().backward()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / (4 * size)

    plain, stored = peak(checkpoint), peak(HostInputs().checkpoint)
    assert plain > layers and stored < plain - layers // 2


@devices
def test_a_models_gradients_are_the_same_with_its_inputs_on_the_host(device, small, tokenizer, packed):
    """On a CPU to the bit; on a GPU sums of attention's backward pass may come in another order."""
    found = []
    for offload in (False, True):
        model = copy.deepcopy(small).to(device, compute_dtype(device))
        policy = Policy(model.requires_grad_(False), tokenizer)
        policy.adapters.add("policy", lora_config(r=4))
        policy.checkpoint_activations(offload=offload)
        if offload:
            policy.host_inputs.__class__ = LateCopies
        perturbed(policy)
        found.append([gradients(policy, packed(device)) for _ in range(2)])
    assert policy.host_inputs.moved_bytes > 0
    for plain, offloaded in zip(*found):
        assert far(offloaded, plain) <= (0.0 if device == "cpu" else 5e-3)


# ---- fused layers


@devices
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bits", [4, 16, 32])
def test_fused_layers_equal_pefts(bits, checkpointing, device, folder, packed):
    """In float32 to rounding; in 16 bits the gradients err at most twice as much as PEFT's, against float32 ones."""
    if bits == 4:
        pytest.importorskip("bitsandbytes")
    dtype = torch.float32 if bits == 32 or device == "cpu" else torch.bfloat16
    batch, found = packed(device), []
    for fused in (True, False):
        policy = load(folder, device=device, dtype=dtype, load_in_4bit=bits == 4, peft_config=lora_config(r=4))
        perturbed(policy)
        if fused:
            assert policy.fusion.covers("lora", "mlp", "norm") and not policy.fusion.plain
        else:
            policy.unfuse()
        if checkpointing:
            policy.checkpoint_activations()
        found.append(gradients(policy, batch))
    if dtype == torch.float32:
        assert far(*found) <= 1e-5
        return
    with torch.no_grad():  # the same weights, widened: what NF4 stands for, too
        plain = load(folder, device=device, dtype=torch.float32, peft_config=lora_config(r=4))
        perturbed(plain).unfuse()
        _copy_bases(policy, plain)
    exact = gradients(plain, batch)
    assert far(found[0], exact) <= 2 * far(found[1], exact) + 1e-4


def _copy_bases(source: Policy, target: Policy) -> None:
    modules = dict(source.model.named_modules())
    for name, layer in target.model.named_modules():
        if hasattr(layer, "lora_A"):
            weight = base_weight(modules[name])
            layer.get_base_layer().weight.copy_(weight() if callable(weight) else weight)
        elif isinstance(getattr(layer, "weight", None), nn.Parameter) and "lora" not in name and "base" not in name:
            layer.weight.copy_(modules[name].weight)


@devices
def test_an_nf4_base_with_its_adapter_off_is_a_fresh_one_bit_for_bit(device, folder, packed):
    pytest.importorskip("bitsandbytes")
    options = {"device": device, "dtype": compute_dtype(device), "load_in_4bit": True}
    batch = packed(device)
    with torch.no_grad():
        want = load(folder, **options).train().logprobs(batch)
    policy = perturbed(load(folder, peft_config=lora_config(r=4), **options))
    for checkpointing in (False, True):
        if checkpointing:
            policy.checkpoint_activations(offload=True)
        gradients(policy, batch)
        with torch.no_grad():
            assert torch.equal(policy.logprobs(batch, role="reference"), want)
            assert not torch.equal(policy.logprobs(batch), want)


# ---- attention


@devices
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("implementation", ["auto", "flash_attention_2", "sdpa"])
def test_packed_rows_equal_each_sequence_alone(implementation, shared, device, small, tokenizer, packed):
    """transformers alone in float32, a sequence at a time; in 16 bits at most twice as far as transformers in 16 bits."""
    dtype = compute_dtype(device)
    if reason := implementation != "auto" and refusal(implementation, torch.device(device), dtype, 4, 2, HEAD, False):
        pytest.skip(reason)
    batch, alone = packed(device, shared), packed(device)

    def each(model: nn.Module) -> Tensor:
        model.set_attn_implementation("eager")
        found, rows = [], alone.input_ids.split(alone.cu_seqlens.diff().tolist())
        with torch.no_grad():
            for ids in rows:
                logits = model(ids[None]).logits[0].float()
                picked = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
                found.append(torch.cat([picked.new_zeros(1), picked]))
        return torch.cat(found)[alone.response_rows]

    exact = each(copy.deepcopy(small).to(device))
    theirs = each(copy.deepcopy(small).to(device, dtype))
    policy = load(copy.deepcopy(small).to(device, dtype), tokenizer=tokenizer, device=device, dtype=dtype)
    policy.attention = implementation
    with torch.no_grad():
        ours = policy.logprobs(batch)[batch.response_rows]
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 1e-6 * exact.norm()
