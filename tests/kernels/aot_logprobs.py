"""What aot.py compiles of the logits' kernels and of the fused head's row kernels."""

import triton

from rlhf_fast.kernels.linear_logprobs import triton_impl as head
from rlhf_fast.kernels.logprobs import triton_impl as logprobs

TYPES = {
    "labels_ptr": "*i64",
    "logprobs_ptr": "*fp32",
    "entropy_ptr": "*fp32",
    "lse_ptr": "*fp64",
    "grad_logprobs_ptr": "*fp32",
    "grad_entropy_ptr": "*fp32",
    "partials_ptr": "*fp32",
    "u_labels_ptr": "*fp32",
    "counters_ptr": "*i32",
    "num_tiles": "i32",
    "lag": "i32",
    "vocab_size": "i32:16",
    "stride": "i64:16",
    "out_stride": "i64:16",
    "inner": "fp32",
    "outer": "fp32",
    "ignore_index": "i32",
}
ODD = {"vocab_size": "i32", "stride": "i64", "out_stride": "i64"}  # 50,257 words: no row but the first is aligned
LLAMA, QWEN = 128_256, 151_936  # 32 and 38 tiles of float32: a lane of a warp for each, and more than that


def cases() -> dict[str, tuple]:
    return token_cases() | head_cases() | one_word_cases()


def token_cases() -> dict[str, tuple]:
    found = {}
    for kind, softcap, entropy in (("bf16", False, True), ("bf16", True, False), ("fp32", True, True)):
        types = TYPES | {"logits_ptr": f"*{kind}", "out_ptr": f"*{kind}"}
        forward = logprobs.tiling(LLAMA, 30.0 if softcap else None)
        backward = forward | {"HAS_ENTROPY": entropy}
        name = f"{kind}{' softcap' if softcap else ''}"
        found[f"forward {name}"] = (logprobs.forward_kernel, types, forward)
        found[f"backward {name}"] = (logprobs.backward_kernel, types, backward)
    padded = types | {"vocab_size": "i32"}
    found["forward odd, padded"] = (logprobs.forward_kernel, padded, logprobs.tiling(50_257, None))
    found["forward odd"] = (logprobs.forward_kernel, types | ODD, forward)
    combine = {key: value for key, value in long_rows(QWEN).items() if key not in ("BLOCK", "POLLS")}
    return found | {"combine": (logprobs.combine_kernel, types, combine | {"num_warps": 2})}


def head_cases() -> dict[str, tuple]:
    fp32 = TYPES | {"logits_ptr": "*fp32", "out_ptr": "*fp32"}
    bf16 = fp32 | {"out_ptr": "*bf16"}
    short, capped = logprobs.tiling(logprobs.TILE, None), logprobs.tiling(logprobs.CAPPED_TILE, 30.0)
    return {
        "head bf16": (head.long_rows_kernel, bf16, long_rows(LLAMA)),
        "head bf16 softcap": (head.long_rows_kernel, bf16, long_rows(QWEN, 30.0)),
        "head fp32": (head.long_rows_kernel, fp32, long_rows(LLAMA)),
        "head odd, padded": (head.long_rows_kernel, bf16 | {"vocab_size": "i32"}, long_rows(50_257)),
        "head odd": (head.long_rows_kernel, bf16 | ODD, long_rows(50_257, 30.0)),
        "head bf16, short rows": (head.short_rows_kernel, bf16, short),
        "head fp32 softcap, short rows": (head.short_rows_kernel, fp32, capped),
    }


def long_rows(vocab_size: int, softcap: float | None = None) -> dict[str, int]:
    sizes = logprobs.tiling(vocab_size, softcap)
    return sizes | {"LANES": triton.next_power_of_2(sizes["TILES"]), "POLLS": head.POLLS}


def one_word_cases() -> dict[str, tuple]:
    """Arguments that equal 1 are compiled in as constants, which has its own traps."""
    types = TYPES | {"logits_ptr": "*fp32", "out_ptr": "*fp32"}
    one = {"vocab_size": 1, "stride": 1, "BLOCK": 1, "TILES": 1, "num_warps": 1, "HAS_SOFTCAP": True}
    written = one | {"out_stride": 1}
    return {
        "forward of one word": (logprobs.forward_kernel, types, one),
        "backward of one word": (logprobs.backward_kernel, types, written | {"HAS_ENTROPY": True}),
        "head of one word": (head.short_rows_kernel, types, written),
    }
