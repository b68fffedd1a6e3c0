"""What only a GPU can show: 2^31 elements, side streams, graph capture without host syncs. Skipped without CUDA.

With RLHF_FAST_DRY_RUN=1 the comparison of backends runs on the CPU, Triton interpreted: so the file itself is tried out.
"""

from __future__ import annotations

import os

import pytest
import torch

from rlhf_fast import kernels
from rlhf_fast.kernels import BACKENDS, available, use_backend
from rlhf_fast.kernels.dispatch import OPS

DRY_RUN = os.environ.get("RLHF_FAST_DRY_RUN") == "1" and not torch.cuda.is_available()
DEVICE = "cpu" if DRY_RUN else "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available() and not DRY_RUN, reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # NaN and log(0) in its interpreter
]
on_a_gpu = pytest.mark.skipif(DRY_RUN, reason="there is no CUDA device")
# no powers of two; on a GPU several programs of every kernel: rows of five tiles, more tokens than one program whitens.
# Under compute-sanitizer a kernel takes a hundred times as long: RLHF_FAST_SMALL=1 leaves rows of three tiles.
SMALL = os.environ.get("RLHF_FAST_SMALL") == "1"
B, T, V, D = (6, 40, 515, 64) if DRY_RUN else (6, 40, 9001, 64) if SMALL else (6, 1500, 20_011, 64)


def inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple[dict, tuple[str, ...]]:
    """Arguments of an operation, and which of them want a gradient."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype)

    lengths = torch.tensor([[T], [1], [0], [3 * T // 7], [5 * T // 6], [T]], device=DEVICE)
    mask = torch.arange(T, device=DEVICE) < lengths
    labels = torch.randint(V, (B * T,), generator=generator, device=DEVICE)
    labels[::7] = -100
    head = {"hidden": normal(B * T, D), "weight": normal(V, D) * D**-0.5, "labels": labels}
    tokens = {"logprobs": -normal(B, T).abs(), "ref_logprobs": -normal(B, T).abs()}
    pairs = {"chosen": normal(B), "rejected": normal(B)}
    ranked = {"scores": normal(B, 4), "mask": torch.ones(B, 4, dtype=torch.bool, device=DEVICE)}
    per_token = {"old_logprobs": -normal(B, T).abs(), "advantages": normal(B), "mask": mask}
    shaped = {"scores": normal(B), **tokens, "mask": mask, "kl_coef": 0.1}
    values = {"values": normal(B, T), "mask": mask}
    rows, width = B * T // 8, 2 * D
    layer = {"w": normal(width, D) * D**-0.5, "a": normal(5, D).float() * D**-0.5, "b": normal(width, 5).float()}
    cache = {"keys": normal(B, 2, T, 2 * D), "values": normal(B, 2, T, 2 * D)}
    mlp = {"x": normal(rows, D), **layer, "down": normal(D, width) * width**-0.5}
    return {
        "token_logprobs": ({"logits": normal(B * T, V), "labels": labels, "entropy": True}, ("logits",)),
        "linear_logprobs": (head, ("hidden",)),
        "linear_cross_entropy": (head, ("hidden", "weight")),
        "sequence_logprobs": ({"logprobs": normal(B, T), "mask": mask}, ("logprobs",)),
        "gae": ({"rewards": normal(B, T), **values}, ()),
        "shaped_rewards": (shaped, ()),
        "kl_shaped_gae": ({**shaped, "values": values["values"]}, ()),
        "whiten": ({"x": normal(B, T), "mask": mask}, ()),
        "group_advantages": ({"rewards": normal(B), "group_size": 3}, ()),
        "kl_penalty": ({**tokens, "estimator": "k3"}, ("logprobs",)),
        "policy_loss": ({**tokens, **per_token, "kl_coef": 0.05}, ("logprobs",)),
        "value_loss": ({"old_values": normal(B, T), "returns": normal(B, T), **values}, ("values",)),
        "dpo_loss": ({**pairs, "ref_chosen": normal(B), "ref_rejected": normal(B)}, ("chosen", "rejected")),
        "pairwise_reward_loss": (pairs, ("chosen", "rejected")),
        "ranked_reward_loss": (ranked, ("scores",)),
        "decode_attention": ({"query": normal(B, 8, 2 * D), **cache, "lengths": lengths[:, 0]}, ()),
        "rms_norm": ({"x": normal(rows, D), "weight": normal(D)}, ("x", "weight")),
        "lora_linear": ({"x": normal(rows, D), **layer}, ("x", "a", "b")),
        "lora_mlp": (mlp, ("x", "a", "b")),
    }[name]


NAMES = (
    *("token_logprobs", "linear_logprobs", "linear_cross_entropy", "sequence_logprobs", "gae", "shaped_rewards"),
    *("kl_shaped_gae", "whiten", "group_advantages", "kl_penalty", "policy_loss", "value_loss", "dpo_loss"),
    *("pairwise_reward_loss", "ranked_reward_loss", "decode_attention", "rms_norm", "lora_linear"),
    "lora_mlp",
)


def lora_linear(x, w, a, b) -> torch.Tensor:
    return kernels.lora_linear(x, kernels.LoraWeights(w, a, b, 0.5))


def lora_mlp(x, w, a, b, down) -> torch.Tensor:
    """Both activations."""
    gate, up = kernels.LoraWeights(w, a, b, 0.5), kernels.LoraWeights(w, a * 2, b)
    last = kernels.LoraWeights(down)
    return sum(kernels.lora_mlp(x, gate, up, last, activation=name) for name in ("silu", "gelu_tanh"))


LAYERS = {"lora_linear": lora_linear, "lora_mlp": lora_mlp}  # tensors by name, in place of tuples of them


def leaves(found) -> list[torch.Tensor]:
    """The tensors of a result: a tensor, a tuple of them, or a loss with its metrics."""
    if isinstance(found, torch.Tensor):
        return [found]
    values = found.values() if isinstance(found, dict) else found
    return [x for value in values for x in leaves(value)]


def call(name: str, arguments: dict, wanted: tuple[str, ...]) -> list[torch.Tensor]:
    """Outputs, then gradients of their weighted sum."""
    found = leaves(LAYERS.get(name, getattr(kernels, name))(**arguments))
    ends = [x for x in found if x.requires_grad]
    if not wanted:
        return found
    upstream = [torch.linspace(0.5, 1.5, x.numel(), device=DEVICE, dtype=x.dtype).view_as(x) for x in ends]
    return [*(x.detach() for x in found), *torch.autograd.grad(ends, [arguments[n] for n in wanted], upstream)]


def prepared(name: str, dtype: torch.dtype = torch.float32) -> tuple[dict, tuple[str, ...]]:
    arguments, wanted = inputs(name, dtype)
    for argument in wanted:
        arguments[argument].requires_grad_()
    return arguments, wanted


@pytest.fixture(params=[b for b in BACKENDS if b != "cpu"])
def gpu_backend(request):
    """Every backend that runs on a GPU, in front of the others; an operation without it runs on the next."""
    with use_backend(f"{request.param},triton,cuda,reference"):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_backends_agree_with_the_reference(name, dtype, gpu_backend):
    """The reference on the same device: 2e-5 of the largest value in float32, the spacing of bfloat16 in that."""
    arguments, wanted = prepared(name, dtype)
    found = call(name, arguments, wanted)
    with use_backend("reference"):
        expected = call(name, arguments, wanted)
    for x, y in zip(found, expected, strict=True):
        rounded = x.dtype != torch.float32 or name.startswith(("linear", "lora"))  # on the way, by matrix products
        tolerance = 2e-5 if not rounded else 1.6e-2 if dtype != torch.float32 else 1e-4
        assert x.dtype == y.dtype
        assert (x.double() - y.double()).abs().max() <= tolerance * y.double().abs().max().clamp(min=1e-3)


@on_a_gpu
@pytest.mark.parametrize("name", NAMES)
def test_no_operation_waits_for_the_device(name, gpu_backend):
    arguments, wanted = prepared(name)
    call(name, arguments, wanted)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(name, arguments, wanted)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_graph_replays_on_new_inputs(name, gpu_backend):
    """Captured once, replayed after the inputs changed in place: what it gives then is what a call gives."""
    arguments, wanted = prepared(name)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(name, arguments, wanted)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(name, arguments, wanted)
    with torch.no_grad():
        for x in arguments.values():
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x.mul_(0.5)
    graph.replay()
    for x, y in zip(found, call(name, arguments, wanted), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@on_a_gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_side_stream_sees_what_was_written_on_it(name, gpu_backend):
    """Inputs are poisoned, and mended late on the side stream: a kernel on another stream would read the poison."""
    arguments, wanted = prepared(name)
    expected = call(name, arguments, wanted)
    right = {
        n: x.detach().clone() for n, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    with torch.no_grad():
        for n in right:
            arguments[n].fill_(float("nan"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            for n, x in right.items():
                arguments[n].copy_(x)
        found = call(name, arguments, wanted)
    torch.cuda.current_stream().wait_stream(side)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@on_a_gpu
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in ("cpu", "reference")])
def test_offsets_past_two_to_the_31(backend):
    """33,000 rows of 65,537 words are 2.16e9 elements; rows at both ends and either side of 2^31 against float64."""
    rows, vocab_size = 33_000, 65_537
    boundary = 2**31 // vocab_size
    some = torch.tensor([0, 1, boundary - 1, boundary, boundary + 1, rows - 1], device=DEVICE)
    assert boundary < rows - 1
    probe = torch.zeros(1, 1, device=DEVICE, dtype=torch.bfloat16)
    for op in OPS["logprobs"]:
        if op.startswith("token_logprobs") and (reason := available("logprobs", backend, op, probe)):
            pytest.skip(f"{backend}: {reason}")
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free GPU memory")
    logits = torch.zeros(rows, vocab_size, dtype=torch.bfloat16, device=DEVICE)
    logits[some] = torch.randn(len(some), vocab_size, device=DEVICE).bfloat16() * 3
    labels = torch.full((rows,), vocab_size - 1, device=DEVICE)
    logits.requires_grad_()
    with use_backend(backend):
        logprobs, entropy = kernels.token_logprobs(logits, labels, entropy=True, inplace_backward=False)
        (gradient,) = torch.autograd.grad([logprobs, entropy], logits, [torch.ones_like(logprobs)] * 2)
    wide = logits.detach()[some].double().requires_grad_()
    log_p = wide.log_softmax(-1)
    exact = log_p[:, -1], -(log_p.exp() * log_p).sum(-1)
    (expected,) = torch.autograd.grad(exact, wide, [torch.ones_like(x) for x in exact])
    torch.testing.assert_close(logprobs[some].double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy[some].double(), exact[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient[some].double(), expected, rtol=8e-3, atol=1e-6)
    # the untouched rows are uniform: their gradient is -p everywhere but at the label
    assert (gradient[boundary + 2 : rows - 1, 0].float() + 1 / vocab_size).abs().max() < 1e-7


@on_a_gpu
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in ("cpu", "reference")])
def test_more_rows_than_a_second_grid_axis_holds(backend):
    """70,000 rows: a kernel with rows on grid axis y would stop at 65,535."""
    logits = torch.randn(70_000, 5, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    labels = torch.arange(70_000, device=DEVICE) % 5
    if reason := available("logprobs", backend, "token_logprobs_forward", logits, labels):
        pytest.skip(f"{backend}: {reason}")
    with use_backend(f"{backend},reference"):
        found = kernels.token_logprobs(logits, labels)
    expected = logits.double().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@on_a_gpu
def test_a_label_out_of_range_makes_its_row_nan_and_no_other(gpu_backend):
    logits = torch.randn(4, V, device=DEVICE)
    labels = torch.tensor([0, V, -1, 3], device=DEVICE)
    found = kernels.token_logprobs(logits, labels)
    assert found.isnan().tolist() == [False, True, True, False]
