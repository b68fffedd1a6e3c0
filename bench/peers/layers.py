"""Layers of a decoder with adapters: RMSNorm (N, D), LoRA linears (N, I, O) and gated MLPs (N, D, F); rank 16."""

from __future__ import annotations

import torch
from torch.nn.functional import linear, silu
from torch.nn.functional import rms_norm as torch_rms_norm

from bench.harness import BOTH, FORWARD, Contender, Task, needs, ours
from rlhf_fast.kernels import LoraWeights, lora_linear, lora_mlp, rms_norm

EPS, RANK, SCALING = 1e-6, 16, 2.0
SHAPES = {
    "rms_norm": {"cpu": ((4096, 1024),), "cuda": ((16384, 4096), (16384, 3584)), "dry": ((5, 16),)},
    "lora_linear": {"cpu": ((1024, 1024, 1024),), "cuda": ((8192, 4096, 4096),), "dry": ((5, 16, 24),)},
    "lora_mlp": {"cpu": ((1024, 512, 2048),), "cuda": ((8192, 4096, 14336),), "dry": ((5, 16, 24),)},
}


def _normal(generator, device, dtype, *shape, scale=1.0):
    return (scale * torch.randn(*shape, generator=generator, device=device)).to(dtype)


def make_norm(shape, dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    return {"x": _normal(generator, device, dtype, *shape), "weight": torch.ones(shape[1], dtype=dtype, device=device)}


def _layer(generator, device, dtype, name, rows, columns):
    """A frozen weight in the type computed in, and float32 adapters as training has them."""
    return {
        f"{name}": _normal(generator, device, dtype, rows, columns, scale=columns**-0.5),
        f"{name}_a": _normal(generator, device, torch.float32, RANK, columns, scale=columns**-0.5),
        f"{name}_b": _normal(generator, device, torch.float32, rows, RANK, scale=0.1),
    }


def make_linear(shape, dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    n, columns, rows = shape
    return {"x": _normal(generator, device, dtype, n, columns)} | _layer(generator, device, dtype, "w", rows, columns)


def make_mlp(shape, dtype, device):
    generator = torch.Generator(device).manual_seed(0)
    n, width, inner = shape
    inputs = {"x": _normal(generator, device, dtype, n, width)}
    for name, rows, columns in (("gate", inner, width), ("up", inner, width), ("down", width, inner)):
        inputs |= _layer(generator, device, dtype, name, rows, columns)
    return inputs


def fused_norm(x, weight):
    return rms_norm(x, weight, EPS)


def plain_norm(x, weight):
    """As transformers' modules compute it."""
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def torch_norm(x, weight):
    return torch_rms_norm(x, weight.shape, weight, EPS)


def liger_norm(x, weight):
    from liger_kernel.ops import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)


def fused_linear(x, w, w_a, w_b):
    return lora_linear(x, LoraWeights(w, w_a, w_b, SCALING))


def peft_linear(x, w, w_a, w_b):
    """As PEFT's layer computes it: the adapter in its own type."""
    wide = x.to(w_a.dtype)
    return (linear(x, w) + linear(linear(wide, w_a), w_b) * SCALING).to(x.dtype)


def fused_mlp(x, gate, gate_a, gate_b, up, up_a, up_b, down, down_a, down_b):
    layers = ((gate, gate_a, gate_b), (up, up_a, up_b), (down, down_a, down_b))
    return lora_mlp(x, *(LoraWeights(*layer, SCALING) for layer in layers))


def peft_mlp(x, gate, gate_a, gate_b, up, up_a, up_b, down, down_a, down_b):
    product = silu(peft_linear(x, gate, gate_a, gate_b)) * peft_linear(x, up, up_a, up_b)
    return peft_linear(product, down, down_a, down_b)


def liger_mlp(x, gate, gate_a, gate_b, up, up_a, up_b, down, down_a, down_b):
    """PEFT's layers around Liger's activation, as its patches put them."""
    from liger_kernel.ops import LigerSiLUMulFunction

    product = LigerSiLUMulFunction.apply(peft_linear(x, gate, gate_a, gate_b), peft_linear(x, up, up_a, up_b))
    return peft_linear(product, down, down_a, down_b)


def tasks(device):
    def task(op, family, make, definition, function, wanted, peers, flops=None):
        contenders = (
            *ours(function, family, op, device),
            *peers,
            Contender("torch.compile", definition, compiled=True),
        )
        passes = {FORWARD: (), BOTH: wanted}
        dtypes = ("bf16",) if device == "cuda" else ("fp32",)
        return Task(op, family, make, definition, contenders, passes, SHAPES[op], dtypes=dtypes, flops=flops)

    def products(each):
        """The frozen weights' products, forward and, for the input's gradient, backward."""
        return lambda shape, passed: (2 if passed == BOTH else 1) * each * 2 * shape[0] * shape[1] * shape[2]

    norms = (
        Contender("transformers", plain_norm),
        Contender("torch.nn.functional", torch_norm),
        Contender("Liger", liger_norm, needs("liger_kernel", cuda=True)),
    )
    linear_wanted = ("x", "w_a", "w_b")
    mlp_wanted = ("x", *(f"{name}_{part}" for name in ("gate", "up", "down") for part in "ab"))
    return [
        task("rms_norm", "norm", make_norm, plain_norm, fused_norm, ("x",), norms),
        task(
            *("lora_linear", "lora", make_linear, peft_linear, fused_linear, linear_wanted),
            (Contender("PEFT", peft_linear),),
            products(1),
        ),
        task(
            *("lora_mlp", "lora", make_mlp, peft_mlp, fused_mlp, mlp_wanted),
            (Contender("PEFT", peft_mlp), Contender("PEFT, Liger", liger_mlp, needs("liger_kernel", cuda=True))),
            products(3),
        ),
    ]
