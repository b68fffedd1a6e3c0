"""``explore`` runs a property on 300 drawn cases per backend, 5,000 with ``-m slow``, and counts the edge classes.

RLHF_FAST_CASES=40 draws 40, where time is short; that every edge class was among them is not asked then.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, seed, settings

from rlhf_fast.kernels import BACKENDS, dispatch, use_backend
from tests.kernels.properties.problems import matches_float64

# Hypothesis mixes integers and strings that it finds in the source of imported modules into what it draws. So even the
# derandomised cases differ a little between a run of one file and a run of all: they are the same for the same command.
CASES, SLOW_CASES = int(os.environ.get("RLHF_FAST_CASES", "300")), 5000
PROBE = min(20, CASES)  # cases after which a backend that has not run once is given up
SETTINGS = {"deadline": None, "database": None, "print_blob": True, "suppress_health_check": list(HealthCheck)}
if os.environ.get("RLHF_FAST_SHRINK") == "0":
    # a mutant is dead at the first failure; making that one small takes minutes
    SETTINGS |= {"phases": (Phase.generate,), "report_multiple_bugs": False}


def pytest_generate_tests(metafunc):
    """Every test that explores runs once per backend: 300 cases that are the same every time, or 5,000 new ones."""
    if "explore" not in metafunc.fixturenames:
        return
    few = [pytest.param((name, CASES), id=name) for name in BACKENDS]
    many = [pytest.param((name, SLOW_CASES), id=f"{name}-{SLOW_CASES}", marks=pytest.mark.slow) for name in BACKENDS]
    metafunc.parametrize("explore", few + many, indirect=True)


@pytest.fixture
def explore(request, record_property, monkeypatch):
    """Return ``explore(problems, *edges)``: compare every case that ``problems(device)`` draws with float64.

    Every edge class named must have been drawn. Cases that the backend declines fall back to the reference; the count
    says how many. A backend that ran none of the first cases skips the test.
    """
    backend, cases = request.param
    if backend == "cuda" and not torch.cuda.is_available():
        pytest.skip("cuda: no CUDA device")
    ran, edges = Counter(), Counter()
    monkeypatch.setattr(dispatch, "available", _recorder(dispatch.available, ran))

    def check(problem):
        edges.update(problem.edges)
        for name in problem.edges:
            event(name)
        with use_backend("reference" if backend == "reference" else f"{backend},reference"):
            exact = matches_float64(problem)
        if "logprobs" in request.node.name and ((exact[0] < 0) & (exact[0] > math.log(0.999))).any():
            edges["p_y > 0.999"] += 1

    def run(problems, *expected):
        device = "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
        strategy = problems(device)
        settings(max_examples=PROBE, derandomize=True, **SETTINGS)(given(strategy)(check))()
        if backend != "reference" and not ran[backend]:
            pytest.skip(f"{backend}: no kernel took any of {PROBE} cases")
        edges.clear(), ran.clear()
        if cases == CASES:
            settings(max_examples=cases, derandomize=True, **SETTINGS)(given(strategy)(check))()
        else:
            number = int(os.environ.get("RLHF_FAST_SEED") or int.from_bytes(os.urandom(4), "big"))
            print(f"RLHF_FAST_SEED={number} repeats these cases")
            seed(number)(settings(max_examples=cases, **SETTINGS)(given(strategy)(check)))()
        assert cases < 300 or all(edges[edge] for edge in expected), edges
        record_property("edges", json.dumps([cases, dict(ran), dict(edges)]))

    return run


def _recorder(available, ran: Counter):
    def recorded(family, backend, op, *tensors, **options):
        reason = available(family, backend, op, *tensors, **options)
        ran[backend] += reason is None
        return reason

    return recorded


def pytest_terminal_summary(terminalreporter):
    """How often each edge class was drawn, and who computed the cases; not under ``-n``, where workers report it."""
    lines = []
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "edges" and report.when == "call":
                cases, ran, edges = json.loads(value)
                drawn = ", ".join(f"{edge} {count}" for edge, count in sorted(edges.items()))
                lines.append(
                    f"{report.nodeid.rpartition('::')[2]}: {cases} cases; ran {ran or 'as plain PyTorch'}; {drawn}"
                )
    if lines:
        terminalreporter.section("edge classes drawn")
        for line in lines:
            terminalreporter.line(line)
