"""What aot.py compiles of the losses and of what feeds them: each recipe's options, everything at once, a width of 1."""

from rlhf_fast.kernels.advantages import triton_impl as advantages
from rlhf_fast.kernels.kl import triton_impl as kl
from rlhf_fast.kernels.logprobs import triton_impl as logprobs
from rlhf_fast.kernels.policy import triton_impl as policy
from rlhf_fast.kernels.preference import KINDS
from rlhf_fast.kernels.preference import triton_impl as preference
from rlhf_fast.kernels.reward import triton_impl as reward

FLOATS = (
    "logprobs old advantages ref ref_logprobs rollout entropy denominator loss losses figures gradient values returns "
    "entropy_gradient partials value slope grad out chosen rejected ref_chosen ref_rejected margin chosen_rewards "
    "rejected_rewards slopes scores x bootstrap rewards kl moments sums counts"
)
NUMBERS = "divisor lower upper dual_clip is_clip kl_coef entropy_coef clip beta smoothing log_kept log_flipped center gamma lam eps"
TYPES = {f"{name}_ptr": "*fp32" for name in FLOATS.split()} | dict.fromkeys(NUMBERS.split(), "fp32")
TYPES |= {"mask_ptr": "*u8", "cu_seqlens_ptr": "*i32", "arrived_ptr": "*i32"}
TYPES |= {
    "num_tokens": "i32:16",
    "num_pairs": "i32",
    "width": "i32:16",
    "num_sequences": "i32",
    "num_rewards": "i32",
    "group_size": "i32",
}
TYPES |= {"ids_ptr": "*i64"}
POLICY = {
    "KIND": "clip",
    "LEVEL": "token",
    "ESTIMATOR": "k3",
    "MEAN_OF_MEANS": False,
    "CORRECTED": False,
    "PER_TOKEN": True,
    "HAS_OLD": True,
    "HAS_REF": False,
    "HAS_ROLLOUT": False,
    "HAS_ENTROPY": False,
    "HAS_DENOMINATOR": True,
    "HAS_GRADIENT": True,
    "HAS_ENTROPY_GRADIENT": False,
    **policy.POLICY_ROW,
}
EVERYTHING = {
    "CORRECTED": True,
    "PER_TOKEN": False,
    "HAS_REF": True,
    "HAS_ROLLOUT": True,
    "HAS_ENTROPY": True,
    "HAS_ENTROPY_GRADIENT": True,
}
VALUE = {
    "HAS_CLIP": True,
    "MEAN_OF_MEANS": False,
    "HAS_DENOMINATOR": False,
    "HAS_GRADIENT": True,
    **policy.VALUE_ROW,
}
FLAT = {"LAYOUT": "flat", "BLOCK": policy.BLOCK, "num_warps": policy.WARPS}
PACKED, PADDED = (FLAT | {"LAYOUT": layout, "BLOCK": policy.SEQUENCE_BLOCK} for layout in ("packed", "padded"))


def cases() -> dict[str, tuple]:
    found = {f"policy {name}": (policy.policy_kernel, TYPES, POLICY | options) for name, options in policies().items()}
    found |= {f"value {name}": (policy.value_kernel, TYPES, VALUE | options) for name, options in values().items()}
    flat = {"BLOCK": kl.BLOCK, "num_warps": kl.WARPS}
    found["scale"] = (policy.scale_kernel, TYPES, flat)
    for estimator in ("k1", "k3", "k3+"):
        found[f"kl {estimator}"] = (kl.kl_kernel, TYPES, flat | {"ESTIMATOR": estimator, "HAS_SLOPE": True})
    pairs = {"BLOCK": preference.BLOCK, "num_warps": preference.WARPS, "HAS_SLOPES": True}
    for kind in KINDS:
        found[f"dpo {kind}"] = (preference.dpo_kernel, TYPES, pairs | {"KIND": kind})
    found["pairwise"] = (reward.pairwise_kernel, TYPES, pairs | {"HAS_MARGIN": True})
    return found | of_sequences()


