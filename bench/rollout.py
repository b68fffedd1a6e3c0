"""Tokens per second of rollouts: the slot engine beside ``transformers.generate`` and transformers' continuous batching.

    python -m bench.rollout [CONTENDER ...] [--shape cpu|7b] [--prompts 64] [--n 4] [--longest 256] [--rounds 3]
    python -m bench.rollout --memory      # of the slot engine, by the number of requests

Every contender continues the same prompts, ``--n`` samples each, at temperature 1 to the same lengths: prompts and responses
are ragged, between 8 and ``--longest`` tokens, the response length drawn per prompt, and nothing ends a response early.
``generate`` takes prompts sorted by length in batches; a batch runs until its longest response is complete, and only the tokens
that were asked for count. Unless ``--batches`` names sizes, each contender is tried with 64 sequences at a time, then with twice
and half as many until it gets slower on both sides; its best size is then run ``--rounds`` times in all, everybody in turn.
``--known`` takes the best size from the rows of an earlier search instead.
Before anything is timed, each contender's greedy tokens are compared with those of ``transformers.generate`` one prompt at a time.
Weights are random. With one thread on a CPU it is CPU seconds that count: they hardly notice what else the machine does.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from bench import host
from bench.report import machine, put_rows, read_text, version
from rlhf_fast.models import Policy
from rlhf_fast.rollout import GenerateEngine, Request, SlotEngine

RESULTS = Path(__file__).parent / "results"
SHORTEST = 8
SHAPES = {
    "cpu": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
    | {"num_key_value_heads": 2, "vocab_size": 4096},
    # Qwen2.5-7B
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064},
}
COLUMNS = (
    "shape",
    "device",
    "threads",
    "prompts",
    "n",
    "longest",
    "contender",
    "batch",
    "status",
    "tokens",
    "seconds",
    "min_s",
)
COLUMNS += ("max_s", "median_cpu_s", "tokens_per_second", "of_bandwidth", "peak_gb", "rounds", "machine")
COLUMNS += ("date", "versions")
START = 64  # sequences at a time that the search for the best number begins with
MEMORY_COLUMNS = ("requests", "samples", "tokens", "peak_mb", "cache_mb", "machine", "date", "versions")
KEY = ("shape", "device", "threads", "prompts", "n", "longest", "contender", "batch")


@dataclass(frozen=True)
class Work:
    """What everyone continues."""

    prompts: list[list[int]]
    lengths: list[int]  # of the responses to each prompt
    n: int

    @classmethod
    def of(cls, prompts: int, n: int, longest: int, vocabulary: int) -> Work:
        draw = torch.Generator().manual_seed(0)
        sizes = torch.randint(SHORTEST, longest + 1, (2, prompts), generator=draw).tolist()
        ids = [torch.randint(vocabulary, (size,), generator=draw).tolist() for size in sizes[0]]
        return cls(ids, sizes[1], n)

    @property
    def tokens(self) -> int:
        return self.n * sum(self.lengths)

    def sorted_batches(self, size: int) -> Iterator[list[int]]:
        """Prompts of similar length together, ``size`` sequences at a time."""
        order = sorted(range(len(self.prompts)), key=lambda i: -len(self.prompts[i]))
        step = max(1, size // self.n)
        return (order[i : i + step] for i in range(0, len(order), step))


Contender = Callable[[Policy, Work, int, float], dict[int, list[list[int]]]]  # -> prompt -> samples


def engine_run(make: Callable[[Policy, int], Any]) -> Contender:
    def run(policy: Policy, work: Work, batch: int, temperature: float):
        requests = [
            Request(p, n=work.n, max_new_tokens=length, temperature=temperature, seed=i)
            for i, (p, length) in enumerate(zip(work.prompts, work.lengths))
        ]
        return {i: [s.ids for s in group] for i, group in enumerate(make(policy, batch).generate(requests))}

    return run


def generate_run(cache: str) -> Contender:
    def run(policy: Policy, work: Work, batch: int, temperature: float):
        found = {}
        with policy.generation_model() as model, torch.no_grad():
            for rows in work.sorted_batches(batch):
                prompts, longest = [work.prompts[i] for i in rows], max(work.lengths[i] for i in rows)
                width = max(map(len, prompts))
                ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
                mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
                settings = sampling(temperature, work.n, max_new_tokens=longest)
                settings.cache_implementation = cache
                out = model.generate(ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
                for k, i in enumerate(rows):
                    found[i] = [row[: work.lengths[i]] for row in out[k * work.n : (k + 1) * work.n]]
        return found

    return run


def continuous_run(policy: Policy, work: Work, batch: int, temperature: float):
    """transformers' continuous batching, driven as its ``generate_batch`` does, with a length for each request."""
    from transformers import ContinuousBatchingConfig

    settings = sampling(temperature, work.n, max_new_tokens=max(work.lengths))
    config = ContinuousBatchingConfig(max_requests_per_batch=batch)
    found: dict[int, list[list[int]]] = {i: [] for i in range(len(work.prompts))}
    with policy.generation_model() as model:
        manager = model.continuous_batching_context_manager(
            generation_config=settings, continuous_batching_config=config, block=True, timeout=5
        )
        with manager as running:
            for i in sorted(found, key=lambda i: -len(work.prompts[i])):
                running.add_request(work.prompts[i], request_id=f"p{i}", max_new_tokens=work.lengths[i])
            left = work.n * len(found)
            while left:
                result = running.get_result(timeout=1)
                if result is None:
                    if not running.is_running():
                        raise RuntimeError("its thread ended early")
                elif result.is_finished():
                    if result.error:
                        raise RuntimeError(str(result.error))
                    found[int(result.request_id.partition("__")[0][1:])].append(list(result.generated_tokens))
                    left -= 1
    return found


