"""Attention of decoding: by hand, against float64 on every backend, what it never reads, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_fast.kernels import decode_attention, use_backend

FAMILY = "attention"
NAN = float("nan")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def plain(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, window: int | None) -> Tensor:
    """One sequence and head at a time, nothing but its own keys."""
    out, group = query.new_zeros(*query.shape[:2], values.shape[3]), query.shape[1] // keys.shape[1]
    for b, n in enumerate(lengths.tolist()):
        seen = slice(0 if window is None else max(0, n - window), n)
        for h in range(query.shape[1] if n else 0):
            k, v = (x[b, h // group, seen] for x in (keys, values))
            out[b, h] = (k @ query[b, h] * scale).softmax(0) @ v
    return out


def problem(batch: int, heads: int, key_heads: int, places: int, width: int, lengths: list[int], dtype, device):
    """Slots that are longer than the batch, NaN wherever nothing was written."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads, width, generator=generator) * 2
    keys, values = torch.randn(2, batch + 1, key_heads, places, width, generator=generator).unbind()
    for x in (keys, values):
        x[batch:] = NAN
        for b, n in enumerate(lengths):
            x[b, :, n:] = NAN
    return [x.to(dtype).to(device) for x in (query, keys, values)] + [torch.tensor(lengths, device=device)]


def test_decode_attention_by_hand(backend, device):
    """Scores ln 1 and ln 3 weigh the two values 1/4 and 3/4; with a window of 1 the last one is all there is."""
    keys = torch.tensor([0.0, 3.0]).log().nan_to_num(neginf=0.0).view(1, 1, 2, 1).to(device)
    values = torch.tensor([8.0, 4.0]).view(1, 1, 2, 1).to(device)
    query, lengths = torch.ones(1, 1, 1, device=device), torch.tensor([2], device=device)
    torch.testing.assert_close(decode_attention(query, keys, values, lengths).cpu(), torch.tensor([[[5.0]]]))
    assert decode_attention(query, keys, values, lengths, window=1).item() == 4.0
    assert decode_attention(query, keys, values, lengths - 1).item() == 8.0


