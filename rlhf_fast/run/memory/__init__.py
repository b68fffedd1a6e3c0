"""How much memory a run takes, part by part, and which settings make it fit. Arithmetic only: no torch, no model.

``rlhf-fast plan`` asks before anything is loaded, a trainer asks once it has its model and compares the answer with what the
GPU measured. Sizes are in :mod:`.shapes`, the run in :mod:`.job`, every formula once in :mod:`.parts`, the settings that fit in
:mod:`.planning`. Bytes everywhere; a GB is 10^9 of them. The optimizer step needs less than any pass: AdamW runs in one kernel
over all tensors, in place.

What is alive when (a plan's ``peaks``)::

    backward of the last layer     always + inputs + update + layer (+ gradients, after an earlier micro-batch)
    backward of the first layer    always + gradients + update + layer
    loss                           always + inputs + update + head (+ gradients, after an earlier micro-batch)
    prompts of a rollout           always + prefill
    tokens of a rollout            always + decode

``inputs`` are the checkpointed inputs of the layers, gone one by one in the backward pass; ``layer`` is what one layer needs
while it goes backward, ``head`` what the loss needs, ``update`` what is there from the start of a forward pass to the end of
its backward pass. ``outside`` is what tensors do not account for, ``vllm`` a vLLM in the same process that is there only while
it samples, beside what is always there; ``host`` is what waits in pinned host memory and takes nothing of the GPU. Keys and
values of a rollout count where the policy itself writes: not if a server or vLLM samples and nothing is evaluated.
"""

from .activations import saved_per_token
from .job import GB, METHODS, REFERENCED, WHENS, Job, Part
from .parts import OPTIMIZER_BYTES, SAMPLING, head_rows, kv_per_token, kv_tokens, passes, resident, rollout
from .planning import CONTEXT_BYTES, FREE, GPUS, SIZES, SLACK, Plan, as_dict, attempts, choose, gpu_bytes, plan
from .shapes import ARCHITECTURES, PRESETS, Shape, Traits, find_shape

__all__ = [
    "ARCHITECTURES",
    "CONTEXT_BYTES",
    "FREE",
    "GB",
    "GPUS",
    "METHODS",
    "OPTIMIZER_BYTES",
    "PRESETS",
    "REFERENCED",
    "SAMPLING",
    "SIZES",
    "SLACK",
    "WHENS",
    "Job",
    "Part",
    "Plan",
    "Shape",
    "Traits",
    "as_dict",
    "attempts",
    "choose",
    "find_shape",
    "gpu_bytes",
    "head_rows",
    "kv_per_token",
    "kv_tokens",
    "passes",
    "plan",
    "resident",
    "rollout",
    "saved_per_token",
]
