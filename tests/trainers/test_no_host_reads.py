"""No micro-step waits for the device: nothing in it reads a tensor back that a model's pass computed."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from rlhf_fast import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlhf_fast.trainers import loop

ROOT = str(Path(__file__).resolve().parents[2] / "rlhf_fast")
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")
WORDS = ["a", "hello", "to be", "no"]


class Trap(TorchFunctionMode):
    """Notes every read of a tensor that depends on a model's pass: on a GPU each would wait for all that was launched.

    On a CPU all tensors look alike, so those that came from the model are told by their gradient, or by being made from one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.computed: dict[int, torch.Tensor] = {}  # kept, so that no id is given again

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in _flat((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = any(x.requires_grad or id(x) in self.computed for x in tensors)
        if ours and getattr(function, "__name__", "") in READS:
            frames = [f for f in traceback.extract_stack() if f.filename.startswith(ROOT)]
            self.found.append(f"{function.__name__} in {Path(frames[-1].filename).name}, {frames[-1].name}")
        result = function(*args, **kwargs)
        if ours:
            for x in _flat(result):
                if isinstance(x, torch.Tensor):
                    self.computed[id(x)] = x
        return result


def _flat(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [x for part in value for x in _flat(part)] if isinstance(value, (list, tuple)) else [value]


def vowels(completions, **_):
    return [sum(c.count(v) for v in "aeiou") / 4 for c in completions]


PROMPTED = [{"prompt": f"{i} "} for i in range(4)]
PAIRS = [{"prompt": f"{i} ", "chosen": w, "rejected": w[:1] + "?"} for i, w in enumerate(WORDS)]
SFT = [{"prompt": f"{i} ", "completion": w} for i, w in enumerate(WORDS)]
LABELLED = [{**row, "label": i % 2 == 0} for i, row in enumerate(SFT)]
CASES = {
    "sft": (SFTTrainer, SFTConfig, SFT, {"packing": False}),
    "sft dft": (SFTTrainer, SFTConfig, SFT, {"loss_type": "dft", "neftune_noise_alpha": 5.0}),
    "reward": (RewardTrainer, RewardConfig, PAIRS, {}),
    "dpo": (DPOTrainer, DPOConfig, PAIRS, {}),
    "dpo bco": (DPOTrainer, DPOConfig, PAIRS, {"loss_type": ["bco"]}),
    "kto": (KTOTrainer, KTOConfig, LABELLED, {}),
    "grpo": (GRPOTrainer, GRPOConfig, PROMPTED, {"num_generations": 2, "beta": 0.1, "num_iterations": 2}),
    "ppo": (PPOTrainer, PPOConfig, PROMPTED, {"beta": 0.1, "entropy_coef": 0.1}),
}


@pytest.mark.parametrize("name", CASES)
def test_no_micro_step_reads_back(name, make_model, tokenizer, settings, run, monkeypatch):
    trainer, config, rows, options = CASES[name]
    args = config(**settings(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, **options))
    args.max_completion_length = 4
    given = {"reward_funcs": vowels} if rows is PROMPTED else {}
    made = trainer(make_model(), args=args, train_dataset=rows, processing_class=tokenizer, **given)
    trap, accumulate = Trap(), loop.accumulate

    def trapped(*given):
        with trap:
            accumulate(*given)
        trap.computed.clear()

    monkeypatch.setattr(loop, "accumulate", trapped)
    run(made)
    assert not set(trap.found)


def test_the_trap_sees_a_read_of_what_was_computed_and_no_other():
    weight, counts = torch.ones(3, requires_grad=True), torch.tensor([1, 2])
    with Trap() as trap:
        loss = (weight * 2).sum()
        counts.tolist()
        int(counts[0])
        assert trap.found == []
    seen = []
    for read in (float, bool, torch.Tensor.item, lambda x: x.detach().cpu()):
        with Trap() as trap:
            trap.computed[id(loss)] = loss
            try:
                read(loss)
            except IndexError:  # no frame of the package
                seen.append(read)
    assert len(seen) == 4
