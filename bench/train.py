"""Tokens per second and memory of whole training steps, ours and TRL's, on models of real shapes with random weights.

    python -m bench.train                                        # reduced size, on the CPU
    python -m bench.train --model llama-3.1-8b --bits 4 16       # on a GPU
    python -m bench.train --model qwen2.5-7b --bits 4 --methods ppo --cap-gb 24
    python -m bench.train --model llama-3.1-8b --bits 4 --max-context --cap-gb 24 48 80

Both sides get the same model folder, the same rows, the same batch, LoRA and precision settings, and every row has the same
length, so that neither pads: what differs is the work. Each run is a process of its own, so that its peak memory is its own. The
first steps are not timed. *tokens* are those of the rows, prompts counted once per response, whether or not an implementation
computes shared ones once. Where both sides compute the same loss (SFT, DPO), their first losses must agree, or neither is reported.

Results go to ``train-<device>.csv`` in --out, a row per run, and a table to ``train-<device>.md``.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import host
from bench.shards import write_shards

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("sft", "dpo", "ppo", "grpo")
LONGEST = "longest row"  # of an SFT step, instead of its speed
UNCOUNTED = 2  # steps at the start that are not timed
LOSS_TOLERANCE = {16: 2e-2, 4: 2e-2, 32: 1e-4}  # of the first loss, relative, by bits of the base

# decoder shapes; "cpu" keeps the proportions of a 7B layer at a size that two cores can train
LLAMA = {
    "model_type": "llama",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rms_norm_eps": 1e-5,
}
QWEN2 = {
    "model_type": "qwen2",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "rms_norm_eps": 1e-6,
}
MODELS: dict[str, dict[str, Any]] = {
    "cpu": {
        **QWEN2,
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 1344,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "qwen2.5-7b": {
        **QWEN2,
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "llama-3.1-8b": {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


@dataclass(frozen=True)
class Work:
    """What one optimizer step learns from. Batches count sequences: documents, pairs or responses."""

    prompt: int  # tokens
    response: int  # tokens
    batch: int
    group: int = 1  # responses to a prompt

    def tokens(self, method: str) -> int:
        return self.batch * (2 if method == "dpo" else 1) * (self.prompt + self.response)


WORK = {
    "cpu": {
        "sft": Work(0, 256, 2),
        "dpo": Work(192, 64, 2),
        "ppo": Work(64, 32, 8),
        "grpo": Work(192, 32, 8, group=8),
    },
    "gpu": {
        "sft": Work(0, 2048, 2),
        "dpo": Work(1024, 512, 4),
        "ppo": Work(512, 512, 16),
        "grpo": Work(1024, 256, 16, group=8),
    },
}


@dataclass(frozen=True)
class Job:
    """One run: who, what, on which model."""

    side: str  # ours, TRL
    method: str
    model: str
    bits: int  # of the base weights: 4, 16, 32
    folder: str
    work: Work
    steps: int
    cap_gb: float | None = None
    options: dict[str, Any] | None = None  # further settings of our trainer


NO_PPO = "TRL has no PPO"
KEY = ("method", "model", "bits", "cap_gb", "settings", "side")  # a row replaces the earlier one of the same key
COLUMNS = (
    *("side", "method", "model", "bits", "cap_gb", "status", "tokens_per_second", "q1", "q3", "steps", "peak_gb"),
    *(
        "reserved_gb",
        "load_peak_gb",
        "seconds_per_step",
        "generate",
        "reward",
        "train",
        "first_loss",
        "ratio",
        "memory_ratio",
    ),
    *("longest_row", "work", "settings", "machine", "date", "versions"),
)
MEASURED = COLUMNS[COLUMNS.index("tokens_per_second") : COLUMNS.index("longest_row") + 1]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.job:
        return work(args.job)
    import torch

    from rlhf_fast.models import load  # noqa: F401  fails here rather than in every process

    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = args.folders or Path(tempfile.mkdtemp(prefix="bench-train-"))
    for jobs in races(args, device, models):
        random_model(jobs[0].model, models)
        for rows in race(jobs, args.limit, finished(args.out, device) if args.resume else {}):
            write(args.out, device, rows)  # at once: a run that is cut keeps what it has
    return 0


def races(args: argparse.Namespace, device: str, models: Path) -> Iterator[list[Job]]:
    """What was asked for: our run of a method and, unless nobody competes, TRL's."""
    bits = args.bits or ([4, 16] if device == "cuda" else [32])
    names = args.model or (["llama-3.1-8b"] if device == "cuda" else ["cpu"])
    methods = [LONGEST] if args.max_context else args.methods
    for name, width, cap, method in itertools.product(names, bits, args.cap_gb or [None], methods):
        work = WORK["cpu" if device == "cpu" else "gpu"]["sft" if method == LONGEST else method]
        ours = Job("ours", method, name, width, str(models / name), work, args.steps, cap, options(args.set))
        peers = [replace(ours, side="TRL", options=None)] if args.peers == "trl" and method != LONGEST else []
        yield [ours, *peers]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, help="default: cpu, or llama-3.1-8b on a GPU")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--bits", nargs="+", type=int, choices=(4, 16, 32), help="of the base; default 4 16, on a CPU 32"
    )
    parser.add_argument("--peers", choices=("trl", "none"), default="trl")
    parser.add_argument("--steps", type=int, default=6, help="timed optimizer steps of each run")
    parser.add_argument("--cap-gb", nargs="+", type=float, help="size of the GPU to pretend, in 10^9 bytes")
    parser.add_argument("--max-context", action="store_true", help="instead: the longest SFT row that fits, ours")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="further settings of our trainers")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds a run may take")
    parser.add_argument(
        "--resume", action="store_true", help="keep rows of this machine that --out holds; run the rest"
    )
    parser.add_argument(
        "--folders", type=Path, help="where model folders are made and found again; default: a temporary one"
    )
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ---- the model


