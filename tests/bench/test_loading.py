"""The benchmark of loading writes a checkpoint of the size it says, and counts what the model holds."""

from __future__ import annotations

import json

import pytest

from bench.loading import measure, shape_of, write_checkpoint


def test_a_sharded_checkpoint_is_written_and_loaded_in_every_way(tmp_path):
    pytest.importorskip("bitsandbytes")
    size, files = write_checkpoint(tmp_path, shape_of(10e6, hidden=64), 1e6)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size == pytest.approx(10e6, rel=0.02)
    assert len(set(index["weight_map"].values())) == files == len(list(tmp_path.glob("*.safetensors"))) > 2
    rows = {way: measure(way, str(tmp_path), "cpu") for way in ("bf16", "nf4", "fp32")}
    assert rows["bf16"]["weights"] == pytest.approx(size / 1e6, rel=0.01)
    assert rows["fp32"]["weights"] == pytest.approx(2 * size / 1e6, rel=0.01)
    head = 2 * 2 * 32_000 * 64 / 1e6  # embeddings and head stay in bf16; elsewhere 4.127 bits of 16
    assert rows["nf4"]["weights"] == pytest.approx(head + (size / 1e6 - head) * 4.127 / 16, rel=0.01)
    assert all(row["high_water"] > 0 and row["seconds"] > 0 for row in rows.values())
