"""What every benchmark of an operation shares: contenders, their check against float64, timing, memory, ceilings.

A :class:`Task` is one operation: how to make its inputs, its definition, and who competes. A :class:`Case` is a task at
one shape, dtype and pass on one device. ``measure`` checks every contender on the very inputs that it is timed on, and
times only those that were right.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench import host
from rlhf_fast.kernels import BACKENDS, available, dispatch, use_backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# largest error over largest exact value, of any output or gradient: far above rounding, far below a wrong formula
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
GRAPH = ", CUDA graph"  # a pass with this ending is captured once and replayed: device time without launches
COLUMNS = (
    *("op", "variant", "device", "shape", "dtype", "pass", "contender", "status", "median_ms", "q1_ms", "q3_ms"),
    *("samples", "ratio", "peak_mb", "max_error", "percent_copy", "percent_gemm", "launches"),
)


@dataclass(frozen=True)
class Contender:
    """One way to compute an operation. ``function`` takes the task's inputs by name and returns its outputs."""

    name: str
    function: Callable[..., Any]
    missing: Callable[[str], str | None] = lambda device: None  # device -> why it cannot run there
    passes: tuple[str, ...] = ()  # () is all
    outputs: int | None = None  # how many of the definition's outputs it gives; None is all
    ours: bool = False
    backend: str = "auto"
    compiled: bool = False  # by torch.compile, fullgraph
    ceiling: bool = False  # less than the operation: a bound, with nothing to check
    spoils: bool = False  # writes over its inputs
    peak: Callable[[tuple[int, ...]], float] | None = None  # bytes it is known to need, where that is a lot


@dataclass(frozen=True)
class Task:
    """One operation and who competes at it."""

    op: str
    family: str  # folder of kernels/, and the set of operations that shares a file of results
    make: Callable[[tuple[int, ...], torch.dtype, str], dict[str, Any]]  # shape, dtype, device -> inputs by name
    definition: Callable[..., Any]  # plain PyTorch that keeps float64
    contenders: tuple[Contender, ...]
    passes: dict[str, tuple[str, ...]]  # pass -> inputs whose gradient is wanted
    shapes: dict[str, tuple[tuple[int, ...], ...]]  # "cpu", "cuda", "dry" -> shapes
    variant: str = ""
    dtypes: tuple[str, ...] = ("fp32",)
    rows: tuple[str, ...] = ()  # inputs that the definition may take a few rows at a time
    width: Callable[[tuple[int, ...]], int] = lambda shape: shape[-1]  # of the widest row inside
    moved: Callable[[tuple[int, ...], int, str], float] | None = None  # shape, bytes per number, pass -> least traffic
    flops: Callable[[tuple[int, ...], str], float] | None = None

    @property
    def tests(self) -> str:
        return f"tests/kernels/test_{self.family}.py"


@dataclass(frozen=True)
class Case:
    task: Task
    passed: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    compiler: str = "inductor"  # backend of torch.compile

    @property
    def wanted(self) -> tuple[str, ...]:
        return self.task.passes[self.passed.removesuffix(GRAPH)]

    @property
    def labels(self) -> dict[str, Any]:
        shape = "x".join(map(str, self.shape))
        about = (self.task.op, self.task.variant, self.device, shape, self.dtype, self.passed)
        return dict(zip(COLUMNS, about))


@dataclass
class Entrant:
    """A contender in one case, and what was found out about it."""

    contender: Contender
    status: str = "ok"
    error: float = math.nan
    peak: float = math.nan  # MB on top of the inputs
    launches: int | None = None
    times: list[float] = field(default_factory=list)  # ms
    upstream: list[Tensor] = field(default_factory=list)
    graph: Any = None
    warmed: bool = False  # each sample after a call that does not count


def needs(package: str, cuda: bool = False) -> Callable[[str], str | None]:
    """Whether a peer can run: its package is installed, and there is a GPU if it needs one."""

    def missing(device: str) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        return "needs a CUDA device" if cuda and device != "cuda" else None

    return missing


