"""Time operations of rlhf_fast.kernels against PyTorch, TRL, Liger, cut-cross-entropy and quack on the same inputs.

    python -m bench.ops                                   # every operation, on the CPU
    python -m bench.ops token_logprobs gae --dtype fp32
    python -m bench.ops --device cuda
    python -m bench.ops --render                          # tables and plots again, from the CSV files

An operation whose own tests fail is not timed (``--tests failed`` times it and says so). Then every contender's outputs and gradients are compared with float64
on the inputs that it will be timed on, and a wrong one is not timed. The others run in turns; medians and quartiles go
to CSV files in --out, tables and plots to bench/README.md. On a CPU the process starts itself again with --threads
threads and transparent huge pages for tensors (THP_MEM_ALLOC_ENABLE=1), without which page faults dominate the contenders
that allocate much.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.harness import Case, Task

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if argv is None and args.device == "cpu":
        restart_with_settings(args.threads)
    from bench import report

    if not args.render:
        failed = run(args)
        if failed:
            print(f"not timed, their tests fail: {', '.join(failed)}")
    if not args.no_render:
        report.render(args.out, args.readme)
    return 0 if args.render else bool(failed)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help="public operations; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16", "fp16"), help="default: the operation's own")
    parser.add_argument("--shapes", nargs="+", type=shape_of, help="e.g. 512x32000; default: the operation's own")
    parser.add_argument("--passes", nargs="+", help="e.g. forward forward+backward; default: all of the operation")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of samples per shape, dtype and pass; at least 5 rounds"
    )
    parser.add_argument("--max-gb", type=float, default=8.0, help="contenders known to need more are left out (CPU)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "bench" / "README.md")
    parser.add_argument("--csv", type=Path, help="all rows into this file; default: one per family in --out")
    parser.add_argument(
        "--tests", choices=("passed", "failed", "stopped"), help="how they ended just now: they are not run again"
    )
    parser.add_argument("--contenders", choices=("ours", "all"), default="all", help="ours: and the ceilings")
    parser.add_argument("--tiny", action="store_true", help="shapes of a few numbers, to try the benchmark itself")
    parser.add_argument("--render", action="store_true", help="only render what --out holds")
    parser.add_argument("--no-render", action="store_true", help="only write CSV files")
    return parser.parse_args(argv)


def shape_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def restart_with_settings(threads: int) -> None:
    """Both settings are read when torch is loaded, so they must be there before."""
    wanted = {"THP_MEM_ALLOC_ENABLE": "1", "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    # where glibc's own adapting ends up in any process that has freed a few large tensors: until then it hands every
    # freed tensor back to the system, and the next one costs more in page faults than its arithmetic
    wanted |= {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, "-m", "bench.ops", *sys.argv[1:]], os.environ | wanted)


def run(args: argparse.Namespace) -> list[str]:
    """Test, check, time; write a CSV file after every case. Returns the operations whose tests failed."""
    import torch

    from bench import report
    from bench.harness import measure
    from bench.peers import tasks

    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    elif not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device")
    chosen = tasks(args.device)
    if unknown := set(args.ops) - {task.op for task in chosen}:
        sys.exit(f"unknown operation {min(unknown)}; known: {', '.join(dict.fromkeys(t.op for t in chosen))}")
    chosen = [task for task in chosen if not args.ops or task.op in args.ops]
    if args.contenders == "ours":
        chosen = [replace(t, contenders=tuple(c for c in t.contenders if c.ours or c.ceiling)) for t in chosen]
    if args.tiny:  # a peer that compiles by itself may take inductor minutes on a busy machine
        chosen = [
            replace(t, contenders=tuple(c for c in t.contenders if c.compiled or "torch.compile" not in c.name))
            for t in chosen
        ]
    verdicts = {} if args.tests else {file: tests_pass(file) for file in dict.fromkeys(t.tests for t in chosen)}
    conditions = report.conditions(args.device, tested=args.tests or "passed")
    limit = args.max_gb * 1e9 if args.device == "cpu" else torch.cuda.get_device_properties(0).total_memory
    for task in chosen:
        if not verdicts.get(task.tests, True):
            continue
        for case in cases(task, args):
            print(" ".join(str(x) for x in case.labels.values() if x), flush=True)
            start = time.perf_counter()
            rows = measure(case, args.seconds, limit)
            report.merge(args.csv or report.path_of(args.out, args.device, task.family), [r | conditions for r in rows])
            report.show(rows, time.perf_counter() - start)
    return [task.op for task in chosen if not verdicts.get(task.tests, True)]


def cases(task: Task, args: argparse.Namespace) -> list[Case]:
    from bench.harness import Case

    own = task.shapes["dry" if args.tiny else args.device]
    # shapes asked for go to the operations that take as many numbers
    shapes = [shape for shape in args.shapes if len(shape) == len(own[0])] if args.shapes else own
    passes = [p for p in task.passes if not args.passes or p in args.passes]
    dtypes = args.dtype or task.dtypes
    # tried out, a graph is enough: to compile it takes inductor longer than all the rest
    compiler = "aot_eager" if args.tiny else "inductor"
    return [Case(task, p, shape, dtype, args.device, compiler) for shape in shapes for dtype in dtypes for p in passes]


def tests_pass(file: str) -> bool:
    """Run an operation's tests in a process of their own."""
    print(f"{file} ...", end=" ", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", file]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print((result.stdout.strip().splitlines() or [result.stderr.strip()])[-1], flush=True)
    if result.returncode:
        print(result.stdout[-3000:] + result.stderr[-1000:], flush=True)
    return result.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