def random_model(name: str, folder: Path) -> Path:
    """A model folder of that shape: bfloat16 weights (float32 for a CPU) in a shard a layer, and a tokenizer of digits."""
    path = folder / name
    if (path / "config.json").is_file():
        return path
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhf_fast.models.scratch import train_tokenizer

    tokenizer = train_tokenizer(["0 1 2 3 4 5 6 7 8 9"], 259 + 10)
    sizes = {k: v for k, v in MODELS[name].items() if k != "model_type"}
    config = AutoConfig.for_model(
        MODELS[name]["model_type"],
        **sizes,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_sliding_window=False,
    )
    dtype = torch.float32 if name == "cpu" else torch.bfloat16
    config.dtype = dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    path.mkdir(parents=True, exist_ok=True)
    write_shards(_layers(model, dtype), path)
    tokenizer.save_pretrained(path)
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)  # last: a folder that has it is whole
    return path


def _layers(model: Any, dtype: Any) -> Iterator[dict[str, Any]]:
    """Normal weights of spread 0.02 and norms of 1, a layer at a time, so that memory holds one layer."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".layers.")
        groups.setdefault(parts[1].split(".")[0] if len(parts) == 2 else name, {})[name] = parameter.shape
    for shapes in groups.values():
        yield {
            name: (
                torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator, device=device) * 0.02
            )
            .to(dtype)
            .cpu()
            for name, shape in shapes.items()
        }


# ---- the race


def race(
    jobs: list[Job], limit: float, earlier: dict[tuple[str, ...], dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """Both sides of a method, one after the other: the rows so far, after each. What ``earlier`` holds is not run."""
    pair: list[dict[str, Any]] = []
    for job in jobs:
        pair.append(earlier.get(case(about(job))) or run(job, limit))
        yield judged(pair, job.bits)
    for row in pair:
        print(line(row), flush=True)


def case(row: dict[str, Any]) -> tuple[str, ...]:
    """What a row is about, as written."""
    from bench.report import written

    return tuple(written(row.get(name)) for name in (*KEY, "work"))


def finished(out: Path, device: str) -> dict[tuple[str, ...], dict[str, Any]]:
    """The rows that earlier calls completed on this kind of machine, numbers as numbers."""
    from bench.report import machine, read_text

    rows = [r for r in read_text(out / f"train-{device}.csv") if r["machine"] == machine(device) and complete(r)]
    return {case(r): r | {name: json.loads(r[name]) if r[name] else None for name in MEASURED} for r in rows}


def complete(row: dict[str, str]) -> bool:
    """Whether running it again would add nothing; a run that was stopped on its way has no loss to compare."""
    return row["status"] == NO_PPO or (
        row["status"] == "ok" and bool(row["first_loss"] or row["method"] not in ("sft", "dpo"))
    )


def judged(pair: list[dict[str, Any]], bits: int) -> list[dict[str, Any]]:
    """Ratios to ours; a pair whose first losses differ is not a comparison."""
    ours, peer = pair[0], pair[-1]
    if len(pair) == 2 and ours["status"] == peer["status"] == "ok":
        if ours["method"] in ("sft", "dpo"):
            if None in (ours.get("first_loss"), peer.get("first_loss")):
                return pair  # one was stopped on the way: a speed of its own, but nothing that compares them
            difference = abs(ours["first_loss"] - peer["first_loss"]) / abs(peer["first_loss"])
            if difference > LOSS_TOLERANCE[bits]:
                for row in pair:
                    row["status"] = f"first losses differ: {ours['first_loss']:.5f}, TRL {peer['first_loss']:.5f}"
                return pair
        ours["ratio"] = ours["tokens_per_second"] / peer["tokens_per_second"]
        ours["memory_ratio"] = ours["peak_gb"] / peer["peak_gb"]
    return pair


def run(job: Job, limit: float) -> dict[str, Any]:
    """A job in a process of its own; its row, or why there is none."""
    row = about(job)
    if job.side == "TRL" and job.method == "ppo":
        return row | {"status": NO_PPO}
    if job.side == "TRL" and importlib.util.find_spec("trl") is None:
        return row | {"status": "trl is not installed"}
    command = [sys.executable, "-m", "bench.train", "--job", json.dumps(asdict(job))]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
        said = done.stdout
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode(errors="replace") if late.stdout else ""
        if "RESULT " not in said:
            return row | {"status": f"stopped after {limit:.0f} s"}
    found = [x for x in said.splitlines() if x.startswith("RESULT ")]
    if not found:
        errors = [x for x in done.stderr.strip().splitlines() if x.strip()]
        return row | {"status": f"failed: {errors[-1][:200] if errors else done.returncode}"}
    return row | {"status": "ok"} | json.loads(found[-1].removeprefix("RESULT "))


def about(job: Job) -> dict[str, Any]:
    """The columns that say what a job is."""
    row = {k: v for k, v in asdict(job).items() if k in COLUMNS} | {"settings": json.dumps(job.options or {})}
    return row | {"work": f"{job.work.batch} x ({job.work.prompt} + {job.work.response})"}


def options(pairs: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` arguments; a value is JSON where it can be."""
    found = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found