def ours(function: Callable[..., Any], family: str, op: str, device: str, **options) -> list[Contender]:
    """One contender per backend that can run the operation there, the one that ``auto`` takes first."""
    names = dispatch.OPS.get(family, ())
    names = [name for name in names if name.startswith(op)] or names
    probe = torch.zeros(1, 1, device=device if torch.cuda.is_available() else "cpu")
    able = [b for b in BACKENDS if all(available(family, b, name, probe) is None for name in names)] if names else []
    # Triton on CPU tensors is its interpreter: there to be dry-run
    auto = [b for b in dispatch.order_of((names or [op])[0], device) if b in able]
    able = auto[:1] + [b for b in able if b not in auto[:1]]
    names = [f"rlhf_fast ({b})" for b in able] or ["rlhf_fast"]
    backends = ["auto", *able[1:]]
    return [Contender(n, function, ours=True, backend=b, **options) for n, b in zip(names, backends)]


# ---- one case


def measure(case: Case, seconds: float, max_bytes: float) -> list[dict[str, Any]]:
    """Check every contender, time the right ones in turns; one row per contender, the wrong and the absent too."""
    torch._dynamo.reset()  # a compiled function keeps at most eight shapes
    gc.collect()  # what an earlier case left would be freed during a call
    pool = _pool(case)
    entrants = [Entrant(_compiled(c, case.compiler) if c.compiled else c) for c in case.task.contenders]
    entrants = [e for e in entrants if takes_part(e.contender, case.passed)]
    spoilt = any(e.contender.spoils for e in entrants)
    pristine = {name: pool[0][name].detach().clone() for name in case.wanted} if spoilt else {}
    expected, upstream = exact(case.task, case.shape, pool[0], case.wanted)
    for entrant in entrants:
        entrant.upstream = upstream
        entrant.status = _trial(case, entrant, pool[0], expected, pristine, max_bytes)
    del expected
    racing = [e for e in entrants if e.status == "ok"]
    _race(case, racing, pool, pristine, seconds)
    return [_row(case, entrant, entrants) for entrant in entrants]


def takes_part(contender: Contender, passed: str) -> bool:
    """The reference's loop over time would be a graph of 260,000 nodes, which takes minutes to record."""
    if passed.endswith(GRAPH) and contender.backend == "reference":
        return False
    return not contender.passes or passed in contender.passes


def _pool(case: Case) -> list[dict[str, Any]]:
    """Inputs; on a GPU as many copies as it takes to overflow the L2 cache, used in turn."""
    inputs = case.task.make(case.shape, DTYPES[case.dtype], case.device)
    copies = 1
    if case.device == "cuda":
        size = sum(x.nbytes for x in inputs.values() if isinstance(x, Tensor))
        copies = max(1, min(16, math.ceil(3 * torch.cuda.get_device_properties(0).L2_cache_size / max(size, 1))))
    pool = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()} for _ in range(copies - 1)]
    pool.append(inputs)
    for one in pool:
        for name in case.wanted:
            one[name].requires_grad_()
    return pool


