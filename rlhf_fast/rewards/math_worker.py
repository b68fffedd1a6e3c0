"""A worker of the ``math`` reward: whether two answers mean the same, by math-verify. Run as a program, see ``workers.py``.

SymPy evaluates what a model writes, which may take for ever or all memory: hence a process of its own, with limits.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys

MEMORY = 2 << 30  # bytes of address space; SymPy needs a tenth


def main() -> None:
    # the folder of this file is no place to import from
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != os.path.dirname(os.path.abspath(__file__))]
    import logging

    # math-verify's own deadlines are off, because ours cannot be swallowed; it would warn of that
    logging.disable(logging.CRITICAL)
    from math_verify import LatexExtractionConfig, parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    config = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", config, parsing_timeout=None)

    def equal(wanted: str, answer: str) -> bool:
        gold, target = read(wanted), read(answer)
        return verify(gold, target, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)

    equal("x^2 + 1/2", "x^2 + 0.5")  # builds its grammars
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        timeout, (wanted, answer) = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout + 1)  # SIGALRM ends the process, wherever it hangs
        try:
            outcome = {"equal": bool(equal(wanted, answer))}
        except Exception as error:  # noqa: BLE001 (whatever SymPy raises on what a model wrote)
            outcome = {"fault": f"{type(error).__name__}: {error}"[:200]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(outcome), file=answers, flush=True)


if __name__ == "__main__":
    main()
