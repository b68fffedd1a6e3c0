"""Runs of ``rlhf-fast`` that die where they are told to, each in a fork of one process that has imported everything.

``python forkserver.py`` reads one JSON object a line, ``{"argv": [...], "fault": [moment, n, what], "log": path}``, runs the
command in a child, and answers ``{"signal", "code", "ticks", "after", "seconds"}``: how it ended, how often each moment came, in
all and after the fault, and how long the run went on after it. At the n-th ``moment`` the child gets a signal (``what`` is SIGKILL,
SIGTERM or SIGINT, or several of them) or an OSError (the name of its number, as ENOSPC). A run that ends writes ``digest.json`` into its folder.

Moments: ``save.begin``, ``save.op`` (each call that touches the disk within a save), ``save.end``, ``rollout`` (each pass of the
model while sampling), ``micro`` (each backward pass, before it), ``backward`` (after it), ``optimizer`` (before each step),
``stepped`` (after it), ``log``, ``evaluate``, ``held_out`` (each pass of an evaluation), ``evaluated``; before the first step
``reference`` (passes over the data for it) and ``rehearse`` (the trial of the largest micro-batch).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from rlhf_fast import cli
from rlhf_fast.rewards.experience import ScoredRollouts
from rlhf_fast.run import checkpoint
from rlhf_fast.run.metrics import MetricsLog
from rlhf_fast.trainers import loop, memory, reference, resume
from rlhf_fast.trainers.trainer import Trainer

METHODS = tuple(name for name, command in cli.COMMANDS.items() if command.group == "train")
TOUCH_THE_DISK = (
    *((checkpoint, name) for name in ("_sync", "save_file", "_sha256")),
    (checkpoint.shutil, "rmtree"),
    *((checkpoint.Path, name) for name in ("mkdir", "rename", "write_bytes", "write_text")),
)


class Moments:
    """Counts what a run does, and disturbs it where it is told to."""

    def __init__(self, fault: list | None) -> None:
        self.counts: Counter[str] = Counter()
        self.after: Counter[str] = Counter()
        self.moment, self.number, self.what = fault or (None, 0, "")
        self.saving = self.sampling = self.evaluating = False
        self.since: float | None = None  # when it was disturbed

    def tick(self, moment: str) -> None:
        self.counts[moment] += 1
        if self.moment and self.counts[self.moment] >= self.number:
            self.after[moment] += 1
        if (moment, self.counts[moment]) != (self.moment, self.number):
            return
        self.since = time.monotonic()
        if self.what.startswith("SIG"):
            for name in self.what.split():
                os.kill(os.getpid(), signal.Signals[name])
        else:
            number = getattr(errno, self.what)
            raise OSError(number, os.strerror(number))

    def around(
        self, owner: Any, name: str, before: str | None = None, after: str | None = None, flag: str = ""
    ) -> None:
        """Let ``owner.name`` count its beginning and its end, and hold ``flag`` in between."""
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if before:
                self.tick(before)
            if flag:
                setattr(self, flag, True)
            try:
                result = original(*args, **kwargs)
            finally:
                if flag:
                    setattr(self, flag, False)
            if after:
                self.tick(after)
            return result

        setattr(owner, name, wrapped)

    def within(self, owner: Any, name: str, flag: str, moment: str) -> None:
        """Let ``owner.name`` count, while ``flag`` is up."""
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if getattr(self, flag):
                self.tick(moment)
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    def install(self) -> None:
        self.around(resume, "save_checkpoint", "save.begin", "save.end", flag="saving")
        for owner, name in TOUCH_THE_DISK:
            self.within(owner, name, "saving", "save.op")
        self.around(ScoredRollouts, "sample", flag="sampling")
        self.within(torch.nn.Embedding, "forward", "sampling", "rollout")
        self.around(Accelerator, "backward", "micro", "backward")
        self.around(AcceleratedOptimizer, "step", "optimizer", "stepped")
        self.around(MetricsLog, "log", "log")
        self.around(loop, "evaluate", "evaluate", "evaluated", flag="evaluating")
        self.within(torch.nn.Embedding, "forward", "evaluating", "held_out")
        self.around(memory, "rehearse", "rehearse")
        self.around(reference, "response_logprobs", "reference")


def note_what_is_consumed() -> None:
    """Let trainers add a line to ``order.jsonl`` for each optimizer step, and write ``digest.json`` at the end."""
    step, train = loop.optimizer_step, Trainer.train

    def noted_step(trainer, indices):
        records = [trainer.records[i] for i in indices]
        ids = [e.input_ids for record in records for e in trainer.examples(record)]
        line = {"step": trainer.step + 1, "ids": _sha(json.dumps(ids).encode())}
        with (Path(trainer.args.output_dir) / "order.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return step(trainer, indices)

    def noted_train(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        out = Path(self.args.output_dir)
        # a step that was begun, killed and begun again counts once
        order = {line["step"]: line["ids"] for line in map(json.loads, (out / "order.jsonl").read_text().splitlines())}
        weights = {n: p for n, p in self.policy.named_parameters() if p.requires_grad}
        digest = {
            "step": self.step,
            "weights": _sha_of(weights),
            "optimizer": _sha_of(self.optimizer.state_dict()),
            "order": _sha(json.dumps(sorted(order.items())).encode()),
            "metrics": _metrics(out),
        }
        (out / "digest.json").write_text(json.dumps(digest))
        return result

    loop.optimizer_step, Trainer.train = noted_step, noted_train


def _metrics(out: Path) -> str:
    """Of all logged figures but the times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not k.startswith(("time", "tokens_per_second"))} for line in lines]
    return _sha(json.dumps(kept).encode())


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sha_of(state: Any) -> str:
    """Of everything in a nested state, tensors by their bytes."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = value.detach().contiguous()
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            list(map(add, value))
        else:
            digest.update(repr(value).encode())

    add(state)
    return digest.hexdigest()


def run(job: dict[str, Any], pipe: int) -> int:
    """The command of one job, in a child."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    moments = Moments(job.get("fault"))
    moments.install()
    note_what_is_consumed()
    cli._report = lambda *_: None  # plots take longer than the run
    code = cli.main(job["argv"])
    seconds = 0.0 if moments.since is None else time.monotonic() - moments.since
    os.write(pipe, json.dumps({"ticks": moments.counts, "after": moments.after, "seconds": seconds}).encode())
    return code


def main() -> None:
    for name in METHODS:  # before the forks
        cli.trainer_of(name)
    with contextlib.suppress(ImportError):  # for bases in 4 bit
        importlib.import_module("bitsandbytes")
    torch.set_num_threads(1)
    # who starts the tests in the background has it ignored, and children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("ready", flush=True)
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = run(json.loads(line), writer)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(writer)
        counts = b""
        while block := os.read(reader, 65536):
            counts += block
        os.close(reader)
        _, status = os.waitpid(child, 0)
        ended = {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, "code": os.WEXITSTATUS(status)}
        print(json.dumps({**ended, **json.loads(counts or b"{}")}), flush=True)


if __name__ == "__main__":
    main()
