"""The part ``train`` of the GPU suite: its calls are ones that bench.train understands, its targets read the right rows."""

from __future__ import annotations

import csv

import pytest

from bench import gpu_train, train


@pytest.mark.parametrize("stage", gpu_train.STAGES, ids=lambda stage: stage.name)
def test_bench_train_understands_every_stage(stage):
    asked = train.parse(["--model", gpu_train.MODEL, *stage.arguments])
    assert asked.model == [gpu_train.MODEL]
    dry = train.parse(gpu_train.dry_arguments(stage))
    assert (dry.model, dry.bits, dry.steps, dry.cap_gb) == (["cpu"], [32], 1, None)
    assert (dry.methods, dry.max_context, dry.set, dry.peers) == (
        asked.methods,
        asked.max_context,
        asked.set,
        asked.peers,
    )


def test_targets_are_measured_on_the_rows_they_name(tmp_path):
    """A run with offload is no run without it; a missed target says so, and one without a row says why."""
    base = {name: "" for name in train.COLUMNS} | {"side": "ours", "method": "sft", "bits": "4", "settings": "{}"}
    offload = {"settings": '{"offload_activations": true}', "peak_gb": "7.4"}
    rows = [
        {**base, **offload},
        {**base, "status": "ok", "peak_gb": "7.5", "ratio": "1.52", "memory_ratio": "0.85"},
        {**base, "side": "TRL", "peak_gb": "8.8"},
        {**base, "method": "ppo", "cap_gb": "24.0", "status": "failed: out of memory"},
        {**base, "method": train.LONGEST, "cap_gb": "24.0", "longest_row": "81920", "settings": "{}"},
    ]
    with (tmp_path / "train-cuda.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, train.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    table = gpu_train.targets(tmp_path, {"QLoRA SFT": "ok"}, dry=False).splitlines()
    found = {line.split("|")[1].strip(): line.split("|")[2:5] for line in table if line.startswith("| ")}
    assert [x.strip() for x in found["QLoRA SFT, speed over TRL"]] == ["1.52x", "≥ 1.3x", "met"]
    assert [x.strip() for x in found["QLoRA SFT, memory over TRL"]] == ["0.85x", "≤ 0.8x", "missed"]
    assert [x.strip() for x in found["QLoRA SFT, peak"]] == ["7.5 GiB", "≤ 7.8 GiB", "met"]
    assert [x.strip() for x in found["QLoRA SFT with offload, peak"]] == ["7.4 GiB", "≤ 7 GiB", "missed"]
    assert found["PPO QLoRA, 1k tokens, on 24 GB"][2].strip() == "not measured: failed: out of memory"
    assert found["LoRA SFT, speed over TRL"][2].strip() == "not measured: no row"
    assert found["longest SFT row in 24.0 GiB"][0].strip() == "81920 tokens"
