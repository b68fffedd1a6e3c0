"""The rewards ``math`` and ``code`` on labelled data: agreement, right and wrong programs, cost of a sandbox.

    python -m bench.verifiers --data DATA -o bench/results/verifiers.md

DATA holds ``gsm8k/model_solutions.jsonl`` (solutions of four models, each marked right or wrong) and ``humaneval/tasks.jsonl``
(``prompt``, ``canonical_solution``, ``test``, ``entry_point``). Wrong programs are canonical solutions with one change
(``bench.mutants``), those kept whose results differ: a plain Python, without sandbox or grader, calls both with the arguments
that the task's own test uses, and runs that test.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from bench.mutants import mutants
from rlhf_fast.rewards import Answer, Code, Math
from rlhf_fast.rewards.grading import LocalGrader, task_from
from rlhf_fast.rewards.sandbox import Bwrap, Guest, Limits

CORES = len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--mutants", type=int, default=1000, help="wrong programs to grade")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    title = (
        f"# Verifiers\n\n`python -m bench.verifiers`, {CORES} cores shared with other work, {time.strftime('%Y-%m-%d')}, "
        f"Python {platform.python_version()}, math-verify {version('math-verify')}, {Bwrap()!r}."
    )
    parts = [title]
    for part in args.parts:
        parts.append(PARTS[part](args))
        print(parts[-1], flush=True)
    if args.output:
        args.output.write_text("\n\n".join(parts) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------------- answers

# how a solution ends: what its last line `A: 18` is rewritten to
ENDINGS = {
    "`A: 18`, as it is": "{solution}\nA: {answer}",
    "`#### 18`": "{solution}\n#### {answer}",
    r"`\boxed{18}`": "{solution}\nHence \\boxed{{{answer}}}.",
    "`The answer is 18.`": "{solution}\nThe answer is {answer}.",
    "`So it is 18.`": "{solution}\nSo it is {answer}.",
}


def gsm8k(args: argparse.Namespace) -> str:
    """Agreement with the labels, for each way to end a solution and each verifier."""
    labelled = [
        (row["ground_truth"], given["solution"], given["is_correct"])
        for row in read(args.data / "gsm8k" / "model_solutions.jsonl")
        for given in row.values()
        if isinstance(given, dict)
    ]
    verifiers = {"math": Math(), "answer": Answer(), "math-verify alone": math_verify_alone}
    lines, disagreements = [], []
    for ending, form in ENDINGS.items():
        texts = [ending_as(form, solution) for _, solution, _ in labelled]
        cells = []
        for name, verifier in verifiers.items():
            start = time.perf_counter()
            scores = verifier(
                completions=texts, answer=[None] * len(texts), solution=[truth for truth, _, _ in labelled]
            )
            seconds = time.perf_counter() - start
            wrong = [i for i, (score, (*_, right)) in enumerate(zip(scores, labelled)) if score != float(right)]
            cells.append(f"{1 - len(wrong) / len(labelled):.2%} ({len(wrong)}), {seconds:.1f} s")
            if name == "math":
                disagreements += [disagreement(ending, scores[i], *labelled[i]) for i in wrong]
        lines.append(f"| {ending} | {' | '.join(cells)} |")
    table = f"| a solution ends with | {' | '.join(verifiers)} |\n|---|---|---|---|\n" + "\n".join(lines)
    listed = "\n".join(disagreements) or "None."
    return (
        f"## Answers: GSM8K\n\n{len(labelled):,} labelled solutions; agreement with `is_correct`, in brackets the solutions that "
        f"disagree.\n\n{table}\n\nDisagreements of `math`:\n\n{listed}"
    )


def ending_as(form: str, solution: str) -> str:
    body, mark, answer = solution.rpartition("\nA: ")
    return form.format(solution=body, answer=answer.strip()) if mark else solution


def disagreement(ending: str, score: Any, truth: str, solution: str, right: bool) -> str:
    said, wanted = (" ".join(text.split())[-60:] for text in (solution, truth))
    return f"- {ending}: scored {score}, labelled {float(right)}: `...{said}` for `...{wanted}`"


def math_verify_alone(completions: Sequence[str], solution: Sequence[str], **_: Any) -> list[float]:
    """math-verify's own extraction from the whole text, in this process."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    golds = [parse(text.rpartition("A: ")[2]) for text in solution]
    return [float(verify(gold, parse(text))) for gold, text in zip(golds, completions)]


# ---------------------------------------------------------------------------------------------------- programs

# Reads a task and its mutants; for each mutant: do its results differ from the canonical ones, does the plain test accept it?
ORACLE = """
import copy, json, resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
task = json.load(sys.stdin)
sys.stdout, out = open("/dev/null", "w"), sys.stdout

def load(program):
    names = {}
    exec(program, names)
    return names

def outcome(function, arguments):
    try:
        return repr(function(*copy.deepcopy(arguments)))
    except Exception as error:
        return type(error).__name__

class OutOfTime(BaseException):
    pass

def stop(*_):
    raise OutOfTime
signal.signal(signal.SIGVTALRM, stop)
calls = []
right = load(task["program"])

def recording(*arguments):
    calls.append(copy.deepcopy(arguments))
    return right[task["entry_point"]](*arguments)
names = load(task["program"] + chr(10) + task["test"])
names["check"](recording)
wanted = [outcome(right[task["entry_point"]], arguments) for arguments in calls]
for program in task["mutants"]:
    signal.setitimer(signal.ITIMER_VIRTUAL, 1, 1)
    differs, accepted = True, False
    try:
        names = load(program + chr(10) + task["test"])
        differs = [outcome(names[task["entry_point"]], arguments) for arguments in calls] != wanted
        names["check"](names[task["entry_point"]])
        accepted = True
    except BaseException:
        pass
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    print(json.dumps([differs, accepted]), file=out, flush=True)
"""


