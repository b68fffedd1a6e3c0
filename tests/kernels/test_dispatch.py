"""Which backend runs, who decides, and what is said when it cannot."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from rlhf_fast.kernels import (
    BACKENDS,
    available,
    backend_report,
    dispatch,
    dpo_loss,
    gae,
    implementation,
    policy_loss,
    token_logprobs,
    use_backend,
)

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = (torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))


def chosen(*tensors):
    return implementation("advantages", "gae", *(tensors or ARGUMENTS)).__name__.rpartition(".")[2]


@pytest.fixture
def fake_cpu(monkeypatch):
    """A CPU backend that accepts float32, whether or not the native module is built."""
    module = types.SimpleNamespace(
        __name__="x.cpu_impl",
        gae=gae,
        unsupported=lambda op, *t, **o: None if t[0].dtype == torch.float32 else "float32 only",
    )
    load = dispatch._load
    monkeypatch.setattr(dispatch, "_load", lambda family, name: module if name == "cpu" else load(family, name))
    monkeypatch.delenv("RLHF_FAST_BACKEND", raising=False)


def test_auto_takes_the_first_backend_that_can(fake_cpu):
    assert chosen() == "cpu_impl"
    assert chosen(ARGUMENTS[0].double()) == "reference"


def test_auto_never_runs_triton_on_cpu_tensors(monkeypatch):
    """Even where the interpreter could: it is thousands of times slower."""
    monkeypatch.delenv("RLHF_FAST_BACKEND", raising=False)
    assert "triton" not in dispatch.AUTO["cpu"]
    with use_backend("auto"):
        assert chosen() != "triton_impl"


def test_a_named_backend_is_used_or_says_why_not(fake_cpu, monkeypatch):
    with use_backend("reference"):
        assert chosen() == "reference"
    monkeypatch.setenv("RLHF_FAST_BACKEND", "cpu")
    assert chosen() == "cpu_impl"
    with pytest.raises(RuntimeError, match=r"can run gae here \(cpu: float32 only\)"):
        chosen(ARGUMENTS[0].double())


def test_a_list_is_an_order_of_preference(fake_cpu, monkeypatch):
    monkeypatch.setenv("RLHF_FAST_BACKEND", "cpu, reference")
    assert chosen() == "cpu_impl"
    assert chosen(ARGUMENTS[0].double()) == "reference"
    monkeypatch.setenv("RLHF_FAST_BACKEND", "cuda,cpu")
    with pytest.raises(RuntimeError, match=r"cuda: .*; cpu: float32 only"):
        chosen(ARGUMENTS[0].double())


def test_use_backend_wins_over_the_environment_and_ends_with_its_block(fake_cpu, monkeypatch):
    monkeypatch.setenv("RLHF_FAST_BACKEND", "cpu")
    with use_backend("reference"):
        with use_backend("auto"):
            assert chosen() == "cpu_impl"
        assert chosen() == "reference"
    assert chosen() == "cpu_impl"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert chosen() == "cpu_impl"


def test_use_backend_reaches_other_threads():
    """Autograd runs CUDA backward passes in threads of its own."""
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="unknown backend 'opencl'; choose among cpu, triton"), use_backend("opencl"):
        pass
    monkeypatch.setenv("RLHF_FAST_BACKEND", "cpu,gpu")
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        chosen()


def test_every_backend_gives_a_module_or_a_reason():
    for family, ops in dispatch.OPS.items():
        assert available(family, "reference", ops[0], torch.zeros(1, 1)) is None
        for backend in BACKENDS:
            reason = available(family, backend, ops[0], torch.zeros(1, 1))
            assert reason is None or (isinstance(reason, str) and len(reason) > 10)


def test_what_cannot_be_imported_says_so(monkeypatch):
    """A missing triton is a reason, not a crash, and is not tried again and again."""
    dispatch._load.cache_clear()
    monkeypatch.setitem(sys.modules, "rlhf_fast.kernels.advantages.triton_impl", None)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    try:
        assert "cannot be imported" in available("advantages", "triton", "gae", *ARGUMENTS)
    finally:
        dispatch._load.cache_clear()
    monkeypatch.undo()
    assert "no cpu kernel for dpo_loss" in available("preference", "cpu", "dpo_loss", *ARGUMENTS)


def test_the_report_names_one_backend_per_operation_and_device():
    rows = backend_report()
    assert {row.op for row in rows} == {op for ops in dispatch.OPS.values() for op in ops}
    for row in rows:
        assert row.backend in BACKENDS and row.backend not in row.refused
    with use_backend("cuda"):
        if not torch.cuda.is_available():
            # "reference" where there is no CUDA kernel to name
            assert {row.backend for row in backend_report()} <= {"none", "reference"}
            assert {row.backend for row in backend_report() if row.op == "gae"} == {"none"}


def test_a_named_backend_without_a_kernel_for_an_operation_is_no_refusal():
    """`RLHF_FAST_BACKEND=cpu` names the CPU kernels; whitening has none of its own and stays plain PyTorch."""
    with use_backend("cpu"):
        assert dispatch.choose("preference", "dpo_loss", *ARGUMENTS) == "reference"


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_chosen_backend_is_the_one_that_runs(monkeypatch, name):
    """From the public function down to the raw one."""
    with use_backend(name):
        try:
            module = implementation("advantages", "gae", *ARGUMENTS)
        except RuntimeError as error:
            pytest.skip(str(error))
        calls = []
        original = module.gae
        monkeypatch.setattr(module, "gae", lambda *a: calls.append(1) or original(*a))
        gae(*ARGUMENTS)
        assert calls == [1]


def test_importing_the_door_is_light():
    """No Triton and no native module is loaded, no CUDA is initialised, before something runs."""
    code = (
        "import sys, torch, rlhf_fast.kernels; "
        "assert 'triton' not in sys.modules, 'triton'; assert 'rlhf_fast._C' not in sys.modules, '_C'; "
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_tensors_of_one_call_share_a_device():
    """Kernels are given addresses: a mask that was left on the host would be read as device memory, and crash."""
    mask, tokens = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="advantages is on meta, the other tensors are on cpu"):
        policy_loss(tokens, tokens, torch.zeros(2, device="meta"), mask)
    with pytest.raises(ValueError, match="values is on meta"):
        gae(tokens, tokens.to("meta"), mask)
    with pytest.raises(ValueError, match="labels is on meta"):
        token_logprobs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long, device="meta"))
    with pytest.raises(ValueError, match="rejected is on meta"):
        dpo_loss(tokens[0], tokens[0].to("meta"), tokens[0], tokens[0])


def test_a_second_derivative_is_refused_instead_of_wrong():
    """A kernel hands autograd numbers, whose own derivative it would take for 0."""
    mask, logprobs = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, requires_grad=True)
    loss, _ = policy_loss(logprobs, torch.zeros(1, 3), torch.ones(1), mask)
    if dispatch.choose("policy", "policy_loss", logprobs) == "reference":
        pytest.skip("no kernel here: plain PyTorch has every derivative")
    (gradient,) = torch.autograd.grad(loss, logprobs, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def slower_first(rows) -> list[str]:
    """Operations of the GPU whose preferred kernel took longer than the other one, by more than 5% over all cases."""
    times, logs = {}, {}
    for row in rows:
        if row["status"] == "ok" and row["contender"].startswith("rlhf_fast ("):
            case = times.setdefault(tuple(row[name] for name in ("op", "variant", "shape", "dtype", "pass")), {})
            case[row["contender"][len("rlhf_fast (") : -1]] = float(row["median_ms"])
    for (op, *_), case in times.items():
        # as the benchmarks name them: token_logprobs stands for its two halves, linear_* for the rows of the head
        known = [o for ops in dispatch.OPS.values() for o in ops if o.startswith(op)]
        for name in known or (["head_rows"] if op.startswith("linear_") else []):
            first, second = (b for b in dispatch.order_of(name, "cuda") if b in ("triton", "cuda"))
            if first in case and second in case:
                logs.setdefault(name, []).append(math.log(case[first] / case[second]))
    return sorted(name for name, x in logs.items() if sum(x) / len(x) > math.log(1.05))


def test_the_order_of_kernels_on_a_gpu_agrees_with_what_was_measured():
    """On rows made up here, and on those of bench/results once a GPU has written them."""
    case = {"shape": "1", "dtype": "fp32", "pass": "forward", "variant": "", "status": "ok"}

    def measured(op, cuda, triton):
        times = {"rlhf_fast (cuda)": cuda, "rlhf_fast (triton)": triton}
        return [{**case, "op": op, "contender": name, "median_ms": time} for name, time in times.items()]

    assert slower_first(measured("gae", 1.0, 2.0) + measured("token_logprobs", 2.0, 1.0)) == []
    assert slower_first(measured("gae", 2.0, 1.0)) == ["gae", "gae_packed"]
    assert slower_first(measured("linear_logprobs", 1.0, 2.0)) == ["head_rows"]
    rows = []
    for path in (ROOT / "bench" / "results").glob("ops-cuda*.csv"):
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    assert slower_first(rows) == [], "swap them in rlhf_fast/kernels/dispatch.py"


def test_kernels_that_are_over_in_microseconds_come_compiled():
    assert dispatch.order_of("policy_loss", "cuda")[0] == "cuda"
    assert dispatch.order_of("token_logprobs_forward", "cuda")[0] == "triton"
    assert dispatch.order_of("policy_loss", "cpu") == dispatch.AUTO["cpu"]
    with use_backend("reference"):
        assert dispatch.order_of("policy_loss", "cuda") == ("reference",)
    for orders in dispatch.PREFERRED.values():
        assert set(orders) <= {op for ops in dispatch.OPS.values() for op in ops}
