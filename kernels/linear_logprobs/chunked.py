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


# A head is a sum of products, logits = sum of input @ matrix^T: hidden states (N, D) by the weight (V, D), which comes
# first, and the low-rank inputs (N, r) by B (V, r). ``inputs`` and ``matrices`` are lists of one or two; all are multiplied
# in the dtype of the hidden states, and the gradients of each come in its own.

_HEAD = "Tensor labels, Tensor[] inputs, Tensor[] matrices, Tensor? bias"
_OPTIONS = "float temperature, float? softcap, float logit_scale, int ignore_index, int chunk_size"
_NEEDS = "bool[] need_inputs, bool[] need_matrices, bool need_bias"


def _outputs(labels, inputs, matrices, keep, need_inputs) -> tuple:
    hidden, work = inputs[0], promote(inputs[0][:0]).dtype
    n = len(hidden)
    per_row = (torch.empty(n, dtype=dtype, device=hidden.device) for dtype in (work, work, torch.float64))
    counts = n if keep in (KEEP_VECTOR, KEEP_VECTORS) else 0, n if keep == KEEP_VECTORS else 0
    vectors = (
        [x.new_empty((count if need else 0, x.shape[1])) for x, need in zip(inputs, need_inputs)] for count in counts
    )
    rows = empty_rows(n if keep == KEEP_ROWS else 0, len(matrices[0]), hidden.dtype, hidden.device)
    return *per_row, *vectors, rows


@register(
    f"linear_logprobs_forward({_HEAD}, {_OPTIONS}, int keep, bool[] need_inputs) -> "
    "(Tensor, Tensor, Tensor, Tensor[], Tensor[], Tensor)",
    lambda labels, inputs, matrices, *rest: _outputs(labels, inputs, matrices, *rest[-2:]),
)
def forward(
    labels,
    inputs,
    matrices,
    bias,
    temperature,
    softcap,
    logit_scale,
    ignore_index,
    chunk_size,
    keep,
    need_inputs,
):
    """Return logprobs, entropy, lse (N,), d logprob / d inputs, d entropy / d inputs, onehot - p (N, V).

    The lse is float64. What ``keep`` and ``need_inputs`` do not ask for has no rows.
    """
    check_labels(labels, len(matrices[0]), ignore_index)
    outputs = _outputs(labels, inputs, matrices, keep, need_inputs)
    *per_row, vectors, entropy_vectors, kept_rows = outputs
    gemm = _Gemm(inputs, matrices, bias, chunk_size)
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
            gemm.write_vectors(vectors, chunk, rows, need_inputs)
        if keep == KEEP_VECTORS:
            _, entropy, lse = results
            zeros, ones = torch.zeros_like(entropy), torch.ones_like(entropy)
            _gradient_rows(logits, labels[chunk], lse, entropy, zeros, ones, *options, rows)
            gemm.write_vectors(entropy_vectors, chunk, rows, need_inputs)
    return outputs


def _fake_gradients(inputs, matrices, need_inputs, need_matrices, need_bias) -> tuple:
    work = promote(inputs[0][:0]).dtype
    d_inputs, d_matrices = (
        [x.new_empty((len(x) if need else 0, x.shape[1])) for x, need in zip(tensors, needs)]
        for tensors, needs in ((inputs, need_inputs), (matrices, need_matrices))
    )
    return d_inputs, d_matrices, inputs[0].new_empty(len(matrices[0]) if need_bias else 0, dtype=work)