SHAPES = {  # B, H, Hk, S, d, lengths
    "one head of one number": (2, 1, 1, 3, 1, [1, 3]),
    "grouped, odd width, one empty": (3, 6, 2, 70, 20, [70, 0, 33]),
    # more than a program of the Triton kernel or a pass of the C++ one takes
    "many heads on one key head": (2, 19, 1, 66, 64, [65, 66]),
    # more than a share of the Triton kernel, at and around its edges
    "shares": (4, 2, 2, 1100, 16, [1100, 512, 513, 1]),
    "wide": (2, 4, 4, 40, 128, [40, 7]),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_are_no_worse_than_plain_pytorch(backend, device, no_worse, shape, dtype):
    inputs = problem(*SHAPES[shape], dtype, device)
    scale, longest = inputs[0].shape[-1] ** -0.5, max(SHAPES[shape][-1])
    exact = plain(*(x.double() for x in inputs[:3]), inputs[3], scale, None)
    theirs = plain(*(x.float() for x in inputs[:3]), inputs[3], scale, None).to(dtype)
    ours = decode_attention(*inputs, longest=longest)
    assert ours.dtype == dtype
    no_worse(ours, theirs, exact)


# one place, inside a share, its edge, more than there is
@pytest.mark.parametrize("window", [1, 40, 512, 600, 5000])
def test_a_window_shows_the_last_keys_only(backend, device, window):
    *inputs, lengths = problem(*SHAPES["shares"], torch.float32, device)
    inputs = [*inputs, lengths.clamp(max=900)]
    exact = plain(*(x.double() for x in inputs[:3]), inputs[3], 0.3, window)
    few = decode_attention(*inputs, scale=0.3, window=window, longest=900)
    torch.testing.assert_close(few.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        decode_attention(*inputs, scale=0.3, window=window).double(), exact, rtol=1e-5, atol=1e-6
    )


def test_the_host_s_bound_changes_no_bit(backend, device):
    """Fewer programs on a GPU, the same sums: a graph is captured for more keys than its slots have yet."""
    query, keys, values, lengths = problem(3, 4, 2, 1100, 16, [9, 300, 512], torch.float32, device)
    everything = decode_attention(query, keys, values, lengths)
    assert torch.equal(everything, decode_attention(query, keys, values, lengths, longest=700))
    # one share alone is not combined with others: the same to rounding
    torch.testing.assert_close(everything, decode_attention(query, keys, values, lengths, longest=512))


def test_a_cache_is_read_where_it_lies(backend, device):
    """Slots as (R, S, Hk, d), every second of them, keys apart from values."""
    query, keys, values, lengths = problem(3, 4, 2, 50, 24, [50, 8, 0], torch.float32, device)
    want = decode_attention(query, keys, values, lengths)
    turned = keys.transpose(1, 2).contiguous().transpose(1, 2)
    spread = torch.full((8, 2, 60, 24), NAN, device=device)[::2, :, 5:55]
    spread.copy_(values)
    torch.testing.assert_close(decode_attention(query, turned, spread, lengths), want, rtol=1e-5, atol=1e-6)
    narrow = torch.stack([keys, keys], -1)[..., 0]  # numbers that are not neighbours
    torch.testing.assert_close(decode_attention(query, narrow, values, lengths.int()), want, rtol=1e-5, atol=1e-6)


def test_values_may_be_narrower_or_wider_than_keys(backend, device):
    """As where attention is of low rank: 24 numbers to compare by, 40 to add up, or 8."""
    query, keys, values, lengths = problem(3, 4, 2, 50, 24, [50, 8, 0], torch.float32, device)
    values = torch.cat([values, values.flip(-1)], -1)
    for width in (40, 8):
        exact = plain(*(x.double() for x in (query, keys, values[..., :width])), lengths, 24**-0.5, None)
        out = decode_attention(query, keys, values[..., :width], lengths)
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_few_sequences(backend, device, count):
    query, keys, values, lengths = problem(2, 2, 1, 12, 8, [5, 12], torch.float32, device)
    out = decode_attention(query[:count], keys, values, lengths[:count])
    torch.testing.assert_close(out, decode_attention(query, keys, values, lengths)[:count], rtol=1e-5, atol=1e-6)


def test_large_scores_do_not_overflow(backend, device):
    """e^300 is infinite in float32; the largest score alone decides."""
    query, keys = torch.full((1, 1, 1), 300.0, device=device), torch.tensor([[1.0], [-1.0], [0.9]], device=device)
    values = torch.tensor([[1.0], [2.0], [3.0]], device=device)
    out = decode_attention(query, keys[None, None], values[None, None], torch.tensor([3], device=device))
    torch.testing.assert_close(out.cpu(), torch.ones(1, 1, 1))


def test_a_nan_in_sight_reaches_the_result_of_its_sequence_only(backend, device):
    query, keys, values, lengths = problem(2, 2, 1, 12, 8, [5, 12], torch.float32, device)
    keys[0, 0, 2, 3] = NAN
    out = decode_attention(query, keys, values, lengths)
    assert out[0].isnan().all() and out[1].isfinite().all()


def test_no_gradient_is_promised():
    query, keys, values, lengths = problem(2, 2, 1, 12, 8, [5, 12], torch.float32, "cpu")
    assert not decode_attention(query.requires_grad_(), keys, values, lengths).requires_grad


def test_float64_runs_on_the_reference():
    inputs = problem(*SHAPES["grouped, odd width, one empty"], torch.float64, "cpu")
    torch.testing.assert_close(decode_attention(*inputs), plain(*inputs, 20**-0.5, None), rtol=1e-12, atol=1e-12)


def test_what_does_not_fit_is_refused():
    query, keys, values, lengths = problem(2, 4, 2, 12, 8, [5, 12], torch.float32, "cpu")
    for bad, message in (
        ((query[0], keys, values, lengths), "query must be"),
        ((query, keys, values[:, :, 1:], lengths), "query must be"),
        ((query[:, :3], keys, values, lengths), "3 heads .* does not fit keys of 3 sequences, 2 heads"),
        ((query[..., :4], keys, values, lengths), "4 numbers does not fit"),
        ((query.repeat(2, 1, 1), keys, values, lengths.repeat(2)), "4 sequences"),
        ((query, keys, values, lengths[:1]), "lengths must be 2 integers"),
        ((query, keys, values, lengths.float()), "lengths must be 2 integers"),
        ((query.half(), keys, values, lengths), "share a float type"),
        ((query, keys, values, lengths.to("meta")), "lengths is on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(*bad)
    for name in ("window", "longest"):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
            decode_attention(query, keys, values, lengths, **{name: 0})
    with use_backend("cpu,reference"), pytest.raises(ValueError, match=r"in \[0, 6\], and entry 1 is 12"):
        pytest.importorskip("rlhf_fast._C")
        decode_attention(query, keys, values, lengths, longest=6)