def humaneval(args: argparse.Namespace) -> str:
    """Canonical solutions, and wrong programs made of them."""
    tasks = read(args.data / "humaneval" / "tasks.jsonl")
    start = time.perf_counter()
    right = grade(Code(timeout=10.0), tasks, [task["prompt"] + task["canonical_solution"] for task in tasks])
    seconds = time.perf_counter() - start

    with ThreadPoolExecutor(CORES) as pool:
        per_task = list(pool.map(wrong_programs, tasks))
    rounds = zip_longest(*([(task, program) for program in wrong] for task, (wrong, _) in zip(tasks, per_task)))
    chosen = [entry for entries in rounds for entry in entries if entry is not None][: args.mutants]
    scores = grade(Code(timeout=2.0), *zip(*chosen))
    passed = [task["task_id"] for (task, _), score in zip(chosen, scores) if score]
    tolerated = {task["task_id"]: count for task, (_, count) in zip(tasks, per_task) if count}
    faults = Counter(str(score) for score in [*right, *scores] if not isinstance(score, float))
    return (
        f"## Programs: HumanEval\n\n- {sum(score == 1.0 for score in right)} of {len(tasks)} canonical solutions pass "
        f"({seconds:.1f} s).\n- {len(passed)} of {len(chosen):,} wrong ones pass{': ' if passed else ''}{', '.join(passed)}.\n"
        f"- Faults: {dict(faults) or 'none'}.\n- Left out: mutants whose results differ but which the task's own test accepts in a "
        f"plain Python (a root to 1e-4, None for False): {', '.join(f'{count} of {name}' for name, count in tolerated.items()) or 'none'}."
    )


def wrong_programs(task: dict[str, Any]) -> tuple[list[str], int]:
    """Mutants whose results differ on the test's own arguments, and how many more of them the test, run plainly, accepts."""
    program = task["prompt"] + task["canonical_solution"]
    made = mutants(program, task["entry_point"])[:30]
    job = {**task, "program": program, "mutants": made}
    done = subprocess.run(
        [sys.executable, "-c", ORACLE], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [mutant for mutant, (differs, accepted) in zip(made, verdicts) if differs and not accepted]
    return wrong, sum(differs and accepted for differs, accepted in verdicts)


def grade(code: Code, tasks: Sequence[dict[str, Any]], programs: Sequence[str]) -> list[Any]:
    """Scores of whole programs; the prompt is repeated in them, which changes nothing."""
    columns = {name: [task[name] for task in tasks] for name in ("test", "entry_point")}
    return code([task["prompt"] for task in tasks], [f"    pass\n\n{program}" for program in programs], **columns)


# ---------------------------------------------------------------------------------------------------- cost


def cost(args: argparse.Namespace) -> str:
    """CPU time of a run with and without the sandbox, and what a second worker brings."""
    sandbox, limits = Bwrap(), Limits()
    plain = cpu_ms(lambda job: Guest([sandbox.python], job, limits))
    boxed = cpu_ms(lambda job: sandbox.start(job, limits))
    task = task_from(
        "def f(n):\n    return sum(i * i for i in range(n))",
        [{"args": [2_000_000], "expected": 2666664666667000000}],
        "f",
    )
    lines = []
    for workers in (1, CORES):
        start = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            grades = list(pool.map(lambda _: LocalGrader(sandbox).grade(task, limits), range(40)))
        wall = time.perf_counter() - start
        assert all(grade.passed for grade in grades)
        lines.append(f"| {workers} | {wall:.1f} | {40 / wall:.1f} |")
    return (
        f"## Cost of a sandbox\n\nCPU time of a program that adds three numbers, all processes and this one's part included: "
        f"{plain:.1f} ms in a plain `python -I -S`, {boxed:.1f} ms in bwrap: {boxed - plain:.1f} ms more. 100 runs each.\n\n"
        "40 runs of about 0.1 s of arithmetic:\n\n| workers | seconds | runs per second |\n|---|---|---|\n"
        + "\n".join(lines)
    )


def cpu_ms(start: Callable[[dict[str, Any]], Guest], runs: int = 100) -> float:
    """CPU milliseconds of one run of a small program that ends by itself (a killed one's time would be nobody's)."""
    job = {"role": "program", "source": "print(sum(map(int, input().split())))"}
    before = cpu_seconds()
    for _ in range(runs):
        with start(job) as guest:
            guest.send_input(b"1 2 3\n")
            assert guest.output(time.monotonic() + 60) == b"6\n"
    return (cpu_seconds() - before) / runs * 1e3


def cpu_seconds() -> float:
    """User and system time of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


PARTS = {"gsm8k": gsm8k, "humaneval": humaneval, "cost": cost}

if __name__ == "__main__":
    main()