def sampling(temperature: float, n: int, **options: Any) -> GenerationConfig:
    """Plain sampling to a given length: no EOS, no filters."""
    greedy = temperature == 0
    plain = {} if greedy else {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        do_sample=not greedy, num_return_sequences=n, eos_token_id=None, pad_token_id=0, **plain, **options
    )


CONTENDERS: dict[str, Contender] = {
    "slots": engine_run(lambda policy, batch: SlotEngine(policy, slots=batch)),
    "GenerateEngine": engine_run(lambda policy, batch: GenerateEngine(policy, max_batch_size=batch)),
    "generate": generate_run("dynamic"),
    "generate, static cache": generate_run("static"),
    "continuous batching": continuous_run,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contenders", nargs="*", choices=[[], *CONTENDERS], help=", ".join(CONTENDERS))
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--n", type=int, default=4, help="samples per prompt")
    parser.add_argument("--longest", type=int, default=256, help="tokens of a prompt and of a response, at most")
    parser.add_argument(
        "--batches", type=int, nargs="+", help="sequences at a time, each tried; the best is searched when not given"
    )
    parser.add_argument("--known", action="store_true", help="the sizes that were best in the file, where it has any")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing after this long")
    parser.add_argument("--memory", action="store_true", help="measure memory by the number of requests instead")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bench = Bench(args, build(args.shape))
    if args.memory:
        bench.measure_memory()
    elif args.batches:
        bench.run([(name, batch) for batch in args.batches for name in bench.names], args.rounds)
    elif args.known:
        bench.run([(name, bench.known(name) or bench.search(name)) for name in bench.names], args.rounds)
    else:
        bench.run([(name, bench.search(name)) for name in bench.names], args.rounds - 1)
    print(bench.path.with_suffix(".md").read_text())


class Bench:
    """The runs of one call, written down as they end.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace, policy: Policy) -> None:
        self.args, self.policy, self.began = args, policy, time.perf_counter()
        self.path = args.out / f"rollout-{policy.device.type}.csv"
        self.work = Work.of(args.prompts, args.n, args.longest, SHAPES[args.shape]["vocab_size"])
        self.names = args.contenders or list(CONTENDERS)
        self.faults = {} if args.memory else {name: check(name, policy) for name in self.names}
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}

    def run(self, pairs: list[tuple[str, int]], rounds: int) -> None:
        """Time each (contender, sequences at a time), in turn and each round in the other order."""
        for turn in range(rounds):
            for pair in pairs if turn % 2 == 0 else reversed(pairs):
                self.time(*pair)

    def search(self, name: str) -> int:
        """The fastest number of sequences at a time, by one run each."""
        return climb(lambda batch: self.time(name, batch), START, self.work.n, len(self.work.prompts) * self.work.n)

    def known(self, name: str) -> int | None:
        """The fastest number in the file under these conditions."""
        args = self.args
        about = {"shape": args.shape, "device": self.policy.device.type, "threads": args.threads, "contender": name}
        about |= {"prompts": args.prompts, "n": args.n, "longest": args.longest, "status": "ok"}
        rows = [r for r in read_text(self.path) if all(r[k] == str(v) for k, v in about.items())]
        return int(max(rows, key=speed)["batch"]) if rows else None

    def time(self, name: str, batch: int) -> float:
        """Tokens per second of a contender after one more run; 0 when there is none."""
        args = self.args
        about = {"shape": args.shape, "device": self.policy.device.type, "prompts": args.prompts, "n": args.n}
        fresh = about | {"longest": args.longest, "contender": name, "batch": batch, "times": [], "cpu": []}
        row = self.rows.setdefault((name, batch), fresh)
        if time.perf_counter() - self.began < args.seconds:
            measure(row, self.policy, self.work, self.faults[name])
            # a run that is cut off keeps what it has
            rows = write(self.path, [finished(row, self.work, self.policy)])
            self.path.with_suffix(".md").write_text(markdown(rows, self.memory()))
        return speed(finished(row, self.work, self.policy)) if row["times"] else 0.0

    # ---- memory

    @property
    def memory_path(self) -> Path:
        return self.path.with_name(f"{self.path.stem}-memory.csv")

    def memory(self) -> list[dict[str, str]]:
        return sorted(read_text(self.memory_path), key=lambda row: int(row["requests"]))

    def measure_memory(self) -> None:
        """Peak of the resident memory of a fresh process while 64 slots answer ever more requests, over what the model takes."""
        about = {"machine": machine("cpu"), "date": today(), "versions": versions()}
        for count in (64, 256, 1024):
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                row = fresh.apply(peak_of, (self.args.shape, count, self.args.n, self.args.longest, self.args.threads))
            put_rows(self.memory_path, [row | about], ("requests",), MEMORY_COLUMNS)
        self.path.with_suffix(".md").write_text(markdown(read_text(self.path), self.memory()))


def climb(measure: Callable[[int], float], start: int, least: int, most: int) -> int:
    """The number with the largest ``measure``: from ``start`` twice as many, else half as many, until it falls or they end."""
    found = {start: measure(start)}
    for step in (lambda x: 2 * x, lambda x: x // 2):
        at = start
        while least <= step(at) <= most:
            found[step(at)] = measure(step(at))
            if found[step(at)] <= found[at]:
                break
            at = step(at)
        if at != start:  # on its other side it is known to fall
            break
    return max(found, key=found.get)


def peak_of(shape: str, prompts: int, n: int, longest: int, threads: int) -> dict[str, Any]:
    """In a process of its own: the rise of resident memory over what is there before the first request."""
    torch.set_num_threads(threads)
    policy = build(shape)
    work = Work.of(prompts, n, longest, SHAPES[shape]["vocab_size"])
    engine = SlotEngine(policy, slots=START)
    engine.generate([Request([1], max_new_tokens=2, seed=0)])  # libraries are loaded
    host.forget_peak()
    before = host.memory()["VmRSS"]
    engine.generate(
        [Request(p, n=n, max_new_tokens=k, seed=i) for i, (p, k) in enumerate(zip(work.prompts, work.lengths))]
    )
    peak = (host.memory()["VmHWM"] - before) / 2**20
    sizes = {"requests": prompts, "samples": prompts * n, "tokens": work.tokens}
    return sizes | {"peak_mb": peak, "cache_mb": engine.cache.nbytes / 2**20}


def speed(row: dict[str, Any]) -> float:
    """Tokens per second of a finished row: per CPU second where it is one thread of a CPU."""
    if row["device"] == "cpu" and str(row["threads"]) == "1":
        return float(row["tokens"]) / float(row["median_cpu_s"])
    return float(row["tokens_per_second"])


def versions() -> str:
    return " ".join(f"{p}={version(p)}" for p in ("torch", "transformers"))


def today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


def build(shape: str) -> Policy:
    """A model with random weights, in bf16 on a GPU, that nothing stops."""
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    sizes = {**SHAPES[shape], "max_position_embeddings": 32768, "tie_word_embeddings": False}
    with torch.device("cuda" if cuda else "cpu"):
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, bos_token_id=None, eos_token_id=None)).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    words = Tokenizer(models.WordLevel({"w": 0}, unk_token="w"))
    return Policy(model, PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w", pad_token="w"))


def check(name: str, policy: Policy) -> str | None:
    """What is wrong with the contender's greedy tokens; ties apart, they are those of one prompt at a time."""
    work = Work.of(6, 1, 24, policy.model.config.vocab_size)
    alone = {}
    for i, (prompt, length) in enumerate(zip(work.prompts, work.lengths)):
        alone |= {i: CONTENDERS["generate"](policy, Work([prompt], [length], 1), 1, 0.0)[0]}
    try:
        found = CONTENDERS[name](policy, work, 4, 0.0)
    # whatever a peer raises is its result: the row says so and the others go on
    except Exception as error:  # noqa: BLE001
        return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    same = sum(a == b for i in alone for a, b in zip(alone[i][0], found[i][0]))
    total = sum(work.lengths)
    # 16-bit logits tie, and a sequence differs from its first tie on
    least = 1.0 if policy.model.dtype == torch.float32 else 0.5
    return None if same >= least * total else f"wrong: {same} of {total} greedy tokens are those of generate"


def measure(row: dict[str, Any], policy: Policy, work: Work, fault: str | None) -> None:
    """Run once and note the time, or why there is none."""
    row.setdefault("status", fault or "ok")
    if row["status"] != "ok":
        return
    cuda = policy.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        began = time.perf_counter(), time.process_time()
        found = CONTENDERS[row["contender"]](policy, work, row["batch"], 1.0)
        if cuda:
            torch.cuda.synchronize()
        row["times"].append(time.perf_counter() - began[0])
        row["cpu"].append(time.process_time() - began[1])
        if any([len(s) for s in found[i]] != [length] * work.n for i, length in enumerate(work.lengths)):
            row["status"] = "wrong: responses of other lengths"
    except Exception as error:  # noqa: BLE001
        row["status"] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    row["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    print(row["contender"], row["batch"], row["status"], row["times"], flush=True)


def finished(row: dict[str, Any], work: Work, policy: Policy) -> dict[str, Any]:
    """The row as it is written."""
    times = row["times"]
    median, median_cpu = (statistics.median(x) if x else float("nan") for x in (times, row["cpu"]))
    return {k: v for k, v in row.items() if k not in ("times", "cpu")} | {
        "tokens": work.tokens,
        "seconds": median,
        "min_s": min(times, default=float("nan")),
        "max_s": max(times, default=float("nan")),
        "median_cpu_s": median_cpu,
        "tokens_per_second": work.tokens / median,
        "of_bandwidth": bandwidth_limit(policy) * work.tokens / row["batch"] / median,
        "rounds": len(times),
        "machine": machine(policy.device.type),
        "threads": torch.get_num_threads(),
        "date": today(),
        "versions": versions(),
    }


@functools.cache
def bandwidth_limit(policy: Policy) -> float:
    """Seconds to read all weights but the embeddings once, at the speed of a large copy: no step is shorter. NaN on a CPU,
    where arithmetic is the limit."""
    if policy.device.type != "cuda":
        return float("nan")
    size = sum(p.nbytes for name, p in policy.model.named_parameters() if "embed_tokens" not in name)
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for event in (None, begin, end):
        for _ in range(5):
            target.copy_(source)
        if event is not None:
            event.record()
    torch.cuda.synchronize()
    # each copy reads and writes
    return size / (2 * 5 * source.nbytes / (begin.elapsed_time(end) / 1000))


def write(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Put the rows into the file; returns all that it holds."""
    rounded = [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    return put_rows(path, rounded, KEY, COLUMNS)


def best(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Of each contender the batch size with the most tokens per second."""
    chosen: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["contender"] not in chosen or speed(row) > speed(chosen[row["contender"]]):
            chosen[row["contender"]] = row
    return list(chosen.values())


def markdown(rows: list[dict[str, str]], memory: list[dict[str, str]] = ()) -> str:
    """A table for each set of conditions, each contender at its best batch size, then all of them; and one of memory."""
    lines = [
        "# Rollouts",
        "",
        "`python -m bench.rollout`; every row continues the same prompts to the same lengths. Seconds are those of the CPU where it",
        "is one thread of it, of the clock elsewhere; tokens per second by the clock stand beside them.",
        "",
    ]
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in KEY[:6]), []).append(row)
    for (shape, _, threads, prompts, n, longest), group in groups.items():
        first = group[0]
        sizes = ", ".join(f"{k} {v}" for k, v in SHAPES[shape].items())
        lines += [
            f"## {prompts} prompts x {n} samples, {SHORTEST} to {longest} tokens each, {shape} shape, {threads} thread(s)",
            "",
            f"{first['machine']}, {threads} thread(s), {first['versions']}, {first['date']}. Qwen2 architecture, random",
            f"weights: {sizes}. {first['tokens']} new tokens; medians.",
            "",
            "| contender | sequences at a time | tokens/s | ours over it | by the clock | of the bandwidth limit | rounds | seconds of the clock (least, most) |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        winners = best(group)
        slots = next((r for r in winners if r["contender"] == "slots"), None)
        ours = speed(slots) if slots else math.nan
        for row in winners + [r for r in group if r not in winners]:
            share = float(row["of_bandwidth"])
            told = [f"{speed(row):.0f}", f"{ours / speed(row):.2f}", f"{float(row['tokens_per_second']):.0f}"]
            told += ["" if math.isnan(share) else f"{share:.0%}"]
            told = told if row["status"] == "ok" else [row["status"], "", "", ""]
            mark = " (best)" if row in winners and row["status"] == "ok" else ""
            lines.append(
                f"| {row['contender']}{mark} | {row['batch']} | {' | '.join(told)} | {row['rounds']} | {row['seconds']} ({row['min_s']}, {row['max_s']}) |"
            )
        lines.append("")
    return "\n".join([*lines, *memory_table(memory)])


def memory_table(rows: list[dict[str, str]]) -> list[str]:
    if not rows:
        return []
    first = rows[0]
    return [
        "## Memory by the number of requests",
        "",
        f"`python -m bench.rollout --memory`: {START} slots in a fresh process, {first['machine']}, {first['versions']}, {first['date']}.",
        "The peak is that of resident memory over what is there before the first request, the answers included.",
        "",
        "| requests | samples | new tokens | peak, MiB | of which keys and values |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {r['requests']} | {r['samples']} | {r['tokens']} | {float(r['peak_mb']):.0f} | {float(r['cache_mb']):.0f} |"
            for r in rows
        ),
        "",
    ]


if __name__ == "__main__":
    main()