@register(
    f"linear_logprobs_backward({_HEAD}, Tensor lse, Tensor entropy, Tensor grad_logprobs, Tensor? grad_entropy, "
    f"{_OPTIONS}, {_NEEDS}) -> (Tensor[], Tensor[], Tensor)",
    lambda labels, inputs, matrices, *rest: _fake_gradients(inputs, matrices, *rest[-3:]),
)
def backward(
    labels,
    inputs,
    matrices,
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
    *needs,
):
    """Make the logits again and return the gradients of inputs, matrices and bias; empty where not needed."""
    gemm = _Gemm(inputs, matrices, bias, chunk_size, trains_weight=needs[1][0])
    gradients = _Gradients(gemm, inputs, matrices, labels != ignore_index, *needs)
    scale = _fp16_scale(inputs[0], grad_logprobs, grad_entropy)
    options = (temperature, softcap, ignore_index, logit_scale)
    for group in gemm.groups():
        for chunk in gemm.chunks(group):
            logits, rows = gemm.logits(chunk), gemm.rows(chunk)
            grad_e = None if grad_entropy is None else grad_entropy[chunk] / scale
            grad = grad_logprobs[chunk] / scale
            _gradient_rows(logits, labels[chunk], lse[chunk], entropy[chunk], grad, grad_e, *options, rows)
            gradients.add(chunk, rows)
        gradients.add_to_head(group, gemm.rows(group))
    return gradients.finish(scale)


@register(
    "linear_logprobs_backward_from_rows(Tensor labels, Tensor[] inputs, Tensor[] matrices, Tensor rows, Tensor "
    f"grad_logprobs, int ignore_index, {_NEEDS}) -> (Tensor[], Tensor[], Tensor)",
    lambda labels, inputs, matrices, *rest: _fake_gradients(inputs, matrices, *rest[-3:]),
)
def backward_from_rows(labels, inputs, matrices, rows, grad_logprobs, ignore_index, *needs):
    """The same from onehot - p (N, V), kept in the forward pass: one GEMM less."""
    gemm = _Gemm(inputs, matrices, None, max(1, len(rows)))
    gradients = _Gradients(gemm, inputs, matrices, labels != ignore_index, *needs)
    scale = _fp16_scale(inputs[0], grad_logprobs, None)
    grad = (grad_logprobs / scale)[:, None]
    for chunk in gemm.chunks():
        gradients.add(chunk, rows, grad)
        gradients.add_to_head(chunk, rows, grad)
    return gradients.finish(scale)


@register(
    f"linear_cross_entropy_forward({_HEAD}, Tensor factor, {_OPTIONS}, {_NEEDS}) -> "
    "(Tensor, Tensor[], Tensor[], Tensor)",
    lambda labels, inputs, matrices, bias, factor, *rest: (
        inputs[0].new_empty((), dtype=promote(inputs[0][:0]).dtype),
        *_fake_gradients(inputs, matrices, *rest[-3:]),
    ),
)
def summed_cross_entropy(
    labels,
    inputs,
    matrices,
    bias,
    factor,
    temperature,
    softcap,
    logit_scale,
    ignore_index,
    chunk_size,
    *needs,
):
    """Return sum(factor * cross entropy) and its gradients; nothing else outlives the call."""
    check_labels(labels, len(matrices[0]), ignore_index)
    gemm = _Gemm(inputs, matrices, bias, chunk_size, trains_weight=needs[1][0])
    gradients = _Gradients(gemm, inputs, matrices, labels != ignore_index, *needs)
    loss = torch.zeros((), dtype=gemm.work, device=labels.device)
    scale = _fp16_scale(inputs[0], factor, None)
    grad = (-factor / scale)[:, None]
    for group in gemm.groups():
        for chunk in gemm.chunks(group):
            logits, rows = gemm.logits(chunk), gemm.rows(chunk)
            results = _head_rows(logits, labels[chunk], temperature, softcap, ignore_index, logit_scale, rows)
            loss -= (factor[chunk] * results[0]).sum()
            gradients.add(chunk, rows, grad[chunk])
        gradients.add_to_head(group, gemm.rows(group), grad[group])
    return loss, *gradients.finish(scale)


