"""Compile every Triton kernel for real targets, without a GPU, and print what the machine code is like.

Run by test_aot.py in a process of its own, as the test process may have Triton's interpreter switched on.
One JSON object per kernel and target: registers, stack bytes, local loads and stores (spills), 16-byte loads.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTER_OR_STRIDE = [["tt.divisibility", 16]]


def main() -> None:
    from rlhf_fast.kernels.advantages import triton_impl as advantages
    from rlhf_fast.kernels.linear_logprobs import triton_impl as linear_logprobs
    from rlhf_fast.kernels.logprobs import triton_impl as logprobs

    row = {
        "labels_ptr": "*i64",
        "logprobs_ptr": "*fp32",
        "entropy_ptr": "*fp32",
        "lse_ptr": "*fp64",
        "grad_logprobs_ptr": "*fp32",
        "grad_entropy_ptr": "*fp32",
        "vocab_size": "i32",
        "stride": "i64",
        "out_stride": "i64",
        "inverse_temperature": "fp32",
        "softcap": "fp32",
        "logit_scale": "fp32",
        "ignore_index": "i32",
    }
    tokens = {f"{name}_ptr": "*fp32" for name in ("rewards", "values", "bootstrap", "advantages", "returns")}
    tokens |= {"mask_ptr": "*u8", "cu_seqlens_ptr": "*i32", "width": "i32", "gamma": "fp32", "lam": "fp32"}
    wide = {"BLOCK": 4096, "num_warps": logprobs.num_warps(4096)}
    bf16, fp32 = {"logits_ptr": "*bf16", "out_ptr": "*bf16"}, {"logits_ptr": "*fp32", "out_ptr": "*bf16"}
    scan = {"BLOCK": 1024, "num_warps": 4}
    cases = {
        "token_logprobs forward bf16": (logprobs.forward_kernel, row | bf16, {"HAS_SOFTCAP": False} | wide),
        "token_logprobs forward softcap": (logprobs.forward_kernel, row | bf16, {"HAS_SOFTCAP": True} | wide),
        "token_logprobs backward bf16": (
            logprobs.backward_kernel,
            row | bf16,
            {"HAS_SOFTCAP": False, "HAS_ENTROPY": True} | wide,
        ),
        "token_logprobs backward softcap": (
            logprobs.backward_kernel,
            row | fp32,
            {"HAS_SOFTCAP": True, "HAS_ENTROPY": True} | wide,
        ),
        "head_rows": (linear_logprobs.head_rows_kernel, row | fp32, {"HAS_SOFTCAP": False, "HAS_OUT": True} | wide),
        "head_rows softcap": (
            linear_logprobs.head_rows_kernel,
            row | fp32,
            {"HAS_SOFTCAP": True, "HAS_OUT": True} | wide,
        ),
        "gae padded": (advantages.gae_kernel, tokens, {"HAS_BOOTSTRAP": True, "PACKED": False} | scan),
        "gae packed": (advantages.gae_kernel, tokens, {"HAS_BOOTSTRAP": False, "PACKED": True} | scan),
    }
    # arguments that equal 1 are compiled in as constants, which has its own traps
    one = {"vocab_size": 1, "stride": 1, "out_stride": 1, "BLOCK": 1, "num_warps": 1, "HAS_SOFTCAP": True}
    single = {
        "head_rows of one word": (linear_logprobs.head_rows_kernel, row | fp32, {"HAS_OUT": True} | one),
        "token_logprobs backward of one word": (logprobs.backward_kernel, row | fp32, {"HAS_ENTROPY": True} | one),
        "gae of one token": (
            advantages.gae_kernel,
            tokens,
            {"HAS_BOOTSTRAP": True, "PACKED": False, "width": 1, "BLOCK": 32, "num_warps": 1},
        ),
    }
    for capability in map(int, sys.argv[1:]):
        for name, (kernel, types, constants) in (cases | (single if capability == 90 else {})).items():
            print(
                json.dumps({"kernel": name, "capability": capability} | measure(kernel, types, constants, capability))
            )


def measure(kernel, types: dict[str, str], constants: dict, capability: int) -> dict:
    """Compile one kernel as a launch with aligned pointers and V divisible by 16 would, and read its SASS."""
    constants = dict(constants)
    warps = constants.pop("num_warps")
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {
        (i,): POINTER_OR_STRIDE
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in ("stride", "out_stride", "vocab_size")
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", file.name)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "wide_loads": len(re.findall(r"\bLDG\.E\.\S*128", sass)),
    }


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        main()
