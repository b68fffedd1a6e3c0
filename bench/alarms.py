"""Does the guard keep quiet while nothing is wrong?

    python -m bench.alarms -o DIR [--seeds 0,1,2] [--kinds grpo,ppo] [--also FOLDER ...]

Quickstart's sums with the verifier as reward and the guard's default limits. The held-out reward is noise, drawn anew for every
response, so that no policy can raise or lower it, and there is an evaluation at every fifth step: whatever the guard says is a
false alarm. ``--also`` counts the alarms in the runs of other folders, such as those of ``bench.learning``, whose guard is on too.
A row a run; those that DIR has are not trained again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from bench.report import put_rows, read_text
from bench.safety import Lab, show
from rlhf_fast.run.metrics import read_metrics

COLUMNS = ("run", "seed", "batches", "reward, first tenth", "reward, last tenth", "alarms")
STEPS = {"grpo": 60, "ppo": 80}
EVALUATIONS = {"eval_steps": 5, "num_eval_prompts": 100, "num_completions_to_print": 0, "logging_steps": 1}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--kinds", default="grpo,ppo")
    parser.add_argument("--also", nargs="*", default=[], metavar="FOLDER")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    path = args.out / "alarms.csv"
    for seed in filter(None, args.seeds.split(",")):
        for kind in filter(None, args.kinds.split(",")):
            name = f"sums/{kind}"
            if not any((row["run"], row["seed"]) == (name, seed) for row in read_text(path)):
                put(path, name, seed, healthy_run(kind, int(seed), args.out))
    for folder in map(Path, args.also):
        for file in sorted(folder.rglob("metrics.jsonl")):
            parts = [part for part in file.parent.relative_to(folder).parts if part != "rlhf_fast"]
            seed = next((part.removeprefix("seed-") for part in parts if part.removeprefix("seed-").isdigit()), "")
            put(path, "/".join(part for part in parts if part.removeprefix("seed-") != seed), seed, file.parent)
    show("alarms", path)


def healthy_run(kind: str, seed: int, out: Path) -> Path:
    noise = {"guard_reward": [{"name": "random", "seed": 1_000 + seed}], "guard_share": 1.0}
    settings = {"max_steps": STEPS[kind], "guard": "warn", **noise, **EVALUATIONS}
    began = time.process_time()
    trainer = Lab(out, seed).trainer("healthy", kind, ["answer"], **settings)
    trainer.train()
    print(f"{kind}, seed {seed}: {time.process_time() - began:.0f} CPU seconds", flush=True)
    return Path(trainer.args.output_dir)


def put(path: Path, name: str, seed: str, folder: Path) -> None:
    if row := row_of(folder):
        put_rows(path, [{"run": name, "seed": seed, **row}], ("run", "seed"), COLUMNS)


def row_of(folder: Path) -> dict[str, Any]:
    """What the guard saw of a run and said of it; nothing of one without a guard."""
    rows = [row for row in read_metrics(folder) if "guard/reward" in row]
    seen = [row["guard/reward"] for row in rows]
    if not seen:
        return {}
    tenth = max(len(seen) // 10, 1)
    alarms = [f"{key.rpartition('/')[2]} at {row['step']}" for row in rows for key in row if "guard/tripped/" in key]
    return {
        "batches": len(rows),
        "reward, first tenth": statistics.fmean(seen[:tenth]),
        "reward, last tenth": statistics.fmean(seen[-tenth:]),
        "alarms": "; ".join(alarms),
    }


if __name__ == "__main__":
    main()