class _Gemm:
    """The V-sized products of one call, and the buffers that its chunks share.

    All in forms that autocast leaves alone (out=, in place, out_dtype=, equal dtypes): it would round the logits.
    """

    def __init__(
        self,
        inputs: list[Tensor],
        matrices: list[Tensor],
        bias: Tensor | None,
        chunk_size: int,
        trains_weight: bool = False,
    ):
        hidden, weight = inputs[0], matrices[0]
        self.dtype, self.device, self.chunk_size = hidden.dtype, hidden.device, chunk_size
        self.inputs, self.matrices = ([x.to(self.dtype) for x in tensors] for tensors in (inputs, matrices))
        self.num_rows, self.vocab_size = len(hidden), len(weight)
        # only the sum of the (V, D) gradient is long to read: one of rank r takes each chunk by itself
        per_outer = chunks_per_outer(hidden, weight, chunk_size) if trains_weight else 1
        self.group_size = min(per_outer * chunk_size, max(1, self.num_rows))
        self.work = promote(hidden[:0]).dtype
        self.bias = None if bias is None else bias.to(self.work)
        narrow = self.dtype != self.work
        # a CPU has no GEMM of 16-bit matrices into float32, and multiplies float32 copies of slabs of the vocabulary
        self.mixed, self.widened = narrow and hidden.is_cuda, narrow and not hidden.is_cuda
        size = max(1, _CPU_SLAB_BYTES // (4 * weight.shape[1])) if self.widened else self.vocab_size
        self.slabs = _cut(slice(0, self.vocab_size), size)
        # 16-bit gradient rows where the GEMM takes them, working precision otherwise
        self.rows_dtype = self.dtype if self.mixed else self.work
        self._buffers: dict[str, Tensor] = {}

    def groups(self) -> list[slice]:
        """Chunks whose gradient rows exist together: one if ``trains_weight`` is off."""
        return _cut(slice(0, self.num_rows), self.group_size)

    def chunks(self, group: slice | None = None) -> list[slice]:
        return _cut(group or slice(0, self.num_rows), self.chunk_size)

    def logits(self, chunk: slice) -> Tensor:
        """The sum of input @ matrix^T, + bias, in working precision, (n, V)."""
        out = self._buffer("logits", chunk.stop - chunk.start, self.work)
        inputs = [self._wide(x[chunk]) for x in self.inputs]
        for slab in self.slabs:
            for i, (x, matrix) in enumerate(zip(inputs, self.matrices)):
                self._multiply(out[:, slab], x, self._wide(matrix[slab]).t(), first=i == 0)
        return out if self.bias is None else out.add_(self.bias)

    def rows(self, chunk: slice, spare_logits: bool = False) -> Tensor:
        """Where the gradient rows of a chunk (or a whole group) go: over its logits where dtype and group allow."""
        count = chunk.stop - chunk.start
        if self.rows_dtype == self.work and not spare_logits and self.group_size <= self.chunk_size:
            return self._buffer("logits", count, self.rows_dtype)
        first = chunk.start % self.group_size
        return self._buffer("rows", first + count, self.rows_dtype)[first:]

    def times_matrix(self, rows: Tensor, which: int) -> Tensor:
        """rows @ matrix in working precision, (n, D) or (n, r)."""
        matrix = self.matrices[which]
        out = torch.empty((len(rows), matrix.shape[1]), dtype=self.work, device=self.device)
        for slab in self.slabs:
            self._multiply(out, self._wide(rows[:, slab]), self._wide(matrix[slab]), first=slab.start == 0)
        return out

    def write_vectors(self, vectors: list[Tensor], chunk: slice, rows: Tensor, needs: list[bool]) -> None:
        """Write rows @ matrix of a chunk into the vectors of the inputs that need them."""
        for i, (vector, need) in enumerate(zip(vectors, needs)):
            if need:
                vector[chunk] = self.times_matrix(rows, i)

    def add_outer(self, total: Tensor, rows: Tensor, x: Tensor, first: bool) -> None:
        """total (V, K) += rows^T @ x, or = if it is the first; in total's dtype, which is 16-bit only for a lone one."""
        x = self._wide(x)
        for slab in self.slabs:
            left = self._wide(rows[:, slab]).t()
            if total.dtype == self.work:
                self._multiply(total[slab], left, x, first)
            elif self.mixed:
                torch.mm(left, x, out=total[slab])
            else:
                total[slab].copy_(torch.mm(left, x))

    def _multiply(self, out: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
        """out = left @ right, or += unless it is the ``first``; everything is summed in out's working precision."""
        if not self.mixed:
            torch.mm(left, right, out=out) if first else out.addmm_(left, right)
        elif first:
            torch.mm(left, right, out_dtype=self.work, out=out)
        else:
            torch.addmm(out, left, right, out_dtype=self.work, out=out)

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(self.work) if self.widened else x

    def _buffer(self, name: str, n: int, dtype: torch.dtype) -> Tensor:
        if name not in self._buffers:
            count = min(self.chunk_size if name == "logits" else self.group_size, self.num_rows)
            self._buffers[name] = empty_rows(count, self.vocab_size, dtype, self.device)
        return self._buffers[name][:n]


def _cut(whole: slice, size: int) -> list[slice]:
    return [slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size)]


class _Gradients:
    """Gradients of inputs, matrices and bias, summed over chunks; empty where not needed.

    ``labelled`` (N,) are the rows that are not ignored: an input of another may be NaN, which its zero gradient row would
    not cancel.
    """

    def __init__(self, gemm: _Gemm, inputs, matrices, labelled: Tensor, need_inputs, need_matrices, need_bias: bool):
        self.gemm, self.labelled = gemm, labelled[:, None]
        self.needs = need_inputs, need_matrices, need_bias
        self.dtypes = [x.dtype for x in inputs], [x.dtype for x in matrices]
        self.inputs = [
            x.new_empty((len(x) if need else 0, x.shape[1]), dtype=gemm.work) for x, need in zip(inputs, need_inputs)
        ]
        # a lone GEMM rounds its own sums; only float16 is scaled afterwards, and must not overflow before
        alone = len(gemm.groups()) == 1 and gemm.dtype != torch.float16
        self.matrices = [
            x.new_empty(
                (len(x) if need else 0, x.shape[1]), dtype=gemm.dtype if alone and x.dtype == gemm.dtype else gemm.work
            )
            for x, need in zip(matrices, need_matrices)
        ]
        self.bias = inputs[0].new_zeros(gemm.vocab_size if need_bias else 0, dtype=gemm.work)
        if not gemm.num_rows:
            for total in self.matrices:
                total.zero_()

    def add(self, chunk: slice, rows: Tensor, grad: Tensor | None = None) -> None:
        """Add a chunk's gradients through ``rows``, of inputs and bias. ``grad`` (n, 1): factors of the tokens."""
        need_inputs, _, need_bias = self.needs
        for i, (total, need) in enumerate(zip(self.inputs, need_inputs)):
            if need:
                d_x = self.gemm.times_matrix(rows, i)
                total[chunk] = d_x if grad is None else grad * d_x
        if need_bias:
            # by slabs: a float32 product of kept rows would be as large as the logits that were never held
            for start in range(0, len(rows), _CPU_MIN_ROWS):
                slab = slice(start, start + _CPU_MIN_ROWS)
                part = rows[slab] if grad is None else grad[slab] * rows[slab]
                self.bias += part.sum(0, dtype=self.gemm.work)

    def add_to_head(self, group: slice, rows: Tensor, grad: Tensor | None = None) -> None:
        """Add a group's gradients of the matrices; factors of the tokens that are not in ``rows`` go into the inputs."""
        for total, x, need in zip(self.matrices, self.gemm.inputs, self.needs[1]):
            if need:
                x = x[group] if grad is None else grad * x[group]
                x = torch.where(self.labelled[group], x, 0.0).to(self.gemm.dtype)
                self.gemm.add_outer(total, rows, x, first=group.start == 0)

    def finish(self, scale: Tensor | float) -> tuple[list[Tensor], list[Tensor], Tensor]:
        d_inputs, d_matrices = (
            [(x * scale if isinstance(scale, Tensor) else x).to(dtype) for x, dtype in zip(tensors, dtypes)]
            for tensors, dtypes in zip((self.inputs, self.matrices), self.dtypes)
        )
        return d_inputs, d_matrices, self.bias * scale


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


def _fp16_scale(hidden: Tensor, grad: Tensor, grad_entropy: Tensor | None) -> Tensor | float:
    """The largest upstream gradient: float16 rows times 1 / N would vanish below its smallest number."""
    if hidden.dtype != torch.float16 or not len(hidden):
        return 1.0
    largest = grad.abs().amax()
    if grad_entropy is not None:
        largest = torch.maximum(largest, grad_entropy.abs().amax())
    return torch.where(largest > 0, largest, 1.0)
