"""linear_logprobs and linear_cross_entropy on drawn shapes, strides, dtypes and edge values, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st

from rlhf_fast.kernels import linear_cross_entropy, linear_logprobs
from rlhf_fast.kernels.linear_logprobs import chunked
from tests.kernels.properties.problems import DTYPES, INF, LAYOUTS, NAN, Case, laid_out
from tests.kernels.properties.test_logprobs import log_probabilities

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NaN and log(0) in its interpreter
EDGES = ("masked words", "masked label", "confident", "NaN row", "NaN at ignored", "all ignored", "zero upstream")
# a loss with a NaN row or an impossible label is NaN or infinite altogether
LOSS_EDGES = ("masked words", "confident", "NaN at ignored", "all ignored", "zero upstream")
ADAPTERS = ([], ["x", "b"], ["b"], ["x"])
TRAINED = (["hidden"], ["hidden", "weight"], ["hidden", "weight", "bias"], ["weight"], ["bias"], ["hidden", "bias"])


class Head:
    """Hidden states, head, labels and options of one case."""

    def __init__(self, case: Case):
        self.case = case
        self.shape, self.width = case.pick((7,), (3,), (2, 4), (8,), (1,), (0,)), case.pick(5, 1, 16)
        self.vocab_size, self.ignored = case.pick(17, 43, 5, 2, 1), case.pick(-100, 0)
        self.rank = case.pick(None, 3, None, 1)
        self.trained = case.pick(*TRAINED) + (case.pick(*ADAPTERS) if self.rank else [])
        self.options = {
            "temperature": case.pick(1.0, 0.7, 1.6),
            "softcap": case.pick(None, 30.0 if "confident" in case.edges else 3.0),
            "logit_scale": case.pick(1.0, 0.5, 1.5),
            "chunk_size": case.pick(None, 2, 3),
        }
        self.recompute = case.pick(False, True)
        self.row_gradients: torch.Tensor | None = None  # d loss / d raw logits in float64, once known
        self.rounded, self.magnified = 1.0, 0.0  # the largest logit; 1 / sum of the weights of a weighted mean
        self.labels = torch.randint(self.vocab_size, self.shape, generator=case.generator)
        self.labels[case.flips(*self.shape, share=1.0 if "all ignored" in case.edges else 0.3)] = self.ignored
        self.keep = self.labels != self.ignored
        self.tensors = self.operands(case.pick(*DTYPES))
        self.labels, self.keep = self.labels.to(case.device), self.keep.to(case.device)
        case.note(trained="+".join(self.trained), V=self.vocab_size, rows=self.labels.numel())
        case.note(rank=self.rank, chunks=self.options["chunk_size"], softcap=self.options["softcap"] is not None)

    def operands(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        case = self.case
        hidden, weight = case.normal(*self.shape, self.width), case.normal(self.vocab_size, self.width)
        bias = case.normal(self.vocab_size) if "bias" in self.trained or case.pick(True, False) else None
        layout = case.pick(*LAYOUTS)
        rows = hidden.view(-1, self.width)
        if "confident" in case.edges and rows.numel() and layout != "expanded":
            own = weight[torch.where(self.keep, self.labels, 0).view(-1)[:2]]
            rows[:2] = 25 * own / own.square().sum(1, keepdim=True).clamp(min=0.5)
        if "masked words" in case.edges and bias is not None:
            bias[: self.vocab_size // 2] = -INF
            if "masked label" not in case.edges:
                self.labels[self.keep] = self.vocab_size - 1
                self.keep = self.labels != self.ignored
        if layout != "expanded":
            if "NaN at ignored" in case.edges:
                hidden[~self.keep] = NAN
            # the gradient of a head sums over rows, and a NaN with it
            if "NaN row" in case.edges and self.trained == ["hidden"]:
                rows[-1:] = NAN
        case.note(dtype=dtype, stride=layout)
        adapter = self.adapter(dtype, layout) if self.rank else {}
        tensors = {"hidden": laid_out(hidden.to(dtype).to(case.device), layout)}
        tensors["weight"] = laid_out(weight.to(dtype).to(case.device), case.pick("contiguous", "transposed", "sliced"))
        tensors |= {} if bias is None else {"bias": bias.to(dtype).to(case.device)}
        return tensors | adapter

    def adapter(self, dtype: torch.dtype, layout: str) -> dict[str, torch.Tensor]:
        """x and B: numbers of the head's dtype, which they are multiplied in, held in it or in float32."""
        case = self.case
        x, b = case.normal(*self.shape, self.rank), case.normal(self.vocab_size, self.rank)
        if "NaN at ignored" in case.edges and layout != "expanded":
            x[~self.keep] = NAN
        held = case.pick(dtype, torch.float32)
        case.note(adapter=held)
        x, b = (t.to(dtype).to(held).to(case.device) for t in (x, b))
        return {"x": laid_out(x, layout), "b": laid_out(b, case.pick("contiguous", "transposed", "sliced"))}

    def log_probabilities(self, hidden, weight, bias=None, x=None, b=None):
        """The definition."""
        hidden = torch.where(self.keep[..., None], hidden, 0.0)
        raw = hidden @ weight.T + (0.0 if bias is None else bias)
        if x is not None:
            raw = raw + torch.where(self.keep[..., None], x, 0.0).to(hidden.dtype) @ b.to(hidden.dtype).T
        if raw.requires_grad and raw.dtype == torch.float64:
            raw.register_hook(lambda gradient: setattr(self, "row_gradients", gradient))
        z = raw * self.options["logit_scale"]
        softcap = self.options["softcap"]
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return log_probabilities(z / self.options["temperature"], self.labels, self.keep)

    def rounded_products(self) -> dict[str, float]:
        """Gradients of 16-bit operands are products with rows rounded to 16 bits, as the GEMMs of a GPU take them.

        That is half an ulp of each product at most: sum_v |dz_tv W_vd| for hidden, sum_t |dz_tv h_td| for the weight,
        whose other factor, g_t h_t, is rounded as well. Plain PyTorch has the same bound, but in a case of a few
        numbers its roundings may happen to cancel. Float32 adapters are multiplied in 16 bits all the same.
        """
        dtype = self.tensors["hidden"].dtype
        # of a weighted mean L the gradient is (l_t - L) / sum(w): losses that cancel, magnified where the sum is small
        losses = {"weights": 4 * (2 * self.rounded + math.log(self.vocab_size)) * self.magnified}
        if self.row_gradients is None or dtype == torch.float32:
            return losses
        # a row that is NaN is compared as such
        rows = self.row_gradients.abs().nan_to_num(nan=0.0).view(-1, self.vocab_size)
        products = {"bias": rows.sum(0)}
        for name, matrix in (("hidden", "weight"), ("x", "b")):
            if name in self.tensors:
                x = torch.where(self.keep[..., None], self.tensors[name].double(), 0.0).abs()
                ulps = torch.finfo(dtype).eps / torch.finfo(self.tensors[name].dtype).eps
                products[name] = ulps * rows @ self.tensors[matrix].double().abs()
                products[matrix] = 2 * ulps * rows.T @ x.reshape(len(rows), x.shape[-1])
        return losses | {name: x.max().item() if x.numel() else 0.0 for name, x in products.items()}

    def fused(self, function, hidden, weight, bias=None, x=None, b=None, **options):
        if x is not None:
            options["low_rank"] = x, b
        with pytest.MonkeyPatch.context() as patch:
            if self.recompute:
                patch.setattr(chunked, "kept_bytes", lambda device: 0)
            return function(
                hidden, weight, self.labels, bias=bias, ignore_index=self.ignored, **self.options, **options
            )

    def problem(self, call, formula, inputs, trained):
        z = self.tensors["hidden"].double().nan_to_num() @ self.tensors["weight"].double().T
        if self.rank:
            z = z + self.tensors["x"].double().nan_to_num() @ self.tensors["b"].double().T
        largest = max(1.0, z.abs().max().item() if z.numel() else 0.0) * self.options["logit_scale"]
        zero = "zero upstream" in self.case.edges and "NaN row" not in self.case.edges
        self.rounded = max(1.0, largest / self.options["temperature"])
        tolerance = {"plain_in_16_bits": True, "rounded": self.rounded, "rounded_products": self.rounded_products}
        return self.case.problem(call, formula, inputs, trained, zero_upstream=zero, **tolerance)