# ---- one job, in its own process


def work(text: str) -> int:
    """Train, and print the figures as one line of JSON."""
    fields = json.loads(text)
    job = Job(**{**fields, "work": Work(**fields["work"])})
    import torch

    if job.cap_gb and torch.cuda.is_available():
        from rlhf_fast.run.memory import CONTEXT_BYTES

        # a card of so many GB: the context of CUDA lies outside of what the fraction caps
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (job.cap_gb * 1e9 - CONTEXT_BYTES) / total))
    with tempfile.TemporaryDirectory() as scratch:
        side = longest_row if job.method == LONGEST else ours if job.side == "ours" else trl
        figures = side(job, Path(scratch))
    report(figures)
    return 0


def report(figures: dict[str, Any]) -> None:
    """Tell the process that waits for them; the last word counts."""
    print("RESULT " + json.dumps(figures), flush=True)


class Clock:
    """When each optimizer step ended, and how high memory rose while they ran."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.ends: list[float] = []
        self.load_peak = peak_gb()
        reset_peak()

    def step(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if len(self.ends) > UNCOUNTED:
            report(self.figures())  # in case the next step takes too long

    def figures(self) -> dict[str, Any]:
        import torch

        seconds = [b - a for a, b in zip(self.ends, self.ends[1:])][UNCOUNTED - 1 :]
        tokens = self.job.work.tokens(self.job.method)
        rates = sorted(tokens / s for s in seconds) or [0.0]
        quarters = statistics.quantiles(rates, n=4, method="inclusive") if len(rates) > 1 else rates * 3
        reserved = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None
        return {
            "tokens_per_second": statistics.median(rates),
            "q1": quarters[0],
            "q3": quarters[2],
            "steps": len(seconds),
            "seconds_per_step": statistics.median(seconds) if seconds else None,
            "peak_gb": peak_gb(),
            "reserved_gb": reserved,
            "load_peak_gb": self.load_peak,
        }


def reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        host.forget_peak()


def peak_gb() -> float:
    """Highest memory since the last reset, in GiB: the allocator's on a GPU, resident memory on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return host.memory()["VmHWM"] / 2**30


