"""The GEMMs of the fused head, chunk by chunk, around the row kernel of whichever backend runs.

Logits are never rounded to 16 bits: a bf16 logit moves a log-probability by up to 0.015, a visible importance ratio.
CUDA multiplies bf16 into float32; the CPU has no such GEMM and multiplies float32 slabs of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.kernels.dispatch import implementation
from rlhf_fast.kernels.logprobs import check_labels
from rlhf_fast.kernels.registry import register
from rlhf_fast.kernels.segments import promote

# what the forward pass keeps for the backward pass
KEEP_NOTHING, KEEP_VECTOR, KEEP_VECTORS, KEEP_ROWS = range(4)

_CUDA_CHUNK_BYTES = 1_060_000_000  # logits and gradient rows of one chunk
# On one AVX-512 core, against two bare GEMMs of 256 x 896 x 151,936 in float32: 64 rows cost 1.27 times, 128 rows 1.10,
# 256 rows 1.06; on two cores 128 rows cost one GEMM 1.31 times. So vocabularies beyond 49,152 get more bytes. A bf16
# head costs 1.12 times with slabs of 2 MiB, 1.19 with 8.
_CPU_CHUNK_BYTES = 48 << 20
_CPU_MIN_ROWS = 256
_CPU_SLAB_BYTES = 2 << 20  # float32 copy of a slab of a 16-bit head


def kept_bytes(device: torch.device) -> int:
    """How large the (N, V) gradient rows kept for a trainable head may be.

    A share of the device's memory, not of what is free now: the same call gives the same bits at any time.
    """
    return torch.cuda.get_device_properties(device).total_memory // 32 if device.type == "cuda" else 1 << 30


def choose_chunk_size(hidden: Tensor, weight: Tensor, entropy: bool = False) -> int:
    """How many rows' logits exist at a time; ``entropy`` if its gradient is wanted, which needs them twice."""
    (vocab_size, width), num_rows = weight.shape, len(hidden)
    if hidden.device.type != "cuda":
        buffers = 2 if entropy else 1
        bytes_per_row = vocab_size * promote(hidden[:0]).element_size() * buffers
        limit = max(_CPU_MIN_ROWS // buffers, _CPU_CHUNK_BYTES // bytes_per_row)
        # of equal size, as a small last one would read the whole head for a few rows
        num_chunks = max(1, -(-num_rows // limit))
        return max(1, -(-num_rows // num_chunks))
    processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    limit = _CUDA_CHUNK_BYTES // (vocab_size * (4 + hidden.element_size()))
    return fill_processors(num_rows, limit, width, processors)


def fill_processors(num_rows: int, limit: int, width: int, processors: int) -> int:
    """The chunk, a multiple of 128 rows up to ``limit``, whose (rows, width) GEMMs take the fewest waves of tiles.

    A wave costs the same however few SMs it fills, the last chunk's too. With tiles of 128 x 256, as cuBLAS chooses,
    1024 rows of width 4096 are one wave of 132 SMs, 97% full; 1152 are two. Among equals the fewest chunks win.
    """

    def waves(rows: int) -> tuple[int, int]:
        full, tail = divmod(num_rows, rows)
        sizes = [(full, rows), (1, tail)]
        tiles = [(count, -(-size // 128) * -(-width // 256)) for count, size in sizes]
        return sum(count * -(-t // processors) for count, t in tiles), -rows

    most = min(max(limit // 128, 1), max(-(-num_rows // 128), 1))
    return min(range(128, 128 * most + 1, 128), key=waves)


def chunks_per_outer(hidden: Tensor, weight: Tensor, chunk_size: int) -> int:
    """How many chunks' gradient rows are kept until one GEMM takes them all into the gradient of the head.

    Every such GEMM after the first reads and writes the float32 sum, (V, D): at 1024 rows on a GPU as long as the GEMM
    itself. On a CPU that is a few percent, and rows go over their logits, which are larger than the cache.
    """
    if hidden.device.type != "cuda":
        return 1
    return max(1, kept_bytes(hidden.device) // max(1, chunk_size * len(weight) * hidden.element_size()))


def empty_rows(count: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count, V) whose rows begin at multiples of 64 elements: loads of 16 bytes and fast GEMMs for odd vocabularies."""
    # on one AVX-512 core 256 x 256 x 50,257 in float32 takes 0.72 to 0.92 of the time of rows without gaps
    stride = -(-vocab_size // 64) * 64
    return torch.empty((count, stride), dtype=dtype, device=device)[:, :vocab_size]


def _outputs(hidden, weight, labels, keep) -> tuple[Tensor, ...]:
    work = promote(hidden[:0]).dtype
    n, width = hidden.shape
    counts = n if keep in (KEEP_VECTOR, KEEP_VECTORS) else 0, n if keep == KEEP_VECTORS else 0
    per_row = (torch.empty(n, dtype=dtype, device=hidden.device) for dtype in (work, work, torch.float64))
    vectors = (torch.empty((count, width), dtype=hidden.dtype, device=hidden.device) for count in counts)
    rows = empty_rows(n if keep == KEEP_ROWS else 0, len(weight), hidden.dtype, hidden.device)
    return *per_row, *vectors, rows


_OPTIONS = "float temperature, float? softcap, float logit_scale, int ignore_index, int chunk_size"
_NEEDS = "bool need_hidden, bool need_weight, bool need_bias"


@register(
    f"linear_logprobs_forward(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, {_OPTIONS}, int keep) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda hidden, weight, labels, *rest: _outputs(hidden, weight, labels, rest[-1]),
)
def forward(hidden, weight, labels, bias, temperature, softcap, logit_scale, ignore_index, chunk_size, keep):
    """Return logprobs, entropy, lse (N,), d logprob / d hidden, d entropy / d hidden (N, D), onehot - p (N, V).

    The lse is float64. What ``keep`` does not ask for has no rows.
    """
    check_labels(labels, len(weight), ignore_index)
    outputs = _outputs(hidden, weight, labels, keep)
    *per_row, vector, entropy_vector, kept_rows = outputs
    gemm = _Gemm(hidden, weight, bias, chunk_size)
    options = (temperature, softcap, ignore_index, logit_scale)
    for chunk in gemm.chunks():
        logits, rows = gemm.logits(chunk), None
        if keep == KEEP_ROWS:
            rows = kept_rows[chunk]
        elif keep != KEEP_NOTHING:
            # the gradient of the entropy needs the logits once more, so they must not be overwritten yet
            rows = gemm.rows(chunk, spare_logits=keep == KEEP_VECTORS)
        results = _head_rows(logits, labels[chunk], *options, rows)
        for out, result in zip(per_row, results):
            out[chunk] = result
        if keep in (KEEP_VECTOR, KEEP_VECTORS):
            vector[chunk] = gemm.times_weight(rows)
        if keep == KEEP_VECTORS:
            _, entropy, lse = results
            zeros, ones = torch.zeros_like(entropy), torch.ones_like(entropy)
            _gradient_rows(logits, labels[chunk], lse, entropy, zeros, ones, *options, rows)
            entropy_vector[chunk] = gemm.times_weight(rows)
    return outputs


def _fake_gradients(hidden, weight, needs) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = needs
    work = promote(hidden[:0]).dtype
    return (
        torch.empty((len(hidden) if need_hidden else 0, hidden.shape[1]), dtype=hidden.dtype, device=hidden.device),
        torch.empty((len(weight) if need_weight else 0, hidden.shape[1]), dtype=weight.dtype, device=hidden.device),
        torch.empty(len(weight) if need_bias else 0, dtype=work, device=hidden.device),
    )


@register(
    "linear_logprobs_backward(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor lse, Tensor entropy, "
    f"Tensor grad_logprobs, Tensor? grad_entropy, {_OPTIONS}, {_NEEDS}) -> (Tensor, Tensor, Tensor)",
    lambda hidden, weight, *rest: _fake_gradients(hidden, weight, rest[-3:]),
)
def backward(
    hidden,
    weight,
    labels,
    bias,
    lse,
    entropy,
    grad_logprobs,
    grad_entropy,
    temperature,
    softcap,
    logit_scale,
    ignore_index,
    chunk_size,
    need_hidden,
    need_weight,
    need_bias,
):
    """Make the logits again and return the gradients of hidden, weight and bias; empty where not needed."""
    gemm = _Gemm(hidden, weight, bias, chunk_size, need_weight)
    gradients = _Gradients(gemm, need_hidden, need_weight, need_bias)
    scale = _fp16_scale(hidden, grad_logprobs, grad_entropy)
    options = (temperature, softcap, ignore_index, logit_scale)
    for group in gemm.groups():
        for chunk in gemm.chunks(group):
            logits, rows = gemm.logits(chunk), gemm.rows(chunk)
            grad_e = None if grad_entropy is None else grad_entropy[chunk] / scale
            grad = grad_logprobs[chunk] / scale
            _gradient_rows(logits, labels[chunk], lse[chunk], entropy[chunk], grad, grad_e, *options, rows)
            gradients.add(chunk, rows)
        keep = (labels[group] != ignore_index)[:, None]
        # an ignored row of hidden may be NaN, which its zero gradient row would not cancel
        gradients.add_to_head(group, gemm.rows(group), torch.where(keep, hidden[group], 0.0))
    return gradients.finish(scale)


@register(
    "linear_logprobs_backward_from_rows(Tensor rows, Tensor hidden, Tensor weight, Tensor labels, Tensor "
    f"grad_logprobs, int ignore_index, {_NEEDS}) -> (Tensor, Tensor, Tensor)",
    lambda rows, hidden, weight, *rest: _fake_gradients(hidden, weight, rest[-3:]),
)
def backward_from_rows(rows, hidden, weight, labels, grad_logprobs, ignore_index, need_hidden, need_weight, need_bias):
    """The same from onehot - p (N, V), kept in the forward pass: two GEMMs instead of three."""
    gemm = _Gemm(hidden, weight, None, max(1, len(hidden)))
    gradients = _Gradients(gemm, need_hidden, need_weight, need_bias)
    scale = _fp16_scale(hidden, grad_logprobs, None)
    grad = (grad_logprobs / scale)[:, None]
    for chunk in gemm.chunks():
        gradients.add(chunk, rows, grad)
        gradients.add_to_head(chunk, rows, _scaled(hidden, grad, labels, ignore_index))
    return gradients.finish(scale)


@register(
    "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor factor, "
    f"{_OPTIONS}, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda hidden, weight, labels, bias, factor, *rest: (
        torch.empty((), dtype=promote(hidden[:0]).dtype, device=hidden.device),
        *_fake_gradients(hidden, weight, rest[-3:]),
    ),
)
def summed_cross_entropy(
    hidden,
    weight,
    labels,
    bias,
    factor,
    temperature,
    softcap,
    logit_scale,
    ignore_index,
    chunk_size,
    need_hidden,
    need_weight,
    need_bias,
):
    """Return sum(factor * cross entropy) and its gradients; nothing else outlives the call."""
    check_labels(labels, len(weight), ignore_index)
    gemm = _Gemm(hidden, weight, bias, chunk_size, need_weight)
    gradients = _Gradients(gemm, need_hidden, need_weight, need_bias)
    loss = torch.zeros((), dtype=promote(hidden[:0]).dtype, device=hidden.device)
    scale = _fp16_scale(hidden, factor, None)
    grad = (-factor / scale)[:, None]
    for group in gemm.groups():
        for chunk in gemm.chunks(group):
            logits, rows = gemm.logits(chunk), gemm.rows(chunk)
            results = _head_rows(logits, labels[chunk], temperature, softcap, ignore_index, logit_scale, rows)
            loss -= (factor[chunk] * results[0]).sum()
            gradients.add(chunk, rows, grad[chunk])
        scaled = _scaled(hidden[group], grad[group], labels[group], ignore_index) if need_weight else None
        gradients.add_to_head(group, gemm.rows(group), scaled)
    return loss, *gradients.finish(scale)


class _Gemm:
    """The V-sized products of one call, and the buffers that its chunks share.

    All in forms that autocast leaves alone (out=, in place, out_dtype=, equal dtypes): it would round the logits.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_size: int, trains_head: bool = False):
        self.hidden, self.weight, self.chunk_size = hidden, weight, chunk_size
        per_outer = chunks_per_outer(hidden, weight, chunk_size) if trains_head else 1
        self.group_size = min(per_outer * chunk_size, max(1, len(hidden)))
        self.work = promote(hidden[:0]).dtype
        self.bias = None if bias is None else bias.to(self.work)
        self.narrow = hidden.dtype != self.work
        # 16-bit gradient rows where the GEMM takes them, working precision otherwise
        self.rows_dtype = hidden.dtype if self.narrow and hidden.is_cuda else self.work
        self._buffers: dict[str, Tensor] = {}

    def groups(self) -> list[slice]:
        """Chunks whose gradient rows exist together: one if ``trains_head`` is off."""
        return _cut(slice(0, len(self.hidden)), self.group_size)

    def chunks(self, group: slice | None = None) -> list[slice]:
        return _cut(group or slice(0, len(self.hidden)), self.chunk_size)

    def logits(self, chunk: slice) -> Tensor:
        """hidden @ weight^T + bias in working precision, (n, V)."""
        hidden = self.hidden[chunk]
        out = self._buffer("logits", len(hidden), self.work)
        if not self.narrow:
            torch.mm(hidden, self.weight.t(), out=out)
        elif hidden.is_cuda:
            torch.mm(hidden, self.weight.t(), out_dtype=torch.float32, out=out)
        else:
            hidden = hidden.float()
            for slab in self._slabs():
                torch.mm(hidden, self.weight[slab].float().t(), out=out[:, slab])
        return out if self.bias is None else out.add_(self.bias)

    def rows(self, chunk: slice, spare_logits: bool = False) -> Tensor:
        """Where the gradient rows of a chunk (or a whole group) go: over its logits where dtype and group allow."""
        if self.rows_dtype == self.work and not spare_logits and self.group_size <= self.chunk_size:
            return self._buffer("logits", len(self.hidden[chunk]), self.rows_dtype)
        first = chunk.start % self.group_size
        return self._buffer("rows", first + len(self.hidden[chunk]), self.rows_dtype)[first:]

    def times_weight(self, rows: Tensor) -> Tensor:
        """rows @ weight in working precision, (n, D)."""
        if not self.narrow:
            return torch.mm(rows, self.weight)
        if rows.is_cuda:
            return torch.mm(rows, self.weight, out_dtype=torch.float32)
        total = rows.new_zeros((len(rows), self.weight.shape[1]), dtype=torch.float32)
        for slab in self._slabs():
            total.addmm_(rows[:, slab].float(), self.weight[slab].float())
        return total

    def add_outer(self, total: Tensor, rows: Tensor, hidden: Tensor, first: bool) -> None:
        """total (V, D) += rows^T @ hidden, or = if it is the first; summed in working precision, rounded to total's."""
        if not self.narrow:
            torch.mm(rows.t(), hidden, out=total) if first else total.addmm_(rows.t(), hidden)
        elif rows.is_cuda and total.dtype == rows.dtype:
            torch.mm(rows.t(), hidden, out=total)
        elif rows.is_cuda and first:
            torch.mm(rows.t(), hidden, out_dtype=torch.float32, out=total)
        elif rows.is_cuda:
            torch.addmm(total, rows.t(), hidden, out_dtype=torch.float32, out=total)
        else:
            hidden = hidden.float()
            for slab in self._slabs():
                part = torch.mm(rows[:, slab].float().t(), hidden)
                total[slab].copy_(part) if first else total[slab].add_(part)

    def _slabs(self) -> list[slice]:
        vocab_size, width = self.weight.shape
        size = max(1, _CPU_SLAB_BYTES // (4 * width))
        return [slice(start, start + size) for start in range(0, vocab_size, size)]

    def _buffer(self, name: str, n: int, dtype: torch.dtype) -> Tensor:
        if name not in self._buffers:
            count = min(self.chunk_size if name == "logits" else self.group_size, len(self.hidden))
            self._buffers[name] = empty_rows(count, len(self.weight), dtype, self.hidden.device)
        return self._buffers[name][:n]


def _cut(whole: slice, size: int) -> list[slice]:
    return [slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size)]


class _Gradients:
    """Gradients of hidden, weight and bias, summed over chunks; empty where not needed."""

    def __init__(self, gemm: _Gemm, need_hidden: bool, need_weight: bool, need_bias: bool):
        hidden, weight = gemm.hidden, gemm.weight
        self.gemm, self.need_hidden, self.need_weight, self.need_bias = gemm, need_hidden, need_weight, need_bias
        self.hidden = hidden.new_empty((len(hidden) if need_hidden else 0, hidden.shape[1]), dtype=gemm.work)
        # a lone GEMM rounds its own sums; only float16 is scaled afterwards, and must not overflow before
        alone = len(gemm.groups()) == 1 and hidden.dtype != torch.float16
        size = (len(weight) if need_weight else 0, hidden.shape[1])
        self.weight = hidden.new_empty(size, dtype=weight.dtype if alone else gemm.work)
        self.bias = hidden.new_zeros(len(weight) if need_bias else 0, dtype=gemm.work)
        if not len(hidden):
            self.weight.zero_()

    def add(self, chunk: slice, rows: Tensor, grad: Tensor | None = None) -> None:
        """Add a chunk's gradients through ``rows``, of hidden and bias. ``grad`` (n, 1): factors of the tokens."""
        if self.need_hidden:
            d_hidden = self.gemm.times_weight(rows)
            self.hidden[chunk] = d_hidden if grad is None else grad * d_hidden
        if self.need_bias:
            # by slabs: a float32 product of kept rows would be as large as the logits that were never held
            for start in range(0, len(rows), _CPU_MIN_ROWS):
                slab = slice(start, start + _CPU_MIN_ROWS)
                part = rows[slab] if grad is None else grad[slab] * rows[slab]
                self.bias += part.sum(0, dtype=self.gemm.work)

    def add_to_head(self, group: slice, rows: Tensor, hidden: Tensor) -> None:
        """Add a group's gradient of the head; the factors of the tokens are in ``hidden``."""
        if self.need_weight:
            self.gemm.add_outer(self.weight, rows, hidden, first=group.start == 0)

    def finish(self, scale: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(scale, Tensor):
            self.hidden, self.weight, self.bias = self.hidden * scale, self.weight * scale, self.bias * scale
        return self.hidden.to(self.gemm.hidden.dtype), self.weight.to(self.gemm.weight.dtype), self.bias


def _head_rows(logits, labels, temperature, softcap, ignore_index, logit_scale, out):
    tensors = (logits, labels) if out is None else (logits, labels, out)
    chosen = implementation("linear_logprobs", "head_rows", *tensors)
    return chosen.head_rows(logits, labels, temperature, softcap, ignore_index, logit_scale, out)


def _gradient_rows(
    logits, labels, lse, entropy, grad_logprobs, grad_entropy, temperature, softcap, ignore_index, logit_scale, out
) -> None:
    """Write d loss / d raw logits into ``out``, which may be ``logits``."""
    options = (temperature, softcap, ignore_index, out, logit_scale)
    chosen = implementation("logprobs", "token_logprobs_backward", logits, labels, out)
    chosen.token_logprobs_backward(logits, labels, lse, entropy, grad_logprobs, grad_entropy, *options)


def _scaled(hidden: Tensor, grad: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """grad * hidden in hidden's dtype; 0 in ignored rows, whose hidden state may be NaN."""
    return torch.where((labels == ignore_index)[:, None], 0.0, grad * hidden).to(hidden.dtype)


def _fp16_scale(hidden: Tensor, grad: Tensor, grad_entropy: Tensor | None) -> Tensor | float:
    """The largest upstream gradient: float16 rows times 1 / N would vanish below its smallest number."""
    if hidden.dtype != torch.float16 or not len(hidden):
        return 1.0
    largest = grad.abs().amax()
    if grad_entropy is not None:
        largest = torch.maximum(largest, grad_entropy.abs().amax())
    return torch.where(largest > 0, largest, 1.0)
