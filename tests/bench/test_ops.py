"""The harness of the benchmarks: who is right, who is timed, what reaches the table. No number of seconds is asserted."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from bench import harness, ops, report
from bench.harness import BOTH, FORWARD, Case, Contender, Task
from bench.peers import tasks

TINY = {"cpu": ((4, 3),), "dry": ((4, 3),)}


def make(shape, dtype, device):
    return {"x": torch.arange(1.0, 1 + math.prod(shape)).view(shape).to(dtype)}


def square(x):
    return x * x


def off_by_a_thousandth(x):
    return x * x * 1.001


def right_but_with_a_wrong_gradient(x):
    return x.detach() ** 2 + x - x.detach()


def broken(x):
    raise RuntimeError("no kernel image\nfor this device")


def writes_over_its_input(x):
    with torch.no_grad():
        x.mul_(2)
    return (x / 2) ** 2 * 2 - (x / 2) ** 2 if not x.requires_grad else _Doubled.apply(x)


class _Doubled(torch.autograd.Function):
    """x^2 of an x that holds twice its value by now."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.clone())
        return x * x / 4

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


def task(*contenders: Contender, **more) -> Task:
    settings = {"passes": {FORWARD: (), BOTH: ("x",)}, "shapes": TINY, "rows": ("x",)} | more
    return Task("square", "kl", make, square, contenders, **settings)


def measured(*contenders: Contender, passed: str = BOTH, dtype: str = "fp32", **more) -> dict[str, dict]:
    rows = harness.measure(Case(task(*contenders, **more), passed, (4, 3), dtype, "cpu"), 0.01, 1e9)
    return {row["contender"]: row for row in rows}


def test_a_wrong_contender_is_caught_and_not_timed():
    rows = measured(Contender("right", square, ours=True), Contender("wrong", off_by_a_thousandth))
    assert rows["right"]["status"] == "ok"
    assert rows["right"]["samples"] >= 5
    assert rows["right"]["max_error"] < 1e-6
    assert rows["wrong"]["status"] == "wrong: error 1.0e-03, allowed 1e-04"
    assert rows["wrong"]["max_error"] == pytest.approx(1e-3, rel=0.01)
    assert "median_ms" not in rows["wrong"]


def test_a_wrong_gradient_is_caught_too():
    """Its values are right, so that the forward pass alone may be timed."""
    contender = Contender("wrong", right_but_with_a_wrong_gradient)
    assert measured(contender, passed=FORWARD)["wrong"]["status"] == "ok"
    assert measured(contender, passed=BOTH)["wrong"]["status"].startswith("wrong")


def test_what_is_only_wrong_in_16_bits_is_allowed_there():
    assert measured(Contender("coarse", off_by_a_thousandth), dtype="bf16")["coarse"]["status"] == "ok"


def test_a_missing_result_or_one_too_many_is_wrong_unless_announced():
    two = Contender("two", lambda x: (x * x, x * x))
    assert measured(two, passed=FORWARD)["two"]["status"].startswith("wrong")
    both = {"definition": lambda x: (x * x, (x * x).sum().detach())}
    of_two = Task(
        "square",
        "kl",
        make,
        both["definition"],
        (Contender("one", square, outputs=1), Contender("short", square)),
        {FORWARD: ()},
        TINY,
    )
    rows = {r["contender"]: r for r in harness.measure(Case(of_two, FORWARD, (4, 3), "fp32", "cpu"), 0.01, 1e9)}
    assert rows["one"]["status"] == "ok"
    assert rows["short"]["status"].startswith("wrong")


def test_a_peer_that_is_absent_fails_or_is_too_large_says_why_and_the_others_go_on():
    rows = measured(
        Contender("absent", square, harness.needs("a_package_that_nobody_has")),
        Contender("gpu", square, harness.needs("torch", cuda=True)),
        Contender("broken", broken),
        Contender("large", square, peak=lambda shape: 3e9),
        Contender("ours", square, ours=True),
    )
    assert rows["absent"]["status"] == "a_package_that_nobody_has is not installed"
    assert rows["gpu"]["status"] == "needs a CUDA device"
    assert rows["broken"]["status"] == "failed: RuntimeError: no kernel image"
    assert rows["large"]["status"] == "needs 3.0 GB, more than the 1.0 allowed"
    assert rows["ours"]["ratio"] == 1


