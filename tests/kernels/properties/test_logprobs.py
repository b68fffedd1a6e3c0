"""token_logprobs and sequence_logprobs on drawn shapes, strides, dtypes and edge values, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch.nn.functional import log_softmax

from rlhf_fast.kernels import sequence_logprobs, token_logprobs
from tests.kernels.properties.problems import DTYPES, INF, LAYOUTS, MASKS, NAN, Case, laid_out

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NaN and log(0) in its interpreter
ROW_EDGES = ("masked words", "masked label", "confident", "NaN row", "NaN at ignored", "logits near 100")
EDGES = (*ROW_EDGES, "all ignored", "zero upstream")


def log_probabilities(z, labels, keep):
    """log softmax at the label and entropy, 0 where not kept."""
    log_p = log_softmax(z, -1)
    picked = log_p.gather(-1, torch.where(keep, labels, 0).unsqueeze(-1)).squeeze(-1)
    # before the product, or autograd would multiply 0 by inf
    entropy = -(log_p.exp() * torch.where(log_p == -INF, 0.0, log_p)).sum(-1)
    return torch.where(keep, picked, 0.0), torch.where(keep, entropy, 0.0)


def largest_rounded(logits, keep, temperature, softcap):
    """1, the softmax sum of a confident token; the logits themselves only if softcap or temperature rounds them."""
    if (softcap is None and temperature == 1.0) or not keep.any():
        return 1.0
    largest = torch.where(logits.isfinite(), logits, 0.0)[keep].double().abs().max().item()
    return max(1.0, (largest if softcap is None else min(largest, softcap)) / temperature)


def edit_rows(logits, labels, keep, edges):
    """Give the rows of (N, V) logits what the edge classes say; row 0 stays as it is. In place."""
    vocab_size = logits.shape[1]
    rows = torch.arange(len(logits))
    if "logits near 100" in edges:
        logits += 90
    if "masked words" in edges:
        logits[1:, : vocab_size // 2] = -INF
        labels[rows[1:]] = torch.where(keep[1:] & (labels[1:] < vocab_size // 2), vocab_size - 1, labels[1:])
    if "confident" in edges and len(rows):
        kept = rows[keep]
        # at most 100, and far enough above the others at any temperature that is drawn
        logits[kept, labels[kept]] = logits[kept].amax(-1).clamp(max=80) + 20
    if "masked label" in edges and vocab_size > 2 and len(rows) > 1 and keep[1]:
        logits[1, labels[1]] = -INF
        logits[1, (labels[1] + 1) % vocab_size] = 0.5
    if "NaN row" in edges and len(rows) > 2:
        logits[2, vocab_size // 2] = NAN
    if "NaN at ignored" in edges:
        logits[~keep] = NAN


@st.composite
def token_problems(draw, device):
    case = Case(draw, device, EDGES)
    shape, vocab_size = case.pick((0,), (1,), (3,), (2, 3), (7,)), case.pick(1, 2, 3, 17, 61, 64, 257, 521, 9001)
    dtype, layout, scale = case.pick(*DTYPES), case.pick(*LAYOUTS), case.pick(0.1, 1.0, 4.0)
    if layout == "expanded":
        case.edges -= set(ROW_EDGES)
    temperature, softcap = case.pick(0.5, 1.0, 1.7), case.pick(None, 30.0 if "confident" in case.edges else 2.0)
    entropy, ignored = case.pick(False, True, "detached"), case.pick(-100, -1, 0)
    logits = case.normal(*shape, vocab_size, scale=scale)
    labels = torch.randint(vocab_size, shape, generator=case.generator)
    labels[case.flips(*shape, share=1.0 if "all ignored" in case.edges else 0.2)] = ignored
    keep = labels != ignored
    edit_rows(logits.view(-1, vocab_size), labels.view(-1), keep.view(-1), case.edges)
    keep = labels != ignored
    case.note(dtype=dtype, stride=layout, V=vocab_size, entropy=entropy, softcap=softcap is not None, ignored=ignored)
    case.note(rows=labels.numel())
    labels, keep = labels.to(device), keep.to(device)
    inplace = case.pick(False, True)

    def call(logits):
        labelled = labels.int() if vocab_size == 17 else labels
        options = {"temperature": temperature, "softcap": softcap, "ignore_index": ignored}
        result = token_logprobs(logits, labelled, entropy=entropy, inplace_backward=inplace, **options)
        return result if entropy else (result,)

    def formula(logits):
        z = torch.where(keep[..., None], logits, 0.0)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        logprobs, row_entropy = log_probabilities(z / temperature, labels, keep)
        return {False: (logprobs,), True: (logprobs, row_entropy)}.get(entropy, (logprobs, row_entropy.detach()))

    inputs = {"logits": laid_out(logits.to(dtype).to(device), layout)}
    # plain PyTorch reads the upstream gradient of a NaN row even when it is 0
    zero = "zero upstream" in case.edges and "NaN row" not in case.edges
    rounded = largest_rounded(inputs["logits"], keep, temperature, softcap)
    return case.problem(call, formula, inputs, ["logits"], zero_upstream=zero, rounded=rounded)


def test_token_logprobs(explore):
    explore(token_problems, *EDGES, "p_y > 0.999")


@st.composite
def sequence_problems(draw, device):
    case = Case(draw, device, MASKS)
    mask, cu_seqlens, sequences = case.tokens()
    average, dtype = case.pick(False, True), case.pick(*DTYPES)
    case.note(dtype=dtype, average=average)
    inputs = {"logprobs": case.per_token(case.normal(*mask.shape) - 2, mask, dtype)}

    def call(logprobs):
        return (sequence_logprobs(logprobs, mask, average=average, cu_seqlens=cu_seqlens),)

    def formula(logprobs):
        sums = [logprobs[s][mask[s]].sum() / (mask[s].sum().clamp(min=1) if average else 1) for s in sequences]
        return (torch.stack(sums) if sums else 0 * logprobs[mask].sum() + logprobs.new_zeros(0),)

    return case.problem(call, formula, inputs, ["logprobs"])


def test_sequence_logprobs(explore):
    explore(sequence_problems, *MASKS)
