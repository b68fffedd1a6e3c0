"""Small runs of every trainer through the command line, and the server that runs and kills them."""

from __future__ import annotations

import importlib.util
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
RANKED = [
    {"prompt": f"{i} ", "responses": [w, w[:1] + "?", "no way"], "ranking": [1, 2, 3]} for i, w in enumerate(WORDS)
]
LABELLED = [{"prompt": f"{i} ", "completion": w, "label": i % 2 == 0} for i, w in enumerate(WORDS)]
SAMPLED = {
    "rows": [{"prompt": f"{i} "} for i in range(len(WORDS))],
    "reward_funcs": '{"name": "format", "pattern": "[aeiou]"}',
    "max_completion_length": 5,
    "alarms": "off",  # so small a model moves by nats in a step, on purpose
}
PASSES = {"num_ppo_epochs": 2, "num_mini_batches": 2}
COSTS = {"cost_funcs": '{"name": "format", "pattern": "[a-m]"}', "cost_limit": 0.3}
# evaluations decide which checkpoint is kept and whether the run goes on
WATCHED = {"eval_steps": 1, "metric_for_best_model": "loss", "early_stopping_patience": 9}
# rounds of several steps where there are any; ``method`` is the command, ``eval`` whether there are held-out rows
KINDS: dict[str, dict[str, Any]] = {
    "sft": {"rows": [{"prompt": f"{i} ", "completion": w} for i, w in enumerate(WORDS)], "packing": False},
    "reward": PREFERRED,
    "dpo": {**PREFERRED, **WATCHED, "eval": True},
    "grpo": {**SAMPLED, "num_generations": 2, "num_iterations": 2, "beta": 0.1},
    "ppo": {**SAMPLED, **PASSES, "kl_target": 0.1, "normalize_rewards": True},
    "kto": {"rows": LABELLED},
    "ensemble": {"method": "reward", "rows": RANKED, "num_heads": 3},
    "cost": {
        "method": "reward",
        "kind": "cost",
        "num_heads": 2,
        "rows": [{**row, "safe": [True, i % 2 == 0]} for i, row in enumerate(PREFERRED["rows"])],
    },
    # their models are {runs} of the two above; the disagreement of the heads has its price
    "safe-ppo": {
        **SAMPLED,
        **PASSES,
        "reward_funcs": "[]",
        "reward_model_path": "{ensemble}",
        "cost_model_path": "{cost}",
        "disagreement_penalty": 0.5,
    },
    "safe-ppo functions": {**SAMPLED, **PASSES, **COSTS, "method": "safe-ppo", "critic_warmup_steps": 1},
    "orpo": {**PREFERRED, "method": "dpo", "loss_type": "[orpo]"},
    "grpo costs": {**SAMPLED, **COSTS, "method": "grpo", "num_generations": 2, "num_iterations": 2, "kl_coef": 0.1},
}
# how the weights are trained: all of them, an adapter, an adapter on a base in 4 bit
WEIGHTS = {"full": {"use_peft": False}, "lora": {"use_peft": True}}
if importlib.util.find_spec("bitsandbytes"):
    WEIGHTS["nf4"] = {"use_peft": True, "load_in_4bit": True}


class Server:
    """The fork server, one run at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = new_model("nano", WORDS * 20, folder / "model", vocab_size=300, quiet=True)
        for kind, settings in KINDS.items():
            rows = "".join(json.dumps(row) + "\n" for row in settings["rows"])
            (folder / f"{kind}.jsonl").write_text(rows)
        self.models: dict[str, Path] = {}  # reward and cost models that other runs take
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FAULTS_FOLDER": str(folder)}
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
        if given.pop("eval", False):
            given["eval_dataset_name"] = given["dataset_name"]
        del given["rows"]
        method = given.pop("method", kind)
        given = {key: self._filled(str(value)) for key, value in given.items()}
        argv = [method, *(word for key, value in given.items() for word in (f"--{key}", value)), *flags]
        out.parent.mkdir(parents=True, exist_ok=True)
        job = {"argv": argv, "fault": fault, "log": str(out.parent / f"{out.name}.log")}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def _filled(self, value: str) -> str:
        """``value``, or the folder of the model that it names in braces, trained when it is first asked for."""
        kind = value.strip("{}")
        if kind not in KINDS or value != f"{{{kind}}}":
            return value
        if kind not in self.models:
            out = self.folder / f"model-{kind}"
            assert self.run(kind, out, use_peft=True)["code"] == 0, self.log(out)
            self.models[kind] = out
        return str(self.models[kind])

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
