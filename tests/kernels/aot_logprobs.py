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
        forward = logprobs.tiling(LLAMA, logprobs.TILE_BYTES // (2 if kind == "bf16" else 4))
        backward = forward | {"HAS_ENTROPY": entropy}
        flags, name = {"HAS_SOFTCAP": softcap}, f"{kind}{' softcap' if softcap else ''}"
        found[f"forward {name}"] = (logprobs.forward_kernel, types, forward | flags)
        found[f"backward {name}"] = (logprobs.backward_kernel, types, backward | flags)
    padded = types | {"vocab_size": "i32"}
    found["forward odd, padded"] = (logprobs.forward_kernel, padded, forward | {"HAS_SOFTCAP": False})
    found["forward odd"] = (logprobs.forward_kernel, types | ODD, forward | flags)
    combine = {key: value for key, value in long_rows(QWEN).items() if key not in ("BLOCK", "POLLS")}
    return found | {"combine": (logprobs.combine_kernel, types, combine | flags | {"num_warps": 2})}


def head_cases() -> dict[str, tuple]:
    fp32 = TYPES | {"logits_ptr": "*fp32", "out_ptr": "*fp32"}
    bf16 = fp32 | {"out_ptr": "*bf16"}
    short = logprobs.tiling(4096, head.TILE)
    plain, softcap = {"HAS_SOFTCAP": False}, {"HAS_SOFTCAP": True}
    return {
        "head bf16": (head.long_rows_kernel, bf16, long_rows(LLAMA) | plain),
        "head bf16 softcap": (head.long_rows_kernel, bf16, long_rows(QWEN) | softcap),
        "head fp32": (head.long_rows_kernel, fp32, long_rows(LLAMA) | plain),
        "head odd, padded": (head.long_rows_kernel, bf16 | {"vocab_size": "i32"}, long_rows(50_257) | plain),
        "head odd": (head.long_rows_kernel, bf16 | ODD, long_rows(50_257) | softcap),
        "head bf16, short rows": (head.short_rows_kernel, bf16, short | plain),
        "head fp32 softcap, short rows": (head.short_rows_kernel, fp32, short | softcap),
    }


def long_rows(vocab_size: int) -> dict[str, int]:
    sizes = logprobs.tiling(vocab_size, head.TILE)
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