def digits(count: int, seed: int) -> str:
    """A text of exactly that many tokens: the tokenizer keeps digits single."""
    import random

    return "".join(random.Random(seed).choices("0123456789", k=count))


def rows_of(job: Job) -> list[dict[str, Any]]:
    """Enough rows for every step. A stop token is added to each response by both sides, hence one digit less."""
    w, count = job.work, job.work.batch * (job.steps + UNCOUNTED)
    if job.method == "sft":
        # the same row throughout: whatever order it is read in, the first loss is the same
        return [{"text": digits(w.response - 1, 0)}] * count
    if job.method == "dpo":
        return [
            {
                "prompt": digits(w.prompt, 3 * i),
                "chosen": digits(w.response - 1, 3 * i + 1),
                "rejected": digits(w.response - 1, 3 * i + 2),
            }
            for i in range(count)
        ]
    return [{"prompt": digits(w.prompt, i)} for i in range(count // w.group)]


def parity(completions: list, **columns: Any) -> list[float]:
    """A reward that costs nothing and differs between responses."""
    return [float(len(str(c)) % 2) for c in completions]


LORA = {"lora_r": 16, "lora_alpha": 32}
BOTH = {"learning_rate": 1e-5, "gradient_checkpointing": True, "max_grad_norm": 1.0, "logging_steps": 1}


def settings(job: Job) -> dict[str, Any]:
    """What both sides' configs call by the same names."""
    w = job.work
    shared = {**BOTH, "max_steps": job.steps + UNCOUNTED, "per_device_train_batch_size": w.batch}
    if job.method == "sft":
        return shared | {"max_length": w.response, "packing": False}
    if job.method == "dpo":
        return shared | {"max_length": w.prompt + w.response, "beta": 0.1}
    shared |= {"max_completion_length": w.response, "temperature": 1.0}
    return shared | ({"num_generations": w.group, "beta": 0.0, "loss_type": "dapo"} if job.method == "grpo" else {})


BASES: dict[int, dict[str, Any]] = {4: {"load_in_4bit": True}, 16: {"dtype": "bfloat16"}, 32: {"dtype": "float32"}}


def common_settings(job: Job) -> dict[str, Any]:
    """What all our trainers are told."""
    quiet = {"quiet": True, "save_steps": 10**9, "warmup_ratio": 0.0}
    return {"use_peft": True, **LORA, **quiet, **BASES[job.bits], **(job.options or {})}


def longest_row(job: Job, scratch: Path) -> dict[str, Any]:
    """The longest document of which a forward and a backward pass fit, to an eighth; the model is loaded once."""
    import torch
    from transformers import AutoConfig

    from rlhf_fast import SFTConfig, SFTTrainer

    given = {"per_device_train_batch_size": 1, "packing": False, **common_settings(job)}
    model: Any = job.folder
    reset_peak()

    def fits(length: int) -> bool:
        nonlocal model
        config = SFTConfig(output_dir=str(scratch), max_length=length, micro_batch_tokens=length, **given)
        trainer = SFTTrainer(model, args=config, train_dataset=[{"text": digits(length - 1, 0)}])
        model = trainer.policy
        model.train()
        try:
            records = trainer.collect(trainer.largest())
            for loss, *_ in trainer.losses(records, trainer.own_window(records)):
                trainer.accelerator.backward(loss)
            trainer.optimizer.step()  # its state takes memory too
        except torch.OutOfMemoryError:
            return False
        finally:
            trainer.optimizer.zero_grad(set_to_none=True)
            trainer.optimizer.state.clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        report({"longest_row": length, "peak_gb": peak_gb()})  # in case the next one takes too long
        return True

    # a CPU has no limit to run into
    cuda = torch.cuda.is_available()
    ceiling, step = (longest_kept(AutoConfig.from_pretrained(job.folder)), 2048) if cuda else (1024, 256)
    longest = 0
    while longest + step <= ceiling and fits(longest + step):
        longest += step
        step = longest
    while step > max(longest // 8, 256):
        step //= 2
        longest += step if longest + step <= ceiling and fits(longest + step) else 0
    return {"longest_row": longest, "peak_gb": peak_gb()}


def longest_kept(config: Any) -> int:
    """Tokens whose checkpointed inputs fit into three quarters of the host's free memory, a power of two up to 2^20.

    CUDA's pinned memory comes in powers of two, a buffer a layer; a process that runs out of it is killed.
    """
    kept = 3 * host.free() // 4 // (config.num_hidden_layers * config.hidden_size * 2)
    return min(1 << 20, 1 << max(11, kept.bit_length() - 1))


def our_trainer(job: Job, scratch: Path) -> Any:
    """The trainer of a job, ready to train into ``scratch/run``."""
    import torch

    import rlhf_fast

    names = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO", "grpo": "GRPO", "reward": "Reward"}
    common = common_settings(job)
    arguments: dict[str, Any] = {}
    if job.method == "ppo":
        # the score of a model that sits on the same base: an adapter and a head, trained for one step
        reward = rlhf_fast.RewardConfig(
            output_dir=str(scratch / "reward"), max_steps=1, per_device_train_batch_size=1, **common
        )
        pair = [{"prompt": "1", "chosen": "2", "rejected": "3"}]
        rlhf_fast.RewardTrainer(job.folder, args=reward, train_dataset=pair).train()
        gc.collect()  # its base, before the next one is loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        common["reward_model_path"] = str(scratch / "reward")
    elif job.method == "grpo":
        arguments["reward_funcs"] = [lambda prompts, completions, completion_ids, **columns: parity(completions)]
    if job.method in ("ppo", "grpo"):
        common |= {"rollout_batch_size": job.work.batch, "max_prompt_length": None}
    config = getattr(rlhf_fast, f"{names[job.method]}Config")(
        output_dir=str(scratch / "run"), **{**settings(job), **common}
    )
    return getattr(rlhf_fast, f"{names[job.method]}Trainer")(
        job.folder, args=config, train_dataset=rows_of(job), **arguments
    )


def ours(job: Job, scratch: Path) -> dict[str, Any]:
    from rlhf_fast.run.metrics import read_metrics

    trainer = our_trainer(job, scratch)
    clock, after_step = Clock(job), trainer.after_step

    def stamped() -> None:
        after_step()
        clock.step()

    trainer.after_step = stamped
    trainer.train()
    logged = read_metrics(scratch / "run")
    split = {
        name: statistics.median([r[f"time/{name}"] for r in logged[UNCOUNTED:] if f"time/{name}" in r] or [0.0])
        for name in ("generate", "reward", "train")
    }
    losses = [r["loss"] for r in logged if "loss" in r]
    return clock.figures() | split | {"first_loss": losses[0] if losses else None}


def trl(job: Job, scratch: Path) -> dict[str, Any]:
    """With its own memory savers on: Liger's kernels where they run, flash attention where it is installed."""
    import torch
    import trl as library
    from datasets import Dataset
    from transformers import TrainerCallback

    from rlhf_fast.models.adapters import lora_config

    cuda = torch.cuda.is_available()
    load: dict[str, Any] = {"dtype": "float32" if job.bits == 32 else "bfloat16"}
    if importlib.util.find_spec("flash_attn"):
        load["attn_implementation"] = "flash_attention_2"
    if job.bits == 4:
        from transformers import BitsAndBytesConfig

        load["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
    names = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO"}
    config = getattr(library, f"{names[job.method]}Config")(
        output_dir=str(scratch / "run"),
        bf16=cuda,
        use_cpu=not cuda,
        use_liger_kernel=cuda and importlib.util.find_spec("liger_kernel") is not None,
        model_init_kwargs=load,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        warmup_steps=0,
        **settings(job),
    )
    trainer = getattr(library, f"{names[job.method]}Trainer")(
        job.folder,
        args=config,
        train_dataset=Dataset.from_list(rows_of(job)),
        peft_config=lora_config(LORA["lora_r"], LORA["lora_alpha"]),
        **({"reward_funcs": parity} if job.method == "grpo" else {}),
    )
    clock = Clock(job)

    class Stamp(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            clock.step()

    trainer.add_callback(Stamp())
    trainer.train()
    losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    return clock.figures() | {"first_loss": losses[0] if losses else None}


# ---- rows


def line(row: dict[str, Any]) -> str:
    about = f"{row['model']} {row['bits']} bits {row['method']:5} {row['side']:5}"
    if row["status"] != "ok":
        return f"{about} {row['status']}"
    if row["method"] == LONGEST:
        return f"{about} of SFT: {row['longest_row']:,} tokens in {row['cap_gb'] or 'all'} GiB"
    ratio = f"  {row['ratio']:.2f}x TRL's speed, {row['memory_ratio']:.2f}x its memory" if row.get("ratio") else ""
    return f"{about} {row['tokens_per_second']:10,.0f} tokens/s  {row['peak_gb']:6.2f} GiB{ratio}"


def write(out: Path, device: str, rows: list[dict[str, Any]]) -> None:
    """Merge the rows into the CSV file of the device, and render its table."""
    from bench.report import machine, put_rows, version

    packages = ("torch", "triton", "transformers", "peft", "bitsandbytes", "trl", "liger-kernel", "flash-attn")
    made = {
        "machine": machine(device),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": " ".join(f"{name}={version(name)}" for name in packages),
    }
    path = out / f"train-{device}.csv"
    merged = put_rows(path, [made | row for row in rows], KEY, COLUMNS)
    path.with_suffix(".md").write_text(markdown(merged))


def markdown(rows: list[dict[str, str]]) -> str:
    shown = {
        "model": "model",
        "bits": "base bits",
        "cap_gb": "cap, GiB",
        "method": "method",
        "work": "batch x tokens",
        "side": "side",
        "status": "status",
        "tokens_per_second": "tokens/s",
        "longest_row": "longest row",
        "settings": "our settings",
        "peak_gb": "peak, GiB",
        "generate": "generate, s",
        "reward": "reward, s",
        "train": "train, s",
        "ratio": "speed over TRL",
        "memory_ratio": "memory over TRL",
    }
    how = (__doc__ or "").split("\n\n")[2]
    lines = ["# Training steps", "", "`python -m bench.train`.", "", how, ""]
    lines += ["| " + " | ".join(shown.values()) + " |", "|" + " --- |" * len(shown)]
    lines += ["| " + " | ".join(r[k] for k in shown) + " |" for r in rows]
    if rows:
        lines += ["", f"{rows[-1]['machine']}; {rows[-1]['date']}; {rows[-1]['versions']}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
