"""The page of what the memory plan says, ``bench/results/plan.md``, made again: ``python -m bench.plan``.

A test compares the page with the plan, so whoever changes a formula runs this.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_fast.run.memory import GB, METHODS, SIZES, Job, Plan, choose, find_shape, plan

PAGE = Path(__file__).parent / "results" / "plan.md"
MODELS = ("Qwen2.5-7B", "Llama-3.1-8B")
LENGTHS = (2048, 8192, 32768)
INTRODUCTION = """# What the memory plan says

Of Qwen2.5-7B and Llama-3.1-8B, LoRA of rank 16 (`rlhf-fast plan --model MODEL --method METHOD --length TOKENS`), in GB. These are
plans, not measurements: the GPU runs that will stand beside them are still to come. A cell: GB needed, base, tokens of a
micro-batch, `keep` (no checkpointing) or `off` (inputs of layers offloaded), `x N` sequences sampled at a time. `-` does not fit.
"""
BY_HAND = """
## One micro-batch of SFT against the figures worked by hand

Qwen2.5-7B, peak of tensors and with context and allocator slack (0.6 GB and 4%); by hand in brackets, to a GB.

| | 2k | 8k | 32k |
|---|---|---|---|
"""
# settings, and the peaks that others worked out by hand (None: nobody did)
WORKED = {
    "bf16": ({"base": "bf16"}, (19, 21, 31)),
    "bf16, offloaded": ({"base": "bf16", "offload": True}, (None, None, 25)),
    "NF4": ({"base": "nf4"}, (9, 11, 22)),
    "NF4, offloaded": ({"base": "nf4", "offload": True}, (None, None, 15)),
    "bf16, PEFT's own layers": ({"base": "bf16", "kernels": "peft"}, (None, None, None)),
}


def page() -> str:
    parts = [INTRODUCTION]
    for model in MODELS:
        shape = find_shape(model)
        parts.append(f"\n## {model}\n\n| method | tokens | {' | '.join(f'{c} GB' for c in SIZES)} |\n|{'---|' * 6}\n")
        for method in METHODS:
            for length in LENGTHS:
                job = Job(shape=shape, method=method, length=length)
                cells = " | ".join(cell(choose(job, card * GB)) for card in SIZES)
                parts.append(f"| {method} | {length:,} | {cells} |\n")
    parts.append(BY_HAND)
    for name, (settings, worked) in WORKED.items():
        made = [plan(Job(shape=find_shape("Qwen2.5-7B"), length=n, **settings)) for n in LENGTHS]
        cells = (
            f"{m.tensors / GB:.1f} / {m.needed / GB:.1f}" + (f" ({hand})" if hand else "")
            for m, hand in zip(made, worked)
        )
        parts.append(f"| {name} | {' | '.join(cells)} |\n")
    return "".join(parts)


def cell(made: Plan) -> str:
    """``21.0 bf16 8k keep x 128``."""
    if not made.fits:
        return f"- ({made.needed / GB:.0f})"
    job = made.job
    words = [f"{made.needed / GB:.1f}", job.base, f"{job.tokens / 1024:.0f}k"]
    words += ["off"] if job.offload else [] if job.checkpointing else ["keep"]
    words += [f"x {job.rollout_batch_size}"] if job.samples else []
    return " ".join(words)


def main() -> None:
    PAGE.write_text(page())
    print(PAGE)


if __name__ == "__main__":
    main()
