"""bench.train: both sides get the same tokens, and a pair that computes different losses is no comparison."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import train
from bench.train import Job, Work, judged, markdown, options, rows_of


@pytest.fixture
def folder(tmp_path, monkeypatch):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setitem(train.MODELS, "cpu", {**train.QWEN2, **sizes, **heads})
    return train.random_model("cpu", tmp_path)


def job(method: str, folder="", **more) -> Job:
    return Job("ours", method, "cpu", 32, str(folder), **{"work": Work(24, 8, 2), "steps": 3, **more})


def test_a_model_folder_is_written_a_layer_a_file_and_loads(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    layers = {file for name, file in index.items() if ".layers." in name}
    assert len(layers) == 3
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert set(index) == set(dict(model.named_parameters()))
    assert 0.019 < model.model.layers[2].mlp.up_proj.weight.std() < 0.021
    assert (model.model.norm.weight == 1).all()


def test_a_row_has_as_many_tokens_as_the_table_says(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    row = rows_of(job("dpo"))[0]
    assert len(tokenizer(row["prompt"]).input_ids) == 24
    assert [len(tokenizer(row[key]).input_ids) + 1 for key in ("chosen", "rejected")] == [8, 8]
    (text,) = {r["text"] for r in rows_of(job("sft"))}  # one row, so that the order does not matter
    assert len(tokenizer(text).input_ids) + 1 == 8


def test_sides_whose_first_losses_differ_are_not_compared():
    """By 1%, where 0.01% is allowed in float32 and 2% with a base of 16 bits."""
    side = {"method": "sft", "status": "ok", "tokens_per_second": 300.0, "peak_gb": 2.0, "first_loss": 5.0}
    other = {**side, "tokens_per_second": 200.0, "peak_gb": 4.0, "first_loss": 5.05}
    wrong = judged([dict(side), dict(other)], 32)
    assert all("5.00000, TRL 5.05000" in row["status"] for row in wrong)
    ours, _ = judged([dict(side), dict(other)], 16)
    assert (ours["ratio"], ours["memory_ratio"]) == (1.5, 0.5)


def test_settings_are_read_as_json_where_they_can_be():
    assert options(["shared_prefix=false", "micro_batch_tokens=4096", "optim=adamw_8bit"]) == {
        "shared_prefix": False,
        "micro_batch_tokens": 4096,
        "optim": "adamw_8bit",
    }


def test_a_run_gives_its_figures(folder):
    """A real one, in a process of its own: SFT of three layers."""
    row = train.run(job("sft", folder, work=Work(0, 16, 2), steps=1), limit=240)
    assert row["status"] == "ok", row
    assert row["steps"] == 1
    assert 5.5 < row["first_loss"] < 5.9, "about ln 300"
    assert row["tokens_per_second"] == pytest.approx(32 / row["seconds_per_step"])
    assert "| cpu | 32 |" in markdown([{k: str(row.get(k, "")) for k in train.COLUMNS}])


def test_a_peer_without_the_method_is_said_to_have_none():
    assert train.run(Job("TRL", "ppo", "cpu", 32, "", Work(4, 4, 1), 1), limit=1)["status"] == "TRL has no PPO"
