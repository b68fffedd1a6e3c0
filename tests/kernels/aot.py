"""Compile every Triton kernel for real targets, without a GPU, and print what the machine code is like.

    python tests/kernels/aot.py 80 90 100

Each ``aot_<family>.py`` beside this file lists what to compile in ``cases()``: a name -> (kernel, types, constants).
``types`` maps arguments to ``"*fp32"``, ``"i64"`` and so on, ``"i32:16"`` if divisible by 16 (pointers are taken as
aligned); ``constants`` maps the constexpr arguments, those to specialize to a number, and ``num_warps``. Run by
test_triton_aot.py in a process of its own, as the test process may have Triton's interpreter switched on. One JSON
object per case and target: registers, stack bytes, local loads and stores (spills), instructions, loads of 16 bytes and
of 4. Arguments are cases whose names contain a word, or targets:

    python tests/kernels/aot.py 90 forward
"""

import importlib
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
DIVISIBLE = [["tt.divisibility", 16]]


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def main() -> None:
    targets = [int(word) for word in sys.argv[1:] if word.isdigit()]
    words = [word for word in sys.argv[1:] if not word.isdigit()]
    for path in sorted(Path(__file__).parent.glob("aot_*.py")):
        for name, (kernel, types, constants) in importlib.import_module(path.stem).cases().items():
            if words and not any(word in name for word in words):
                continue
            where = {"case": name, "family": kernel.fn.__module__.split(".")[-2], "kernel": kernel.fn.__name__}
            for capability in targets:
                facts = {"capability": capability, "block": constants.get("BLOCK"), "warps": constants["num_warps"]}
                print(json.dumps(where | facts | measure(kernel, types, constants, capability)), flush=True)


def measure(kernel, types: dict[str, str], constants: dict, capability: int) -> dict[str, int]:
    """Compile one kernel as a launch with these arguments would, and read its SASS."""
    constants = dict(constants)
    warps = constants.pop("num_warps")
    stages = {"num_stages": constants.pop("num_stages")} if "num_stages" in constants else {}
    kinds = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {(i,): DIVISIBLE for i, kind in enumerate(kinds.values()) if kind.startswith("*") or kind.endswith(":16")}
    signature = {name: kind.removesuffix(":16") for name, kind in kinds.items()}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": True} | stages
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", file.name)
    path = longest_path(sass)
    instructions = [name for name in INSTRUCTION.findall(sass) if name != "NOP"]
    return {
        "instructions": path,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "wide_loads": sum(bool(re.match(r"LDG\.E\.\S*128", name)) for name in instructions),
        "scalar_loads": sum(bool(re.match(r"LDG\.E(?!\S*(?:64|128|U8|U16))", name)) for name in instructions),
    }


def longest_path(sass: str) -> int:
    """The most instructions that a thread can execute without going back in a loop: at most one pass of each."""
    lines = re.findall(
        r"^(\.L_\w+):|/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", sass, re.MULTILINE
    )
    after, longest = {}, 0
    # from the end, so that every forward branch finds its target; a backward one finds none and is not taken
    for label, guard, name, operands in reversed(lines):
        if label:
            after[label] = longest
            continue
        target = re.search(r"`\((\.L_\w+)\)", operands)
        taken = after.get(target[1], 0) if name.startswith("BRA") and target else 0
        if name.startswith(("EXIT", "RET", "BRA")):
            always = not guard and not operands.lstrip().startswith(("P", "!P", "UP", "!UP"))
            longest = max(taken, 0 if always else longest)
        longest += name != "NOP"
    return longest


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        main()
