"""Seeded mistakes in the kernels, as data: each changes one line, and the named tests must notice.

``test_mutants.py`` applies them one at a time to a copy of the project. A text must occur exactly once in its file, so
that a rewritten kernel brings its mutants along.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    killers: tuple[str, ...]  # pytest node ids under tests/kernels, any of which must fail


P = "properties/"
TOKENS, HEAD = P + "test_logprobs.py::test_token_logprobs", P + "test_linear_logprobs.py::test_linear_logprobs"
CROSS_ENTROPY = P + "test_linear_logprobs.py::test_linear_cross_entropy"
SEQUENCES = P + "test_logprobs.py::test_sequence_logprobs"
GAE, SHAPED = P + "test_advantages.py::test_gae", P + "test_advantages.py::test_shaped_rewards"
KL_GAE, WHITEN = P + "test_advantages.py::test_kl_shaped_gae", P + "test_advantages.py::test_whiten"
GROUPS, KL = P + "test_advantages.py::test_group_advantages", P + "test_losses.py::test_kl_penalty"
POLICY, VALUE = P + "test_losses.py::test_policy_loss", P + "test_losses.py::test_value_loss"
DPO, PAIRS = P + "test_losses.py::test_dpo_loss", P + "test_losses.py::test_pairwise_reward_loss"
RANKED = P + "test_losses.py::test_ranked_reward_loss"


def on(backend: str, *tests: str) -> tuple[str, ...]:
    return tuple(f"{test}[{backend}]" for test in tests)


PYTHON = (
    # log-probabilities: the reference
    Mutant(
        "temperature dropped from backward",
        "kernels/logprobs/reference.py",
        "        return 1.0 / temperature",
        "        return 1.0",
        on("reference", TOKENS),
    ),
    Mutant(
        "softcap slope dropped",
        "kernels/logprobs/reference.py",
        "(1.0 - torch.tanh(promote(logits) / softcap).square()) / temperature",
        "torch.ones_like(promote(logits)) / temperature",
        on("reference", TOKENS),
    ),
    Mutant(
        "gradient of ignored rows not zeroed",
        "kernels/logprobs/reference.py",
        "out.copy_(torch.where(keep[:, None], d_z, 0.0))",
        "out.copy_(d_z)",
        on("reference", TOKENS),
    ),
    Mutant(
        "sign of the entropy's gradient",
        "kernels/logprobs/reference.py",
        "d_z -= grad_entropy[:, None]",
        "d_z += grad_entropy[:, None]",
        on("reference", TOKENS),
    ),
    Mutant(
        "log-sum-exp in float32",
        "kernels/logprobs/reference.py",
        "[:, None], offset.double() + log_sum",
        "[:, None], (offset + log_sum.float()).double()",
        on("reference", TOKENS),
    ),
    Mutant(
        "p log p at p = 0 not selected",
        "kernels/logprobs/reference.py",
        "-torch.where(p == 0, 0.0, p * log_p).sum(-1)",
        "-(p * log_p).sum(-1)",
        on("reference", TOKENS),
    ),
    Mutant(
        "gradient overwrites rows that share memory",
        "kernels/logprobs/__init__.py",
        "not _rows_overlap(logits)",
        "True",
        on("reference", TOKENS),
    ),
    Mutant(
        "average over all tokens, masked ones too",
        "kernels/logprobs/__init__.py",
        "sequence_sum(mask.to(x.dtype), cu_seqlens)",
        "sequence_sum(torch.ones_like(x), cu_seqlens)",
        on("reference", SEQUENCES),
    ),
    # the fused head
    Mutant(
        "upstream gradient of the first token for all",
        "kernels/linear_logprobs/__init__.py",
        "[(g[:, None], vectors[i]) for",
        "[(g[:1, None], vectors[i]) for",
        on("reference", HEAD),
    ),
    Mutant(
        "weights multiplied by the mask",
        "kernels/linear_logprobs/__init__.py",
        "torch.where(keep, weights.to(dtype), 0.0)",
        "keep * weights.to(dtype)",
        on("reference", CROSS_ENTROPY),
    ),
    Mutant(
        "mean over tokens, not over their weights",
        "kernels/linear_logprobs/__init__.py",
        "total = factor.sum()",
        "total = (labels != ignore_index).sum()",
        on("reference", CROSS_ENTROPY),
    ),
    Mutant(
        "logits rounded to 16 bits",
        "kernels/linear_logprobs/chunked.py",
        "return out if self.bias is None else out.add_(self.bias)",
        "return (out if self.bias is None else out.add_(self.bias)).to(self.dtype).to(self.work)",
        on("reference", HEAD),
    ),
    Mutant(
        "logit scale missing in the gradient",
        "kernels/logprobs/reference.py",
        "logits, grad_logprobs = logits * logit_scale, grad_logprobs * logit_scale",
        "logits = logits * logit_scale",
        on("reference", HEAD),
    ),
    Mutant(
        "gradient of the head from the last chunk only",
        "kernels/linear_logprobs/chunked.py",
        "self._multiply(total[slab], left, x, first)",
        "self._multiply(total[slab], left, x, True)",
        on("reference", HEAD),
    ),
    Mutant(
        "low-rank logits in the place of the head's",
        "kernels/linear_logprobs/chunked.py",
        "self._wide(matrix[slab]).t(), first=i == 0)",
        "self._wide(matrix[slab]).t(), first=True)",
        on("reference", HEAD),
    ),
    Mutant(
        "gradient of the head without the upstream gradient",
        "kernels/linear_logprobs/chunked.py",
        "x = x[group] if grad is None else grad * x[group]",
        "x = x[group]",
        on("reference", HEAD),
    ),
    Mutant(
        "gradient of float32 adapters rounded as the head's",
        "kernels/linear_logprobs/chunked.py",
        "gemm.dtype if alone and x.dtype == gemm.dtype else gemm.work",
        "gemm.dtype if alone else gemm.work",
        ("test_linear_logprobs.py::test_float32_adapters_get_unrounded_gradients_from_a_16_bit_head",),
    ),
    Mutant(
        "hidden states of ignored rows multiplied by 0",
        "kernels/linear_logprobs/chunked.py",
        "torch.where(self.labelled[group], x, 0.0)",
        "(self.labelled[group] * x)",
        ("test_linear_logprobs.py::test_ignored_rows_are_never_read",),
    ),
    # advantages
    Mutant(
        "lambda in the place of gamma",
        "kernels/advantages/reference.py",
        "delta = rewards[:, t] + gamma * next_value - values[:, t]",
        "delta = rewards[:, t] + lam * next_value - values[:, t]",
        on("reference", GAE),
    ),
    Mutant(
        "bootstrap ignored",
        "kernels/advantages/reference.py",
        "next_value = advantage if bootstrap is None else bootstrap",
        "next_value = advantage",
        on("reference", GAE),
    ),
    Mutant(
        "carry not reset between packed sequences",
        "kernels/advantages/reference.py",
        ".masked_fill(last, 0.0)",
        "",
        on("reference", GAE),
    ),
    Mutant(
        "masked token multiplied instead of skipped",
        "kernels/advantages/reference.py",
        "advantage = torch.where(keep, delta + gamma * lam * advantage, advantage)",
        "advantage = keep * (delta + gamma * lam * advantage) + ~keep * advantage",
        on("reference", GAE),
    ),
    Mutant(
        "eps outside the root",
        "kernels/advantages/reference.py",
        "torch.rsqrt(centred.square().sum() / count + eps)",
        "(1 / ((centred.square().sum() / count).sqrt() + eps))",
        on("reference", WHITEN),
    ),
    Mutant(
        "scores not clipped",
        "kernels/advantages/reference.py",
        "scores = scores.clamp(-clip, clip)",
        "scores = scores.clamp(max=clip)",
        on("reference", SHAPED),
    ),
    Mutant(
        "Bessel's correction dropped",
        "kernels/advantages/reference.py",
        "(total(centred.square()) / (n - 1).clamp(min=1)).sqrt()",
        "(total(centred.square()) / n.clamp(min=1)).sqrt()",
        on("reference", GROUPS),
    ),
    Mutant(
        "unscored responses counted in the baseline",
        "kernels/advantages/reference.py",
        "n = total(scored.double())",
        "n = total(torch.ones_like(r))",
        on("reference", GROUPS),
    ),
    Mutant(
        "returns from whitened advantages",
        "kernels/advantages/__init__.py",
        "return advantages, returns, rewards, kl",
        "return advantages, advantages + select(values, mask), rewards, kl",
        on("reference", KL_GAE),
    ),
    # losses
    Mutant(
        "k3 of the reversed ratio",
        "kernels/kl/reference.py",
        "return torch.expm1(d) - d",
        "return torch.expm1(-d) + d",
        on("reference", KL),
    ),
    Mutant(
        "k3+ with k3's gradient",
        "kernels/kl/reference.py",
        "return _k3(d).detach() + (k2 - k2.detach())",
        "return _k3(d) + 0 * k2",
        on("reference", KL),
    ),
    Mutant(
        "clip_high ignored",
        "kernels/policy/reference.py",
        "ratio.clamp(1 - low, 1 + high)",
        "ratio.clamp(1 - low, 1 + low)",
        on("reference", POLICY),
    ),
    Mutant(
        "dual clip for good actions",
        "kernels/policy/reference.py",
        "torch.where(advantages < 0, torch.minimum",
        "torch.where(advantages > 0, torch.minimum",
        on("reference", POLICY),
    ),
    Mutant(
        "gradient through cispo's weight",
        "kernels/policy/reference.py",
        "-ratio.clamp(max=high).detach() * advantages",
        "-ratio.clamp(max=high) * advantages",
        on("reference", POLICY),
    ),
    Mutant(
        "GSPO's mean over T, not over unmasked tokens",
        "kernels/policy/reference.py",
        "counts = sequence_sum(mask.to(log_ratio.dtype), cu_seqlens)",
        "counts = sequence_sum(torch.ones_like(log_ratio), cu_seqlens)",
        on("reference", POLICY),
    ),
    Mutant(
        "importance weights not truncated",
        "kernels/policy/reference.py",
        "loss * is_ratio.clamp(max=o.is_clip)",
        "loss * is_ratio",
        on("reference", POLICY),
    ),
    Mutant(
        "sign of the entropy bonus",
        "kernels/policy/reference.py",
        "loss = loss - o.entropy_coef * entropy",
        "loss = loss + o.entropy_coef * entropy",
        on("reference", POLICY),
    ),
    Mutant(
        "smaller of the two value errors",
        "kernels/policy/reference.py",
        "torch.maximum(error, clipped)",
        "torch.minimum(error, clipped)",
        on("reference", VALUE),
    ),
    Mutant(
        "denominator ignored",
        "rlhf_fast/kernels/segments.py",
        "total / (local if denominator is None else denominator)",
        "total / local",
        on("reference", POLICY),
    ),
    Mutant(
        "masked entries multiplied by 0",
        "rlhf_fast/kernels/segments.py",
        "return torch.where(mask, promote(x), 0.0)",
        "return promote(x) * mask",
        on("reference", POLICY),
    ),
    Mutant(
        "empty sequences in the mean",
        "rlhf_fast/kernels/segments.py",
        "local = (counts > 0).sum().clamp(min=1)",
        "local = max(len(counts), 1)",
        on("reference", POLICY),
    ),
    Mutant(
        "robust DPO without its normaliser",
        "kernels/preference/reference.py",
        "+ eps * logsigmoid(-d)) / (1 - 2 * eps)",
        "+ eps * logsigmoid(-d))",
        on("reference", DPO),
    ),
    Mutant(
        "margin added",
        "kernels/reward/reference.py",
        "chosen - rejected - margin",
        "chosen - rejected + margin",
        on("reference", PAIRS),
    ),
    Mutant(
        "masked responses stay in the ranking",
        "kernels/reward/reference.py",
        "remaining = later & (mask[:, None, :] | itself)",
        "remaining = later | itself",
        on("reference", RANKED),
    ),
)

TRITON = (
    Mutant(
        "end of the row not masked",
        "kernels/logprobs/triton_impl.py",
        'u = tl.where(column < vocab_size, u, float("-inf"))',
        "u = u + 0.0",
        on("triton", TOKENS),
    ),
    Mutant(
        "temperature dropped from backward",
        "kernels/logprobs/triton_impl.py",
        'at_label * slope, float("nan"))',
        'at_label, float("nan"))',
        on("triton", TOKENS),
    ),
    Mutant(
        "softcap slope dropped",
        "kernels/logprobs/triton_impl.py",
        "d_x *= 1.0 - u * u",
        "d_x *= 1.0 + 0.0 * u",
        on("triton", TOKENS),
    ),
    Mutant(
        "tiles' entropies added without moving their maximum",
        "kernels/logprobs/triton_impl.py",
        "moments = decay * (moments + tl.maximum(shift, -126.0) * totals)",
        "moments = decay * moments",
        on("triton", TOKENS),
    ),
    Mutant(
        "log-sum-exp in float32",
        "kernels/logprobs/triton_impl.py",
        "(peak + log_total.to(tl.float64))",
        "(peak + log_total.to(tl.float64)).to(tl.float32)",
        on("triton", TOKENS) + on("triton", "test_logprobs.py::test_gradient_of_confident_tokens_keeps_its_digits"),
    ),
    Mutant(
        "probability rounded before the label's 1 - p",
        "kernels/linear_logprobs/triton_impl.py",
        "at_label = slope * ((total - tl.exp2(distance(u_label, top, outer))) / total)",
        "at_label = slope * (1.0 - (tl.exp2(distance(u_label, top, outer)) / total).to(tl.bfloat16).to(tl.float32))",
        on("triton", HEAD),
    ),
    Mutant(
        "logit scale missing in the gradient",
        "kernels/linear_logprobs/triton_impl.py",
        "        slope = outer * _LN_2\n",
        "        slope = 1.0\n",
        on("triton", HEAD),
    ),
    Mutant(
        "masked token discounts the carry",
        "kernels/advantages/triton_impl.py",
        "slope = tl.where(keep, gamma * lam, 1.0)",
        "slope = gamma * lam + tl.where(keep, 0.0, 0.0)",
        on("triton", GAE),
    ),
    Mutant(
        "carry of the later block lost",
        "kernels/advantages/triton_impl.py",
        "carry = tl.sum(tl.where(lane == 0, leaving, 0.0), 0)",
        "carry = 0.0 * tl.sum(tl.where(lane == 0, leaving, 0.0), 0)",
        on("triton", GAE) + ("test_advantages.py::test_gae_matches_the_loop",),
    ),
    Mutant(
        "variance of two blocks without the distance of their means",
        "kernels/advantages/triton_impl.py",
        "square + square2 + d * d * count * part",
        "square + square2",
        on("triton", KL_GAE),
    ),
    Mutant(
        "whitening with Bessel's correction",
        "kernels/advantages/triton_impl.py",
        "tl.sqrt_rn(square / tl.maximum(count, 1.0) + eps)",
        "tl.sqrt_rn(square / tl.maximum(count - 1.0, 1.0) + eps)",
        on("triton", WHITEN),
    ),
    Mutant(
        "group deviation without Bessel's correction",
        "kernels/advantages/triton_impl.py",
        "advantage /= tl.sqrt(square / tl.maximum(count - 1.0, 1.0)) + 1e-4",
        "advantage /= tl.sqrt(square / tl.maximum(count, 1.0)) + 1e-4",
        on("triton", GROUPS),
    ),
    Mutant(
        "sequence average over masked tokens too",
        "kernels/logprobs/triton_impl.py",
        "        count += keep.to(tl.float32)",
        "        count += 1.0 + 0.0 * keep.to(tl.float32)",
        on("triton", SEQUENCES),
    ),
    Mutant(
        "cispo's weight not truncated",
        "kernels/policy/triton_impl.py",
        "direct = -tl.where(ratio > upper, upper, ratio) * advantage",
        "direct = -ratio * advantage",
        on("triton", POLICY),
    ),
    Mutant(
        "dual clip keeps its gradient",
        "kernels/policy/triton_impl.py",
        "through = tl.where((clipped < unclipped) | too_large | dual, 0.0, -unclipped)",
        "through = tl.where((clipped < unclipped) | too_large, 0.0, -unclipped)",
        on("triton", POLICY),
    ),
    Mutant(
        "gradient of the sequence ratio not shared out",
        "kernels/policy/triton_impl.py",
        "through_sum * share / tokens,",
        "through_sum * share,",
        on("triton", POLICY),
    ),
    Mutant(
        "gradient of clipped values",
        "kernels/policy/triton_impl.py",
        "slope = tl.where(clipped, 0.0, used)",
        "slope = used",
        on("triton", VALUE),
    ),
    Mutant(
        "upstream gradient of the loss ignored",
        "kernels/policy/triton_impl.py",
        "scale = tl.load(grad_ptr) * tl.load(figures_ptr)",
        "scale = tl.load(figures_ptr) + 0.0 * tl.load(grad_ptr)",
        on("triton", POLICY),
    ),
    Mutant(
        "cancelling k3",
        "kernels/kl/triton_impl.py",
        "expm1, value = expm1_and_k3(d)\n        slope = -d",
        "value = tl.exp(d) - 1.0 - d\n        slope = -d",
        on("triton", KL),
    ),
    Mutant(
        "label smoothing missing in robust DPO's gradient",
        "kernels/preference/triton_impl.py",
        "slope = -beta * inverse * ((1.0 - smoothing) * lose + smoothing * win)",
        "slope = -beta * inverse * (1.0 - smoothing) * lose + 0.0 * win",
        on("triton", DPO),
    ),
    Mutant(
        "pull to the centre missing in the gradient",
        "kernels/reward/triton_impl.py",
        "lose, pull = sigmoid(-d), 2.0 * center * both",
        "lose, pull = sigmoid(-d), 0.0 * both",
        on("triton", PAIRS),
    ),
)

NATIVE = (
    Mutant(
        "temperature dropped from backward",
        "csrc/head.h",
        "      static_cast<float>(head.logit_scale * inverse_temperature),",
        "      head.logit_scale,",
        on("cpu", TOKENS),
    ),
    Mutant(
        "sign of the entropy's gradient",
        "csrc/head.h",
        "static_cast<float>(slope * (-up.logprob_gradient - up.entropy_gradient * up.entropy)),",
        "static_cast<float>(slope * (-up.logprob_gradient + up.entropy_gradient * up.entropy)),",
        on("cpu", TOKENS),
    ),
    Mutant(
        "1 - p without expm1",
        "csrc/head.h",
        "-up.logprob_gradient * __builtin_expm1(logprob)",
        "-up.logprob_gradient * (static_cast<float>(p) - 1.0f)",
        ("test_native.py::test_a_certain_token_keeps_the_digits_of_one_minus_p",),
    ),
    Mutant(
        "label's own gradient rounded with the others",
        "csrc/cpu/logprobs.cpp",
        "      out[label - begin] = at_label;",
        "      out[label - begin] += static_cast<float>(up.logprob_gradient);",
        on("cpu", TOKENS),
    ),
    Mutant(
        "softcap slope dropped",
        "csrc/math.h",
        "return (1.0f - t) * (1.0f + t);",
        "return 1.0f + 0.0f * t;",
        on("cpu", TOKENS),
    ),
    Mutant(
        "masked words make the entropy NaN",
        "csrc/math.h",
        "  const float d = (x - shift) * scale_log2;\n  return d < EXP2_FLOOR ? EXP2_FLOOR : d;",
        "  const float d = (x - shift) * scale_log2;\n  return d;",
        on("cpu", TOKENS),
    ),
    Mutant(
        "ignored rows not zeroed",
        "csrc/cpu/logprobs.cpp",
        "    if (label == head.ignore_index || (logprob_gradient == 0.0f && entropy_gradient == 0.0f)) {",
        "    if (logprob_gradient == 0.0f && entropy_gradient == 0.0f) {",
        on("cpu", TOKENS),
    ),
    Mutant(
        "mask multiplied",
        "csrc/cpu/gae.cpp",
        "offset[i] = mask[i] ? map.offset : identity.offset;",
        "offset[i] = map.offset * mask[i] + identity.offset;",
        on("cpu", GAE),
    ),
    Mutant(
        "bootstrap ignored",
        "csrc/cpu/gae.cpp",
        "bootstrap ? bootstrap[row] : 0.0f;",
        "bootstrap ? 0.0f : 0.0f;",
        on("cpu", GAE),
    ),
    Mutant(
        "gamma and lambda swapped",
        "csrc/math.h",
        "return {gamma * lam, fused(lam, reward - value, value)};",
        "return {gamma * lam, fused(gamma, reward - value, value)};",
        on("cpu", GAE),
    ),
    Mutant(
        "clipped ratio keeps its gradient",
        "csrc/losses.h",
        "const float slope = clipped < unclipped ? 0.0f : -unclipped;",
        "const float slope = -unclipped;",
        on("cpu", POLICY),
    ),
    Mutant(
        "gradient of clipped values",
        "csrc/losses.h",
        "clipped_square > square ? 0.0f : error,",
        "error,",
        on("cpu", VALUE),
    ),
    Mutant(
        "k3+ with k3's gradient",
        "csrc/losses.h",
        "return {k3_of(d, minus_one), -d};",
        "return {k3_of(d, minus_one), -minus_one};",
        on("cpu", POLICY),
    ),
    Mutant(
        "sequence means are sums",
        "csrc/cpu/policy.cpp",
        "? 1.0f / static_cast<float>(count) : 1.0f;",
        "? 1.0f + 0.0f * static_cast<float>(count) : 1.0f;",
        on("cpu", POLICY),
    ),
)

DECODE, DECODE_ALL = "test_attention.py::test_values_are_no_worse_than_plain_pytorch", "test_attention.py"
ATTENTION = (
    Mutant(
        "the place behind the last key is seen",
        "kernels/attention/reference.py",
        "(column < end) &",
        "(column <= end) &",
        (DECODE,),
    ),
    Mutant(
        "unseen values multiplied, not selected",
        "kernels/attention/reference.py",
        "shown = torch.where(seen.transpose(2, 3), promote(values), 0.0)",
        "shown = promote(values)",
        (DECODE,),
    ),
    Mutant(
        "a window one key too wide",
        "kernels/attention/triton_impl.py",
        "first = tl.maximum(length - window, 0)",
        "first = tl.maximum(length - window - 1, 0)",
        (DECODE_ALL,),
    ),
    Mutant(
        "earlier keys do not fade",
        "kernels/attention/triton_impl.py",
        "total = total * faded + tl.sum(weights, 1)",
        "total = total + tl.sum(weights, 1)",
        (DECODE,),
    ),
    Mutant(
        "shares are added without their weights",
        "kernels/attention/triton_impl.py",
        "mask=inside, other=0.0) * weight",
        "mask=inside, other=0.0)",
        (DECODE,),
    ),
    Mutant(
        "the missing keys of the last four count",
        "csrc/cpu/attention.cpp",
        "mine[j] = 0.0f;",
        "mine[j] = 1.0f;",
        on("cpu", DECODE),
    ),
    Mutant(
        "the result does not fade when the maximum rises",
        "csrc/cpu/attention.cpp",
        "multiply(state.result + q * WIDEST, width, faded);",
        "multiply(state.result + q * WIDEST, width, 1.0f);",
        on("cpu", DECODE),
    ),
    Mutant(
        "every query head reads the first key head",
        "csrc/cpu/attention.cpp",
        "row * cache.row_stride + head * cache.head_stride",
        "row * cache.row_stride + 0 * head * cache.head_stride",
        on("cpu", DECODE),
    ),
)

NORM, NORM_EDGES = "test_norm.py::test_values_and_gradients_are_no_worse_than_plain_pytorch", "test_norm.py"
MLP, LORA = "test_lora.py::test_an_mlp_equals_plain_pytorch", "test_lora.py"
LAYERS = (
    Mutant(
        "the mean's share of the gradient dropped",
        "kernels/norm/reference.py",
        "(scaled - unit * (scaled * unit).mean(-1, keepdim=True))",
        "scaled",
        (NORM,),
    ),
    Mutant(
        "the offset dropped from backward",
        "kernels/norm/reference.py",
        "scaled = grad * _scale(promote(weight), offset)",
        "scaled = grad * promote(weight)",
        (NORM,),
    ),
    Mutant(
        "the mean over the block, not the row",
        "kernels/norm/triton_impl.py",
        "mean = tl.sum(scaled * unit, 1) / width",
        "mean = tl.sum(scaled * unit, 1) / BLOCK",
        (NORM,),
    ),
    Mutant(
        "the offset dropped from forward",
        "kernels/norm/triton_impl.py",
        "weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32) + offset\n    store_rows",
        "weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)\n    store_rows",
        (NORM,),
    ),
    Mutant(
        "slabs of the trained weight overlap",
        "kernels/norm/triton_impl.py",
        "in range(tl.program_id(0) * ROWS, num_rows,",
        "in range(0, num_rows,",
        (NORM,),
    ),
    Mutant(
        "a note believed after the result was written over",
        "kernels/norm/__init__.py",
        "return note if note is not None and note.version == tensor._version else None",
        "return note",
        (NORM_EDGES,),
    ),
    Mutant(
        "the derivative of silu without its second term",
        "kernels/lora/reference.py",
        "(1.0 - p).mul_(z).add_(1.0).mul_(p)",
        "p",
        (MLP,),
    ),
    Mutant(
        "the inner derivative of gelu dropped",
        "kernels/lora/triton_impl.py",
        " * 0.7978845608028654 * (1.0 + 0.134145 * z * z)",
        " * 0.7978845608028654",
        (MLP,),
    ),
    Mutant(
        "the product not left behind",
        "kernels/lora/triton_impl.py",
        "tl.store(grad_ptr + at, (value * up).to(kind), mask=inside)",
        "tl.store(grad_ptr + at, grad.to(kind), mask=inside)",
        (MLP,),
    ),
    Mutant(
        "scaling dropped from the input's gradient",
        "kernels/lora/__init__.py",
        "out.addmm_(grad @ self.b, self.a, alpha=self.scaling)",
        "out.addmm_(grad @ self.b, self.a)",
        (MLP,),
    ),
    Mutant(
        "gradients of the adapter in the type computed in",
        "kernels/lora/__init__.py",
        "return left.to(dtype) @ right.to(dtype)",
        "return left @ right",
        (LORA,),
    ),
    Mutant(
        "autocast left on in the pass",
        "kernels/lora/__init__.py",
        "return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()",
        "return contextlib.nullcontext()",
        (LORA,),
    ),
)

MUTANTS = PYTHON + TRITON + NATIVE + ATTENTION + LAYERS
