"""Two processes with half of the weights each (FSDP2) make the steps of one process with all of them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy

import rlhf_fast
from rlhf_fast.errors import UserError
from rlhf_fast.run.sharding import asked_for
from rlhf_fast.trainers import shards
from tests.trainers.processes import KINDS, vowels
from tests.trainers.test_processes import EXAMPLES, KEPT, LABELLED, PAIRS, PROMPTS, save_model, start

ASK = [{"prompt": r["prompt"]} for r in EXAMPLES]
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def cases(folder: Path, model: Path, processes: int) -> dict:
    """The same global batches. Micro-batches are filled by tokens, so that ranks have different numbers of them."""
    common = {"quiet": True, "logging_steps": 1, "learning_rate": 1e-3, "lora_r": 4, "save_steps": 1}
    common |= {"save_total_limit": 20, "micro_batch_tokens": 30, "per_device_train_batch_size": 8 // processes}
    head = {"use_peft": True, "lora_target_modules": ["q_proj", "down_proj", "lm_head"]}
    grpo = {"num_generations": 4, "num_iterations": 2, "beta": 0.1, "max_completion_length": 5, "max_steps": 4}
    ppo = {"num_ppo_epochs": 2, "kl_target": 1.0, "kl_horizon": 10, "max_completion_length": 5}
    dynamic = {"dynamic_sampling_rounds": 2, "scale_rewards": "batch"}
    table = {
        # the last of 11 rows: a window with one micro-batch on one rank, two on the other
        "sft full": ("sft", EXAMPLES, {"packing": False, "num_train_epochs": 2}),
        "sft lora": ("sft", EXAMPLES, {"packing": False, **head}),
        "reward full": ("reward", PAIRS, {"num_heads": 3}),
        "dpo full": ("dpo", PAIRS, {"loss_type": ["bco", "aot"], "num_train_epochs": 2}),
        "kto lora": ("kto", LABELLED, {"use_peft": True, "num_train_epochs": 2, "learning_rate": 1e-2}),
        "grpo full": ("grpo", PROMPTS, grpo),
        "grpo lora": ("grpo", PROMPTS, {**grpo, **dynamic, "use_peft": True}),
        "sft starved": ("sft", EXAMPLES, {"packing": False}),
        "ppo full": ("ppo", ASK, {**ppo, "normalize_rewards": True}),
        "ppo lora": ("ppo", ASK, {**ppo, **head}),
    }
    return {
        name: {
            "kind": kind,
            "model": str(model),
            "rows": rows,
            "evaluate": 3,
            **({"last_holds": 9} if name == STARVED else {"resume_from": 1 if processes > 1 else None}),
            "settings": {**common, **more, "output_dir": str(folder / name.replace(" ", "-"))},
        }
        for name, (kind, rows, more) in table.items()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer):
    """finished(name) -> the folder of both runs of that case, which has run with the quick cases or with the slow ones."""

    @functools.cache
    def run(slow: bool) -> Path:
        folder = tmp_path_factory.mktemp("sharded")
        save_model(folder / "model", tokenizer)
        workers = []
        for processes in (1, 2):
            path = folder / f"cases-of-{processes}.json"
            table = cases(folder / str(processes), folder / "model", processes)
            # who runs out of memory leaves the others, and nothing can come after it
            names = sorted((n for n in table if (n not in QUICK) == slow), key=lambda n: n == STARVED)
            path.write_text(json.dumps({name: table[name] for name in names}))
            workers += start(path, processes, SHARDED if processes > 1 else {})
        try:
            said = [worker.communicate(timeout=900)[0] for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        assert [w.returncode for w in workers] == [0, 0, 0], "\n".join(said)
        return folder

    return lambda name: run(name not in QUICK)


def noted(folder: Path, name: str) -> list[dict]:
    """What the one process and both of two have noted."""
    notes = [folder / f"cases-of-{n}.rank{rank}" for n, rank in ((1, 0), (2, 0), (2, 1))]
    return [json.loads(path.read_text())[name] for path in notes]


STARVED = "sft starved"
QUICK = ("sft full", "dpo full", "grpo lora", STARVED)
NAMES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in cases(Path(), Path(), 1)
    if name != STARVED
]


@pytest.mark.parametrize("name", NAMES)
def test_sharded_weights_make_the_steps_of_whole_ones(name, finished):
    """Every figure of every line of the log, and the norms of the weights in the end; held-out rows, ragged ends."""
    one, first, second = noted(finished(name), name)
    assert first["sharded"] and not one["sharded"]
    assert len(one["steps"]) == len(first["steps"]) > 2
    for alone, shared in zip(one["steps"], first["steps"]):
        figures = {k: v for k, v in alone.items() if k in KEPT}
        assert {k: shared[k] for k in figures} == pytest.approx(figures, abs=1e-5, rel=1e-5)
    assert first["weights"] == second["weights"]
    assert first["weights"] == pytest.approx(one["weights"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_run_goes_on_from_its_checkpoint_to_the_same_bits(name, finished):
    assert [r["resumed"] for r in noted(finished(name), name)[1:]] == [True, True]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_sharded_run_saves_is_the_model_of_one_process(name, finished):
    """Whole model, adapter and heads, file by file and tensor by tensor."""
    mine, theirs = (finished(name) / n / name.replace(" ", "-") for n in ("1", "2"))
    files = sorted(p.name for p in mine.glob("*.safetensors"))
    assert files and files == sorted(p.name for p in theirs.glob("*.safetensors"))
    for file in files:
        whole, gathered = load_file(mine / file), load_file(theirs / file)
        assert whole.keys() == gathered.keys()
        for key, tensor in whole.items():
            torch.testing.assert_close(gathered[key], tensor, atol=2e-5, rtol=1e-4)
    assert (mine / "rlhf_fast.json").read_text() == (theirs / "rlhf_fast.json").read_text()


def test_a_process_without_enough_memory_ends_all_with_its_sentence(finished):
    """The other one is in the middle of a pass, which it cannot make alone; it is told why."""
    first, last = (r["error"] for r in noted(finished(STARVED), STARVED)[1:])
    assert last[0] == first[0] == "UserError"
    assert last[1].startswith("out of memory at step 1 in process 1, in a micro-batch of")
    assert "of sharded weights a pass takes all processes; go on with --resume and micro_batch_tokens" in last[1]
    assert first[1] == f"process 1: {last[1]}"


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [("sft", {"memory_check": True}, "memory_check"), ("grpo", {"rollout_merge_lora": True}, "rollout_merge_lora")],
)
def test_what_sharded_weights_do_not_go_with_is_refused_by_name(kind, settings, named, tmp_path, tokenizer):
    save_model(tmp_path / "model", tokenizer)
    case = {"output_dir": str(tmp_path / "run"), "quiet": True, "use_peft": True, **settings}
    rows = EXAMPLES if kind == "sft" else PROMPTS
    given = {} if kind == "sft" else {"reward_funcs": vowels}
    trainer_class, config_class = (getattr(rlhf_fast, KINDS[kind] + part) for part in ("Trainer", "Config"))
    trainer = trainer_class(tmp_path / "model", args=config_class(**case), train_dataset=rows, **given)
    with pytest.raises(UserError, match=rf"sharded weights \(FSDP2\) do not go with {named}: .* run replicas"):
        shards.check(trainer)


def test_fsdp1_and_parameters_on_the_host_are_refused():
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_offload=CPUOffloadPolicy()))
    run = SimpleNamespace(state=state, distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(UserError, match="start with accelerate launch --use_fsdp --fsdp_version 2"):
        asked_for(run)
    run.is_fsdp2 = True
    with pytest.raises(UserError, match="start with --fsdp_offload_params false"):
        asked_for(run)
