"""What aot.py compiles of the advantages."""

from rlhf_fast.kernels.advantages import triton_impl as advantages

TYPES = {f"{name}_ptr": "*fp32" for name in ("rewards", "values", "bootstrap", "advantages", "returns")}
TYPES |= {"mask_ptr": "*u8", "cu_seqlens_ptr": "*i32", "width": "i32:16", "gamma": "fp32", "lam": "fp32"}


def cases() -> dict[str, tuple]:
    scan = {"BLOCK": advantages.BLOCK, "num_warps": advantages.SCAN_WARPS}
    packed = scan | {"HAS_BOOTSTRAP": False, "PACKED": True, "BLOCK": advantages.PACKED_BLOCK}
    # a width of 1 is compiled in as a constant, which has its own traps
    one = {"HAS_BOOTSTRAP": True, "PACKED": False, "width": 1, "BLOCK": 32, "num_warps": 1}
    return {
        "gae padded": (advantages.gae_kernel, TYPES, {"HAS_BOOTSTRAP": True, "PACKED": False} | scan),
        "gae packed": (advantages.gae_kernel, TYPES, packed),
        "gae of one token": (advantages.gae_kernel, TYPES, one),
    }