def policies() -> dict[str, dict]:
    """PPO, DAPO's mean over tokens, GRPO, GSPO and CISPO; one token per row compiles the width in."""
    return {
        "ppo": FLAT,
        "ppo of an odd number of tokens": FLAT | {"num_tokens": 1_000_003},
        "ppo without a gradient": FLAT | {"HAS_GRADIENT": False, "HAS_OLD": False, "HAS_DENOMINATOR": False},
        "everything": FLAT | EVERYTHING,
        "everything of one token": FLAT | EVERYTHING | {"width": 1, "num_tokens": 1},
        "everything by sequence": PACKED | EVERYTHING | {"LEVEL": "sequence", "MEAN_OF_MEANS": True},
        "grpo": PACKED | {"MEAN_OF_MEANS": True, "HAS_REF": True, "PER_TOKEN": False},
        "gspo": PADDED | {"LEVEL": "sequence", "MEAN_OF_MEANS": True, "PER_TOKEN": False},
        "gspo-token of one token": PADDED | {"LEVEL": "sequence_token", "width": 1},
        "cispo": PACKED | {"KIND": "cispo", "PER_TOKEN": False, "HAS_ROLLOUT": True, "CORRECTED": True},
        "reinforce": FLAT | {"KIND": "reinforce", "HAS_REF": True, "ESTIMATOR": "k2"},
    }


def values() -> dict[str, dict]:
    return {"ppo": FLAT, "by sequence": PACKED | {"MEAN_OF_MEANS": True}, "plain": PADDED | {"HAS_CLIP": False}}


def of_sequences() -> dict[str, tuple]:
    """Advantages, all but gae, which is in aot_advantages.py, and sums over sequences."""
    merge = {"LANES": advantages.LANES}
    padded = {"PACKED": False, "BLOCK": advantages.BLOCK, "num_warps": advantages.SCAN_WARPS}
    packed = padded | {"PACKED": True}
    flat = {"BLOCK": advantages.BLOCK, "num_warps": advantages.WARPS}
    shaped = {"ESTIMATOR": "k3", "HAS_BOOTSTRAP": True, "WHITEN": True} | merge
    found = {
        "shaped rewards": (advantages.shaped_rewards_kernel, TYPES, padded | {"ESTIMATOR": "k1"}),
        "shaped gae padded": (advantages.kl_shaped_gae_kernel, TYPES, padded | shaped),
        "shaped gae packed": (advantages.kl_shaped_gae_kernel, TYPES, packed | shaped | {"WHITEN": False}),
        "shaped gae of one token": (
            advantages.kl_shaped_gae_kernel,
            TYPES,
            shaped | {"PACKED": False, "width": 1, "BLOCK": 32, "num_warps": 1},
        ),
        "moments": (advantages.moments_kernel, TYPES, flat | merge),
        "whiten": (advantages.whiten_kernel, TYPES, flat | {"SHIFT_MEAN": True, "ALONE": False, "PACKED": False}),
        "whiten alone": (
            advantages.whiten_kernel,
            TYPES,
            {"SHIFT_MEAN": False, "ALONE": True, "PACKED": False}
            | {"BLOCK": advantages.SMALL, "num_warps": advantages.SMALL_WARPS},
        ),
        "whiten packed": (advantages.whiten_kernel, TYPES, flat | {"SHIFT_MEAN": True, "ALONE": False, "PACKED": True}),
    }
    for average in (False, True):
        name = f"sequence {'means' if average else 'sums'}"
        found[name] = (logprobs.sequence_sum_kernel, TYPES, packed | {"AVERAGE": average})
        found[f"{name} padded"] = (logprobs.sequence_sum_kernel, TYPES, padded | {"AVERAGE": average})
        found[f"{name} backward"] = (logprobs.sequence_spread_kernel, TYPES, padded | {"AVERAGE": average})
    sizes = {"OWN": advantages.OWN, "OTHERS": advantages.OTHERS, "num_warps": advantages.GROUP_WARPS}
    for scale, has_ids in (("group", True), ("batch", True), ("group", False)):
        options = sizes | {"SCALE": scale, "HAS_IDS": has_ids, "LEAVE_ONE_OUT": True}
        found[f"group by {scale}{' of ids' if has_ids else ''}"] = (advantages.group_kernel, TYPES, options)
    return found
