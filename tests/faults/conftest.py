"""Small runs of every trainer through the command line, and the server that runs and kills them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.models.scratch import new_model

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["a", "hello", "to be", "x+y=z", "no", "seventeen", "q"]
COMMON = {
    "max_steps": 4,
    "save_steps": 1,
    "save_total_limit": 2,
    "logging_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "quiet": True,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}
PREFERRED = {"rows": [{"prompt": f"{i} ", "chosen": w, "rejected": w[:1] + "?"} for i, w in enumerate(WORDS)]}
SAMPLED = {
    "rows": [{"prompt": f"{i} "} for i in range(len(WORDS))],
    "reward_funcs": '{"name": "format", "pattern": "[aeiou]"}',
    "max_completion_length": 5,
}
# rounds of several steps where there are any
KINDS: dict[str, dict[str, Any]] = {
    "sft": {"rows": [{"prompt": f"{i} ", "completion": w} for i, w in enumerate(WORDS)], "packing": False},
    "reward": PREFERRED,
    "dpo": PREFERRED,
    "kto": {"rows": [{"prompt": f"{i} ", "completion": w, "label": i % 2 == 0} for i, w in enumerate(WORDS)]},
    "ppo": {**SAMPLED, "num_ppo_epochs": 2, "num_mini_batches": 2, "kl_target": 0.1, "normalize_rewards": True},
    "grpo": {**SAMPLED, "num_generations": 2, "num_iterations": 2, "beta": 0.1},
}


class Server:
    """The fork server, one run at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = new_model("nano", WORDS * 20, folder / "model", vocab_size=300, quiet=True)
        for kind, settings in KINDS.items():
            rows = "".join(json.dumps(row) + "\n" for row in settings["rows"])
            (folder / f"{kind}.jsonl").write_text(rows)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forkserver.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, kind: str, out: Path, *flags: str, fault: tuple | None = None, **settings: Any) -> dict[str, Any]:
        """One run of a trainer into ``out``, disturbed by ``fault`` (moment, n, what); how it ended."""
        given = {**COMMON, **KINDS[kind], **settings, "output_dir": out, "model_name_or_path": self.model}
        given["dataset_name"] = self.folder / f"{kind}.jsonl"
        del given["rows"]
        argv = [kind, *(word for key, value in given.items() for word in (f"--{key}", str(value))), *flags]
        out.parent.mkdir(parents=True, exist_ok=True)
        job = {"argv": argv, "fault": fault, "log": str(out.parent / f"{out.name}.log")}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def digest(self, out: Path) -> dict[str, Any]:
        """Hashes of the weights, the optimizer, the data consumed and the figures of a run that has ended."""
        return json.loads((out / "digest.json").read_text())

    def log(self, out: Path) -> str:
        """What the runs into ``out`` printed."""
        return (out.parent / f"{out.name}.log").read_text()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def whole(server: Server, tmp_path_factory):
    """whole(kind, **settings) -> folder and moments of the run that nobody touches; each is made once."""
    made: dict[tuple, tuple[Path, dict]] = {}

    def make(kind, **settings):
        key = kind, *sorted(settings.items())
        if key not in made:
            out = tmp_path_factory.mktemp("whole") / "run"
            result = server.run(kind, out, **settings)
            assert result["code"] == 0, server.log(out)
            made[key] = out, result["ticks"]
        return made[key]

    return make