def test_inputs_that_a_contender_writes_over_are_mended_for_the_next():
    rows = measured(
        Contender("spoils", writes_over_its_input, spoils=True),
        Contender("after it", square),
        Contender("and again", square),
    )
    assert {row["status"] for row in rows.values()} == {"ok"}


def test_a_contender_that_only_pretends_to_be_compiled_is_found_out(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert (
        measured(Contender("compiled", square, compiled=True))["compiled"]["status"]
        == "torch.compile generated no kernel"
    )


def test_a_tiny_run_records_graphs_and_compiles_nothing(monkeypatch):
    """A function that cannot be one graph is noticed all the same."""
    monkeypatch.setattr(harness, "_generated_kernels", lambda: 0)

    def broken_graph(x):
        torch._dynamo.graph_break()
        return x * x

    whole = Contender("whole", square, compiled=True), Contender("broken", broken_graph, compiled=True)
    (case,) = ops.cases(task(*whole), ops.parse(["--tiny", "--passes", FORWARD]))
    rows = {row["contender"]: row["status"] for row in harness.measure(case, 0.01, 1e9)}
    assert rows["whole"] == "ok" and rows["broken"].startswith("failed: ")


def test_float64_in_slices_of_rows_equals_float64_at_once(monkeypatch):
    """Rows are joined, a sum over rows is added up, and so is the gradient of what all rows share."""

    def definition(x, w):
        return x @ w, (x @ w).sum()

    inputs = {"x": torch.randn(5, 3, requires_grad=True), "w": torch.randn(3, 2, requires_grad=True)}
    # 2^24 numbers are a slice: rows of 2^23 make slices of two
    sliced = Task("t", "kl", make, definition, (), {}, TINY, rows=("x",), width=lambda shape: 2**23)
    whole = Task("t", "kl", make, definition, (), {}, TINY)
    found, upstream = harness.exact(sliced, (5, 3), inputs, ("x", "w"))
    expected, same = harness.exact(whole, (5, 3), inputs, ("x", "w"))
    for a, b in zip([*found, *upstream], [*expected, *same], strict=True):
        torch.testing.assert_close(a, b)
    assert found[0].dtype == torch.float64 and found[0].shape == (5, 2)
    torch.testing.assert_close(found[2], (upstream[0].double() + 1) @ inputs["w"].detach().double().t())


def test_error_is_relative_to_the_largest_and_infinite_where_only_one_is_finite():
    exact = torch.tensor([1.0, -4.0, 0.0], dtype=torch.float64)
    assert harness.error_of(torch.tensor([1.0, -4.0, 0.1]), exact) == pytest.approx(0.025)
    assert harness.error_of(torch.tensor([1.0, -4.0, math.nan]), exact) == math.inf
    assert harness.error_of(torch.tensor([1.0, -4.0]), exact) == math.inf


def test_quartiles_by_hand():
    assert harness.quartiles([5.0, 1.0, 4.0, 2.0, 3.0]) == (2.0, 3.0, 4.0)


def test_the_peak_of_a_call_counts_what_it_freed_and_not_what_was_there():
    """48 MB for a moment beside 16 MB that stay before and after."""
    there = torch.ones(4 << 20)

    def run():
        return torch.ones(12 << 20).sum() + there.sum()

    peak = harness.resident_peak(run)
    if math.isnan(peak):
        pytest.skip("this kernel does not let a process reset its peak")
    assert 45 < peak < 60


def sampled(monkeypatch, samples: dict[str, int]) -> list[str]:
    """Who is timed in which order, when each contender is to get so many samples."""
    order, names = [], iter(samples)

    def take(case, entrant, inputs, count, copies):
        order.append(entrant.contender.name)
        return lambda: 1.0

    monkeypatch.setattr(harness, "_take_cpu", take)
    monkeypatch.setattr(harness, "samples_for", lambda duration, share: samples[next(names)])
    measured(*(Contender(name, square) for name in samples), passed=FORWARD)
    return order


def test_contenders_take_turns_and_each_is_first_in_some_round(monkeypatch):
    assert "".join(sampled(monkeypatch, {"a": 4, "b": 4, "c": 4})) == "abc" + "bca" + "cab" + "abc"


def test_a_slow_contender_sits_out_rounds_evenly_spread(monkeypatch):
    order = "".join(sampled(monkeypatch, {"a": 6, "s": 2}))
    assert order.replace("s", "") == "aaaaaa"
    assert [order[: i + 1].count("a") for i, who in enumerate(order) if who == "s"] == [3, 5]


def test_how_many_samples_fit_a_share_of_the_time():
    """Between 5 and 100, and 3 where one takes more than five seconds."""
    assert [harness.samples_for(d, 2.0) for d in (0.001, 0.1, 1.0, 6.0)] == [100, 20, 5, 3]


def test_csv_goes_round_to_the_table_and_a_new_run_replaces_its_rows(tmp_path):
    case = {"op": "square", "variant": "", "device": "cpu", "shape": "4x3", "dtype": "fp32", "pass": FORWARD}
    times = {
        "median_ms": 0.5,
        "q1_ms": 0.25,
        "q3_ms": 2.0,
        "samples": 7,
        "ratio": 1.0,
        "peak_mb": 12.0,
        "max_error": 1e-7,
    }
    rows = [
        {**case, "contender": "ours", "status": "ok", **times},
        {**case, "contender": "peer", "status": "is not installed"},
    ]
    path = report.path_of(tmp_path / "new", "cpu", "kl")
    report.merge(path, [row | {"median_ms": 9.0} for row in rows])
    report.merge(path, [row | {"shape": "8x3"} for row in rows])
    report.merge(path, rows)
    with path.open(newline="") as file:
        assert [row["shape"] for row in csv.DictReader(file)] == ["4x3", "4x3", "8x3", "8x3"]
    back = [row for row in report.read(path) if row["shape"] == "4x3"]
    assert report.table(back) == report.table(rows)
    assert report.table(back)[0] == ("contender", "median", "quartiles", "ratio", "peak", "error")
    assert report.table(back)[1] == ("ours", "500 µs", "250 µs – 2.00 ms", "1.00", "12 MB", "1e-07")
    assert report.table(back)[2][:2] == ("peer", "is not installed")


@pytest.mark.parametrize(
    ("ms", "text"), [(0.01234, "12.3 µs"), (1.0, "1.00 ms"), (123.4, "123 ms"), (4321.0, "4.32 s")]
)
def test_durations_have_three_digits(ms, text):
    assert report.duration(ms) == text


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # results of a GPU are rendered without one
def test_the_readme_holds_tables_lost_races_and_the_code_that_ran(tmp_path, device):
    """What stands above the mark is the author's; below it, rows where we lose are as visible as the others."""
    case = {"op": "gae", "variant": "", "device": device, "shape": "4x3", "dtype": "fp32", "pass": FORWARD}
    numbers = {"status": "ok", "median_ms": 1.0, "q1_ms": 1.0, "q3_ms": 1.0, "ratio": 1.0}
    rows = [
        {**case, **numbers, "contender": "rlhf_fast (cpu)"},
        {**case, **numbers, "contender": "log-doubling", "ratio": 0.5},
    ]
    conditions = report.conditions("cpu", "passed")
    report.merge(tmp_path / f"ops-{device}.csv", [row | conditions for row in rows])
    readme = tmp_path / "README.md"
    readme.write_text("By hand.\n" + report.MARK + "\nstale\n")
    report.render(tmp_path, readme)
    text = readme.read_text()
    assert text.startswith("By hand.\n") and "stale" not in text
    assert "| log-doubling | 1.00 ms | 1.00 ms – 1.00 ms | 0.50 |" in text
    assert conditions["machine"] in text and f"{conditions['threads']} thread(s)" in text
    assert "def doubling_gae(rewards, values, mask):" in text and "def fused_gae" in text
    assert "GAMMA = 0.99" in text
    assert (tmp_path / f"ops-{device}.png").stat().st_size < 100_000
    report.render(tmp_path, readme)
    assert readme.read_text() == text


def test_rows_of_an_operation_whose_tests_fail_say_so(tmp_path, monkeypatch):
    """Timed nevertheless when asked; ours alone; all in one file; and the table above its rows says it too."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    path, readme = tmp_path / "ops-cpu.csv", tmp_path / "README.md"
    options = ["--tiny", "--seconds", "0.01", "--tests", "failed", "--contenders", "ours", "--csv", str(path)]
    places = ["--out", str(tmp_path), "--readme", str(readme)]
    assert ops.main(["kl_penalty", "dpo_loss", "--passes", FORWARD, *options, *places]) == 0
    rows = report.read(path)
    assert {row["op"] for row in rows} == {"kl_penalty", "dpo_loss"}
    assert {row["tests"] for row in rows} == {"failed"}
    assert all(row["contender"].startswith("rlhf_fast") for row in rows)
    assert "; its tests: failed" in readme.read_text()
    assert readme.read_text().startswith("# Benchmarks")


def test_the_reference_takes_no_part_in_graphs():
    """Its loop over time would be recorded node by node."""
    reference, fused = (Contender("ours", square, ours=True, backend=b) for b in ("reference", "auto"))
    assert harness.takes_part(reference, FORWARD) and harness.takes_part(fused, FORWARD + harness.GRAPH)
    assert not harness.takes_part(reference, FORWARD + harness.GRAPH)


def test_an_operation_whose_tests_fail_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ops, "tests_pass", lambda file: "policy" not in file)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    places = ["--out", str(tmp_path), "--readme", str(tmp_path / "README.md")]
    names = ["policy_loss", "kl_penalty", "--passes", FORWARD]
    assert ops.main([*names, "--tiny", "--seconds", "0.01", *places]) == 1
    assert "not timed, their tests fail: policy_loss" in capsys.readouterr().out
    assert not report.path_of(tmp_path, "cpu", "policy").exists()
    rows = report.read(report.path_of(tmp_path, "cpu", "kl"))
    assert {row["op"] for row in rows} == {"kl_penalty"}
    assert {row["tests"] for row in rows} == {"passed"}


def test_a_test_file_that_fails_is_noticed(tmp_path, capsys):
    file = tmp_path / "test_it.py"
    file.write_text("def test_it():\n    assert False\n")
    assert not ops.tests_pass(str(file))
    file.write_text("def test_it():\n    assert True\n")
    assert ops.tests_pass(str(file))


@pytest.mark.parametrize("task", tasks("cpu"), ids=lambda t: f"{t.op} {t.variant}".strip())
def test_every_contender_agrees_with_float64(task):
    """At tiny sizes, every pass and dtype. Left out, for seconds each: what compiles, and Triton's interpreter."""
    runs = [c for c in task.contenders if not c.compiled and "torch.compile" not in c.name and c.backend != "triton"]
    for name, wanted in task.passes.items():
        for dtype in task.dtypes:
            case = Case(task, name, task.shapes["dry"][0], dtype, "cpu")
            inputs = harness._pool(case)[0]
            expected, upstream = harness.exact(task, case.shape, inputs, wanted)
            pristine = {n: inputs[n].detach().clone() for n in wanted}
            for contender in (c for c in runs if not c.passes or name in c.passes):
                entrant = harness.Entrant(contender, upstream=upstream)
                status = harness._trial(case, entrant, inputs, expected, pristine, 1e9)
                absent = ("needs a CUDA device", "is not installed")
                assert status == "ok" or status.endswith(absent), (contender.name, name, dtype, status)


def test_every_public_operation_has_a_task_and_a_test_file():
    from rlhf_fast import kernels

    administration = {"BACKENDS", "LoraWeights", "available", "backend_report", "implementation", "use_backend"}
    assert {t.op for t in tasks("cpu")} == set(kernels.__all__) - administration
    for t in tasks("cpu"):
        assert (ops.ROOT / t.tests).is_file()
