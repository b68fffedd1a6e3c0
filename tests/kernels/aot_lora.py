"""What aot.py compiles of RMSNorm and of the gated activation: widths of real models and of a head, both types."""

from rlhf_fast.kernels.lora import triton_impl as lora
from rlhf_fast.kernels.norm import triton_impl as norm

NAMES = "x weight out grad d_x gate up d_gate d_up"
FP32 = {f"{name}_ptr": "*fp32" for name in NAMES.split()} | {"rstd_ptr": "*fp32", "partials_ptr": "*fp32"}
FP32 |= {"num_rows": "i32", "width": "i32:16", "eps": "fp32", "offset": "fp32", "size": "i32:16"}
BF16 = FP32 | {f"{name}_ptr": "*bf16" for name in NAMES.split()}


def cases() -> dict[str, tuple]:
    odd = BF16 | {"width": "i32"}  # read one number at a time
    one = norm.tiling(1) | {"width": 1, "num_rows": 1}
    found = gated("bf16", BF16) | gated("fp32", FP32)
    # a head of 128, Qwen2.5-7B, the widest
    for width in (128, 3584, norm.WIDEST):
        found |= norms(f"bf16, {width}", BF16, norm.tiling(width), True)
    found |= norms("fp32", FP32, norm.tiling(norm.WIDEST), False) | norms("of one column and row", FP32, one, True)
    found |= norms("odd", odd, norm.tiling(norm.WIDEST_ODD), True)
    for name, types, sizes in (("bf16", BF16, {}), ("odd", odd, {}), ("of one column and row", FP32, one)):
        constants = sizes | norm.WEIGHT_TILE | {"ROUND_FIRST": True}
        found[f"norm weight {name}"] = (norm.norm_weight_kernel, types, constants)
    return found


def norms(name: str, types: dict, sizes: dict, round_first: bool) -> dict[str, tuple]:
    return {
        f"norm forward {name}": (norm.norm_forward_kernel, types, sizes | {"ROUND_FIRST": round_first}),
        f"norm backward {name}": (norm.norm_backward_kernel, types, sizes),
    }


def gated(kind: str, types: dict) -> dict[str, tuple]:
    found, sizes = {}, {"BLOCK": lora.BLOCK, "num_warps": lora.WARPS}
    for gelu in (False, True):
        name = f"{kind} {'gelu' if gelu else 'silu'}"
        found[f"gated forward {name}"] = (lora.gated_forward_kernel, types, sizes | {"GELU": gelu})
        found[f"gated backward {name}"] = (lora.gated_backward_kernel, types, sizes | {"GELU": gelu})
    return found
