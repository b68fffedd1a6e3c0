"""Reference log-probabilities that outlive a run: reused when nothing they follow from changed, and only then."""

from __future__ import annotations

import logging

import pytest
import torch

from rlhf_fast import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.run.cache import cache_folder, read_numbers, write_numbers
from rlhf_fast.trainers import memory

ROWS = [
    {"prompt": "1+1=", "chosen": "2", "rejected": "seventeen"},
    {"prompt": "name ", "chosen": "a longer one", "rejected": "no"},
    {"prompt": "x", "chosen": "y", "rejected": "z"},
]


@pytest.fixture
def said():
    return []


@pytest.fixture
def trainer(tokenizer, settings, said, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "say", lambda self, what: said.append(str(what)))

    def make(model, rows=ROWS, peft=None, **more):
        args = DPOConfig(**settings(precompute_ref_log_probs=True, per_device_train_batch_size=2, **more))
        return DPOTrainer(model, args, train_dataset=rows, processing_class=tokenizer, peft_config=peft)

    return make


def reused(said) -> bool:
    return "read from" in said[-1]


def kept() -> list:
    return sorted((cache_folder() / "reference_logprobs").glob("*"))


def test_the_next_run_reads_what_the_last_one_computed(trainer, make_model, said, monkeypatch):
    """In another output folder; the reference is asked about one micro-batch, to be sure, and the numbers are the same."""
    first = [p.ref_logprobs for p in trainer(make_model()).train_records]
    assert "computed, kept in" in said[-1] and len(kept()) == 1
    second = [p.ref_logprobs for p in trainer(make_model()).train_records]
    assert reused(said) and second == first and len(kept()) == 1


def test_an_adapter_on_the_same_base_reads_them_too(trainer, make_model, said):
    """A fresh adapter's reference is the base."""
    trainer(make_model())
    trainer(make_model(), peft=lora_config(r=4, alpha=8))
    assert reused(said)


def test_anything_that_they_follow_from_makes_them_stale(trainer, make_model, said, tokenizer):
    """A token of the data, max_length where it cuts, a weight, the arithmetic; but not the order of other settings."""
    trainer(make_model())
    changed = [{**ROWS[0], "chosen": "3"}, *ROWS[1:]]
    trainer(make_model(), changed)
    assert not reused(said)
    trainer(make_model(), max_length=12, allow_truncation=True)
    assert not reused(said)
    other = make_model()
    with torch.no_grad():
        other.model.norm.weight += 0.01
    trainer(other)
    assert not reused(said)
    trainer(make_model(), dtype="float32", attn_implementation="sdpa")
    assert not reused(said)
    assert len(kept()) == 5
    trainer(make_model(), learning_rate=1e-3, beta=0.5, seed=1)
    assert reused(said)


def test_a_continued_adapter_has_numbers_of_its_own(trainer, make_model, tokenizer, said, run, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    trainer(str(tmp_path / "base"))
    first = trainer(str(tmp_path / "base"), peft=lora_config(r=4, alpha=8), num_train_epochs=2, learning_rate=1e-2)
    assert reused(said)
    run(first)
    again = trainer(first.args.output_dir)
    assert not reused(said)
    assert again.train_records[0].ref_logprobs != first.train_records[0].ref_logprobs


@pytest.mark.parametrize("harm", ["cut", "flip", "rename", "numbers"])
def test_a_damaged_file_is_noticed_said_and_replaced(harm, trainer, make_model, said, caplog):
    want = [p.ref_logprobs for p in trainer(make_model()).train_records]
    (path,) = kept()
    content = bytearray(path.read_bytes())
    if harm == "cut":
        path.write_bytes(content[:-3])
    elif harm == "flip":
        content[-2] ^= 64
        path.write_bytes(content)
    elif harm == "rename":  # the right numbers of other data
        trainer(make_model(), [{**ROWS[0], "chosen": "3"}, *ROWS[1:]])
        (other,) = set(kept()) - {path}
        path.write_bytes(other.read_bytes())
    else:  # well formed, but not what this model says
        write_numbers(path, path.stem, torch.tensor(want) - 5.0)
    with caplog.at_level(logging.WARNING):
        got = [p.ref_logprobs for p in trainer(make_model()).train_records]
    assert got == want and "computing anew" in caplog.text
    reason = {
        "cut": "cannot be read",
        "flip": "not those that were written",
        "rename": "other data",
        "numbers": "off by 5",
    }
    assert reason[harm] in caplog.text
    trainer(make_model())
    assert reused(said)


def test_a_disk_that_refuses_stops_nothing(tmp_path, caplog):
    (tmp_path / "file").touch()
    write_numbers(tmp_path / "file" / "x.safetensors", "key", torch.zeros(2))
    assert "not kept for the next run" in caplog.text
    assert read_numbers(tmp_path / "file" / "x.safetensors", "key", (2,)) is None


def test_kto_keeps_both_its_lists(tokenizer, make_model, settings, monkeypatch):
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i < 2} for i, r in enumerate(ROWS)]
    args = {"precompute_ref_log_probs": True, "per_device_train_batch_size": 3}
    runs = [
        KTOTrainer(make_model(), KTOConfig(**settings(**args)), train_dataset=rows, processing_class=tokenizer)
        for _ in range(2)
    ]
    assert len(kept()) == 2
    assert runs[0].train_records == runs[1].train_records
    assert all(len(r.ref_logprobs) == 2 for r in runs[0].train_records)


def test_reference_passes_keep_to_the_budget_that_the_plan_settles(trainer, make_model, monkeypatch):
    """They come after the plan: the budget of a GPU is not known when the data is read."""
    monkeypatch.setattr(memory, "settle", lambda trainer: setattr(trainer, "micro_batch_tokens", 30))
    model, seen = make_model(), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    made = trainer(model)
    assert len(seen) > 1 and max(seen) <= 30 < made.tokens(made.train_records)