@st.composite
def logprob_problems(draw, device):
    case = Case(draw, device, EDGES)
    head, entropy = Head(case), case.pick(False, True, "detached")
    case.note(entropy=entropy, recompute=head.recompute)

    def call(**tensors):
        result = head.fused(linear_logprobs, **tensors, entropy=entropy)
        return result if entropy else (result,)

    def formula(**tensors):
        logprobs, row_entropy = head.log_probabilities(**tensors)
        return {False: (logprobs,), True: (logprobs, row_entropy)}.get(entropy, (logprobs, row_entropy.detach()))

    return head.problem(call, formula, head.tensors, head.trained)


def test_linear_logprobs(explore):
    explore(logprob_problems, *EDGES, "p_y > 0.999")


@st.composite
def cross_entropy_problems(draw, device):
    case = Case(draw, device, LOSS_EDGES)
    head, reduction = Head(case), case.pick("mean", "sum", "none")
    weighted = case.pick("no", "fixed", "trained")
    case.note(reduction=reduction, weights=weighted)
    inputs, trained = dict(head.tensors), list(head.trained)
    if weighted != "no":
        weights = case.normal(*head.shape).abs().to(device)
        weights[~head.keep] = NAN
        inputs["weights"] = weights
        trained += ["weights"] if weighted == "trained" else []
        if reduction == "mean" and head.keep.any():
            head.magnified = 1.0 / weights[head.keep].sum().item()

    def call(weights=None, **tensors):
        return (head.fused(linear_cross_entropy, **tensors, weights=weights, reduction=reduction),)

    def formula(weights=None, **tensors):
        loss = -head.log_probabilities(**tensors)[0]
        factor = torch.where(head.keep, torch.ones_like(loss) if weights is None else weights.to(loss.dtype), 0.0)
        if reduction == "none":
            return (factor * loss,)
        total = factor.sum() if reduction == "mean" and head.keep.any() else 1.0
        return ((factor * loss).sum() / total,)

    return head.problem(call, formula, inputs, trained)


def test_linear_cross_entropy(explore):
    explore(cross_entropy_problems, *LOSS_EDGES)
