"""What aot.py compiles of decoding: heads of real models, in the cache's types, with one share of the keys and several."""

from rlhf_fast.kernels.attention import triton_impl as attention

NUMBERS = {"scale_log2": "fp32"} | dict.fromkeys(
    ("window", "longest", "heads", "group", "width", "value_width", "shares"), "i32"
)
STRIDES = {f"{x}_{place}": "i64:16" for x in ("key", "value") for place in ("row", "head", "place")}
COMMON = NUMBERS | STRIDES | {"lengths_ptr": "*i64", "partials_ptr": "*fp32", "statistics_ptr": "*fp32"}


def cases() -> dict[str, tuple]:
    found = {}
    # Qwen2.5-7B, Gemma; a float32 cache, of the widest heads too
    for kind, size, width in (("bf16", 2, 128), ("bf16", 2, 256), ("fp32", 4, 128), ("fp32", 4, 256)):
        types = COMMON | {f"{name}_ptr": f"*{kind}" for name in ("query", "keys", "values", "out")}
        types |= {"width": "i32:16", "value_width": "i32:16"}
        sizes = attention.tiling(width, width, size)
        for split in (False, True):
            name = f"decode {kind}, {width}{', split' if split else ''}"
            found[name] = (attention.decode_kernel, types, sizes | {"SPLIT": split, "WIDEN": False})
        combine = {"VALUE_COLUMNS": sizes["VALUE_COLUMNS"], "SHARE": sizes["SHARE"], "num_warps": 1}
        found[f"combine {kind}, {width}"] = (attention.combine_kernel, types, combine)
    return found