def exact(
    task: Task, shape: tuple[int, ...], inputs: dict, wanted: tuple[str, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients in float64, and the upstream gradients behind them: random, 1 for a scalar loss."""
    shared = {n: _widened(x, n in wanted) for n, x in inputs.items() if n not in task.rows}
    count = len(inputs[task.rows[0]]) if task.rows else 1
    step = max(1, 2**24 // task.width(shape)) if task.rows else 1
    upstream = _upstream(task, inputs, wanted)
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for start in range(0, count, step):
        part = {n: _widened(inputs[n][start : start + step], n in wanted) for n in task.rows}
        with torch.set_grad_enabled(bool(wanted)):
            found = tuple_of(task.definition(**shared, **part))
        if wanted:
            ends = [o for o in found if o.requires_grad]
            sent = [u[start : start + step] if task.rows and u.dim() else u for u in upstream]
            sources = [(shared | part)[n] for n in wanted]
            found_gradients = torch.autograd.grad(ends, sources, [u.double() for u in sent])
            _gather(gradients, found_gradients, [n in task.rows for n in wanted])
        _gather(outputs, [o.detach() for o in found], [bool(o.dim()) and bool(task.rows) for o in found])
    return [_joined(x) for x in (*outputs, *gradients)], upstream


def _widened(x: Any, wanted: bool) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(wanted)


def _upstream(task: Task, inputs: dict[str, Any], wanted: tuple[str, ...]) -> list[Tensor]:
    if not wanted:
        return []
    device = inputs[wanted[0]].device
    hollow = {n: x.detach().to("meta") if isinstance(x, Tensor) else x for n, x in inputs.items()}
    for name in wanted:
        hollow[name].requires_grad_()
    ends = [o for o in tuple_of(task.definition(**hollow)) if o.requires_grad]
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(o.shape, generator=generator).to(device) if o.dim() else torch.ones((), device=device) for o in ends
    ]


def _gather(total: list, parts, by_row: list[bool]) -> None:
    """Collect the results of a few rows: rows in lists to be joined, sums added up."""
    if not total:
        total += [[part] if rows else part for part, rows in zip(parts, by_row)]
        return
    for i, (part, rows) in enumerate(zip(parts, by_row)):
        if rows:
            total[i].append(part)
        else:
            total[i] = total[i] + part


def _joined(x: list[Tensor] | Tensor) -> Tensor:
    return torch.cat(x) if isinstance(x, list) else x


def tuple_of(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def error_of(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest exact value; inf where only one of the two is finite, or the shapes differ."""
    if actual.shape != expected.shape:
        return math.inf
    worst, scale = 0.0, 0.0
    for a, e in zip(actual.detach().reshape(-1).split(2**24), expected.reshape(-1).split(2**24)):
        a, finite = a.double(), e.isfinite()
        if not torch.equal(a.isfinite(), finite):
            return math.inf
        worst = max(worst, float(torch.where(finite, a - e, 0.0).abs().max()))
        scale = max(scale, float(torch.where(finite, e, 0.0).abs().max()))
    return worst / scale if scale else worst


def _compiled(contender: Contender, compiler: str) -> Contender:
    function = torch.compile(contender.function, fullgraph=True, dynamic=False, backend=compiler)
    return Contender(**{**contender.__dict__, "function": function})


def _generated_kernels() -> int:
    """How many inductor has made so far, those out of its cache included."""
    from torch._inductor import metrics

    return metrics.generated_kernel_count


def _trial(case, entrant, inputs, expected, pristine, max_bytes) -> str:
    """Run a contender once: "ok", or why it is not timed."""
    contender = entrant.contender
    if reason := contender.missing(case.device):
        return reason
    if contender.peak and (size := contender.peak(case.shape)) > max_bytes:
        return f"needs {size / 1e9:.1f} GB, more than the {max_bytes / 1e9:.1f} allowed"
    try:
        generated = _generated_kernels() if contender.compiled else 0
        with use_backend(contender.backend):
            found = _first_call(case, entrant, inputs)
        if contender.compiled and case.compiler == "inductor" and _generated_kernels() == generated:
            return "torch.compile generated no kernel"
    # whatever a peer raises is its result: the row says so and the others go on
    except Exception as problem:  # noqa: BLE001
        return f"failed: {type(problem).__name__}: {str(problem).strip().splitlines()[0][:160] if str(problem) else ''}"
    if not contender.ceiling:
        # its outputs, then its gradients: those of the definition that it does not give are left out
        n = len(expected) - len(case.wanted)
        asked = expected[: contender.outputs] + expected[n:] if contender.outputs else expected
        entrant.error = max(map(error_of, found, asked)) if len(found) == len(asked) else math.inf
    del found
    _restore(inputs, pristine)
    if not contender.ceiling and not entrant.error <= TOLERANCE[case.dtype]:
        return f"wrong: error {entrant.error:.1e}, allowed {TOLERANCE[case.dtype]:.0e}"
    with use_backend(contender.backend):
        entrant.peak = _peak_megabytes(case, entrant, inputs)
    _restore(inputs, pristine)
    return "ok"


def _first_call(case: Case, entrant: Entrant, inputs: dict[str, Any]) -> list[Tensor]:
    """Outputs and gradients; fits the upstream gradients to the dtypes that this contender returns."""
    with torch.set_grad_enabled(bool(case.wanted)):
        outputs = tuple_of(entrant.contender.function(**inputs))
    if not case.wanted:
        return list(outputs)
    ends = [o for o in outputs if o.requires_grad]
    entrant.upstream = [u.to(o.dtype) for u, o in zip(entrant.upstream, ends)]
    gradients = torch.autograd.grad(ends, [inputs[n] for n in case.wanted], entrant.upstream)
    return [*(o.detach() for o in outputs), *gradients]


def _restore(inputs: dict[str, Any], pristine: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, x in pristine.items():
            inputs[name].copy_(x)


def _ready(case: Case, entrant: Entrant, inputs: dict[str, Any]) -> Callable[[], Any]:
    """What is timed. For the backward pass alone the forward pass runs here, outside."""
    function, upstream = entrant.contender.function, entrant.upstream
    if not case.wanted:
        return lambda: function(**inputs)
    sources = [inputs[n] for n in case.wanted]

    def forward() -> list[Tensor]:
        return [o for o in tuple_of(function(**inputs)) if o.requires_grad]

    if case.passed.startswith(BACKWARD):
        ends = forward()
        return lambda: torch.autograd.grad(ends, sources, upstream)

    def both() -> Any:
        # the outputs live until the gradients exist, as in a training step
        outputs = forward()
        return outputs, torch.autograd.grad(outputs, sources, upstream)

    return both


# ---- time


def _race(case: Case, racing: list[Entrant], pool: list, pristine: dict[str, Tensor], seconds: float) -> None:
    """Take samples in turns, each round starting with another contender, so that drift of the machine hits all alike.

    Slow contenders sit out rounds, evenly spread, so that they do not take the time of the fast ones.
    """
    take = _take_cuda if case.device == "cuda" else _take_cpu
    plans = {}
    for entrant in racing:
        if case.passed.endswith(GRAPH):
            _capture(case, entrant, pool)
        if entrant.status == "ok":
            first = _timed_once(case, entrant, pool[0])
            _restore(pool[0], pristine)
            # a sample of many short calls: the clock's own cost and jitter are about a microsecond
            alone = bool(pristine) or case.passed.startswith(BACKWARD) or case.device == "cuda"
            calls = 1 if alone else max(1, min(200, round(1e-3 / first)))
            # a short call would pay for what the contender before it left in the caches and in the allocator
            entrant.warmed = not alone and first < 0.05
            plans[id(entrant)] = calls, samples_for(first * (calls + entrant.warmed), seconds / len(racing))
    racing = [e for e in racing if id(e) in plans]
    rounds = max((samples for _, samples in plans.values()), default=0)
    pending = []
    for i in range(rounds):
        shift = i % len(racing)
        for entrant in racing[shift:] + racing[:shift]:
            calls, samples = plans[id(entrant)]
            if (i + 1) * samples // rounds > i * samples // rounds:
                inputs = pool[i % len(pool)]
                _restore(inputs, pristine)
                with _mode(case, entrant):
                    pending.append((entrant, take(case, entrant, inputs, calls, len(pool))))
    _wait(case.device)
    for entrant, sample in pending:
        entrant.times.append(sample())


def samples_for(duration: float, share: float) -> int:
    """How many samples of that many seconds fit a share of the time: 5 to 100, 3 of those that take 5 seconds."""
    return int(max(3 if duration > 5 else 5, min(100, share / duration)))


@contextlib.contextmanager
def _mode(case: Case, entrant: Entrant) -> Iterator[None]:
    with use_backend(entrant.contender.backend), torch.set_grad_enabled(bool(case.wanted)):
        yield


def _timed_once(case: Case, entrant: Entrant, inputs: dict[str, Any]) -> float:
    with _mode(case, entrant):
        run = _ready(case, entrant, inputs)
        _wait(case.device)
        start = time.perf_counter()
        run()
        _wait(case.device)
        return max(time.perf_counter() - start, 1e-7)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _take_cpu(case, entrant, inputs, count, copies) -> Callable[[], float]:
    run = _ready(case, entrant, inputs)
    if entrant.warmed:
        run()
    start = time.perf_counter()
    for _ in range(count):
        run()
    elapsed = (time.perf_counter() - start) / count
    return lambda: elapsed * 1e3


def _take_cuda(case, entrant, inputs, count, copies) -> Callable[[], float]:
    """Events around one call; read only when all are queued, so that the host can run ahead."""
    run = entrant.graph.replay if entrant.graph else _ready(case, entrant, inputs)
    shared = copies if entrant.graph else 1  # a graph holds one call per copy of the inputs
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return lambda: start.elapsed_time(end) / shared


def _capture(case: Case, entrant: Entrant, pool: list) -> None:
    """Record one call per copy of the inputs; a contender that waits for the device cannot be recorded."""
    try:
        with _mode(case, entrant):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for inputs in pool:
                    _ready(case, entrant, inputs)()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for inputs in pool:
                    _ready(case, entrant, inputs)()
        entrant.graph = graph
    except RuntimeError as problem:
        entrant.status = f"cannot be captured: {str(problem).strip().splitlines()[0][:120]}"


# ---- memory


def _peak_megabytes(case: Case, entrant: Entrant, inputs: dict[str, Any]) -> float:
    """Peak memory of one call on top of its inputs, outputs and gradients included."""
    with torch.set_grad_enabled(bool(case.wanted)):
        # backward alone starts from what its forward pass kept, so what both take together is measured
        run = _ready(Case(case.task, _whole(case.passed), *_rest(case)), entrant, inputs)
        if case.device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            peak = (torch.cuda.max_memory_allocated() - before) / 1e6
            entrant.launches = _launches(case, entrant, inputs)
            return peak
        return resident_peak(run)


def _whole(passed: str) -> str:
    return passed.removesuffix(GRAPH).replace(BACKWARD, BOTH) if passed.startswith(BACKWARD) else passed


def _rest(case: Case) -> tuple:
    return case.shape, case.dtype, case.device


def resident_peak(run: Callable[[], Any]) -> float:
    """How far resident memory rises during a call, in MB; NaN where the kernel does not say."""
    try:
        # what malloc kept from earlier calls would be taken from again, unseen
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        host.forget_peak()
        before = host.memory()["VmRSS"]
        run()
        return max(0.0, (host.memory()["VmHWM"] - before) / 1e6)
    except OSError:
        return math.nan


def _launches(case: Case, entrant: Entrant, inputs: dict[str, Any]) -> int:
    """Kernels, copies and fills that one call puts on the device."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    run = _ready(case, entrant, inputs)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())


# ---- ceilings


@cache
def copy_rate(device: str) -> float:
    """Bytes per second, read and written, of a copy far larger than any cache."""
    source = torch.ones((1 << 30 if device == "cuda" else 64 << 20), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device)


@cache
def gemm_rate(device: str, dtype: str) -> float:
    """Operations per second of a large square matrix product."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
    return 2 * n**3 / _median_seconds(lambda: a @ b, device)


def _median_seconds(run: Callable[[], Any], device: str) -> float:
    seconds = []
    for _ in range(9):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[2:])[3]


# ---- rows


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    return tuple(torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist())


def _row(case: Case, entrant: Entrant, entrants: list[Entrant]) -> dict[str, Any]:
    row = {**case.labels, "contender": entrant.contender.name, "status": entrant.status, "launches": entrant.launches}
    if not entrant.times:
        return row | {"max_error": entrant.error}
    q1, median, q3 = quartiles(entrant.times)
    first = next((e for e in entrants if e.contender.ours and e.times), None)
    row |= {"median_ms": median, "q1_ms": q1, "q3_ms": q3, "samples": len(entrant.times)}
    row |= {"ratio": median / quartiles(first.times)[1] if first else math.nan}
    row |= {"peak_mb": entrant.peak, "max_error": entrant.error}
    passed, size = case.passed.removesuffix(GRAPH), DTYPES[case.dtype].itemsize
    if case.task.moved and not entrant.contender.ceiling:
        rate = case.task.moved(case.shape, size, passed) / (median / 1e3)
        row["percent_copy"] = 100 * rate / copy_rate(case.device)
    if case.task.flops:
        row["percent_gemm"] = (
            100 * case.task.flops(case.shape, passed) / (median / 1e3) / gemm_rate(case.device, case.dtype)
        )
    return row
