"""The functions that verl would call, against hand-worked numbers and verl's documented formulas, without verl."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import rlhf_fast.integrations.verl as fast
from rlhf_fast.errors import UserError

NAN = float("nan")


def config(**more) -> SimpleNamespace:
    return SimpleNamespace(**{"clip_ratio": 0.2, **more})


def tokens(seed: int = 0, shape=(4, 6)):
    """Log-probabilities, advantages of every sign, and a mask with a hole, padding and an empty sequence."""
    torch.manual_seed(seed)
    old = -torch.rand(shape) * 3
    new = (old + 0.8 * torch.randn(shape)).requires_grad_()
    mask = (torch.arange(shape[1]) < torch.tensor([6, 4, 2, 0])[:, None]).long()
    mask[0, 2] = 0
    return old, new, torch.randn(shape), mask


def formula(old, new, advantages, mask, low, high, c, level="token"):
    """PPO's clip and dual clip as verl documents them, in float64 on the unmasked tokens."""
    keep = mask.bool()
    old, new, advantages = (torch.where(keep, x.double(), 0.0) for x in (old, new, advantages))
    log_ratio = new - old
    if level == "sequence":
        mean = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = new - new.detach() + mean.detach()
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    if c is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * c), loss)
    return loss, ratio


def test_vanilla_by_hand():
    """Ratios 2, 1/2, 4 with A = 1, -1, -1: -1.2, 0.8 and the dual clip's 3; the fourth token is masked and NaN."""
    old = torch.tensor([[0.0, 0.0, 0.0, NAN]])
    new = torch.tensor([[2.0, 0.5, 4.0, NAN]]).log()
    advantages, mask = torch.tensor([[1.0, -1.0, -1.0, NAN]]), torch.tensor([[1, 1, 1, 0]])
    loss, metrics = fast.policy_loss_vanilla(old, new, advantages, mask, config=config())
    assert loss.item() == pytest.approx((-1.2 + 0.8 + 3.0) / 3)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(2 / 3)
    assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(1 / 3)
    assert metrics["actor/ppo_kl"] == pytest.approx(-torch.tensor([2.0, 0.5, 4.0]).log().mean().item())


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
@pytest.mark.parametrize("whole", [False, True], ids=["local", "global"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "rollout weights"])
def test_losses_and_gradients_are_those_of_verls_formulas(mode, whole, weighted):
    old, new, advantages, mask = tokens()
    info = {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 8} if whole else {}
    weights = torch.rand(4, 6) * 2 if weighted else None
    settings = config(clip_ratio_low=0.1, clip_ratio_high=0.3, clip_ratio_c=1.5, global_batch_info=info)
    loss, _ = fast.policy_loss_vanilla(old, new, advantages, mask, mode, settings, weights)
    (gradient,) = torch.autograd.grad(loss, new)
    per_token, _ = formula(old, new, advantages, mask, 0.1, 0.3, 1.5)
    per_token = per_token if weights is None else per_token * weights
    counts = mask.sum(-1)
    if mode == "token-mean":
        expected = (per_token * mask).sum() / (20 if whole else counts.sum())
    else:
        of_sequence = (per_token * mask).sum(-1)
        of_sequence = of_sequence / counts.clamp(min=1) if mode.endswith("mean") else of_sequence
        expected = of_sequence.sum() / (4 if whole else 3)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, new)[0], rtol=1e-5, atol=1e-6)


def test_gspo_has_the_ratio_of_the_sequence_and_the_gradient_of_the_token():
    old, new, advantages, mask = tokens(1)
    loss, metrics = fast.policy_loss_gspo(old, new, advantages, mask, "token-mean", config(clip_ratio=0.1))
    per_token, ratio = formula(old, new, advantages, mask, 0.1, 0.1, None, "sequence")
    expected = ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).sum() / 3
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(loss, new)[0], torch.autograd.grad(expected, new)[0], rtol=1e-5, atol=1e-6
    )
    clipped = ((ratio > 1.1) & (advantages > 0)) | ((ratio < 0.9) & (advantages < 0))
    assert metrics["actor/pg_clipfrac"] == pytest.approx((clipped * mask).sum().item() / mask.sum().item())
    assert metrics["actor/pg_clipfrac_lower"] == 0


def test_what_cannot_be_aggregated_is_refused_in_a_sentence():
    old, new, advantages, mask = tokens()
    with pytest.raises(UserError, match="seq-mean-token-sum-norm divides by different things"):
        fast.policy_loss_vanilla(old, new, advantages, mask, "seq-mean-token-sum-norm", config())
    with pytest.raises(UserError, match="on 2 ranks needs the size of the global batch"):
        fast.policy_loss_vanilla(old, new, advantages, mask, "token-mean", config(global_batch_info={"dp_size": 2}))
    with pytest.raises(UserError, match="clip_ratio"):
        fast.policy_loss_vanilla(old, new, advantages, mask)


def test_gae_follows_verls_loop_and_whitens_with_bessels_correction():
    _, values, rewards, mask = tokens(2)
    advantages, returns = fast.gae_advantage_return(rewards, values.detach(), mask, torch.tensor(0.9), 0.8)
    rows, r, v, m = [], rewards.double(), values.detach().double(), mask.double()
    next_value = carry = 0.0
    for t in reversed(range(6)):
        delta = r[:, t] + 0.9 * next_value - v[:, t]
        carry = (delta + 0.9 * 0.8 * carry) * m[:, t] + (1 - m[:, t]) * carry
        next_value = v[:, t] * m[:, t] + (1 - m[:, t]) * next_value
        rows.insert(0, carry)
    expected, keep = torch.stack(rows, 1), mask.bool()
    torch.testing.assert_close(returns[keep].double(), (expected + v)[keep], rtol=1e-5, atol=1e-6)
    expected = (expected - expected[keep].mean()) / expected[keep].std()
    torch.testing.assert_close(advantages[keep].double(), expected[keep], rtol=1e-5, atol=1e-5)
    assert not advantages[~keep].any() and not returns[~keep].any()


def test_outcome_advantages_by_hand():
    """Group a: rewards 1 and 3 (mean 2, deviation sqrt 2); b: 0, 3, 6 (others' means 4.5, 3, 1.5); c is alone."""
    rewards = torch.zeros(6, 3)
    rewards[:, -1] = torch.tensor([1.0, 0.0, 3.0, 3.0, 5.0, 6.0])  # on a masked position, as verl sums them all
    mask = torch.tensor([[1, 1, 0]] * 6)
    names = ["a", "b", "a", "b", "c", "b"]
    advantages, same = fast.grpo_outcome_advantage(rewards, mask, names)
    expected = torch.tensor([-1 / 2**0.5, -1.0, 1 / 2**0.5, 0.0, 0.0, 1.0])
    torch.testing.assert_close(advantages, expected[:, None] * mask, rtol=1e-4, atol=1e-6)
    assert same is advantages
    for options in ({"norm_adv_by_std_in_grpo": False}, {"config": {"norm_adv_by_std_in_grpo": False}}):
        advantages, _ = fast.grpo_outcome_advantage(rewards, mask, names, **options)
        torch.testing.assert_close(advantages[:, 0], torch.tensor([-1.0, -3.0, 1.0, 0.0, 0.0, 3.0]))
    advantages, _ = fast.rloo_outcome_advantage(rewards, mask, names, config=config(), reward_baselines=None)
    torch.testing.assert_close(advantages[:, 1], torch.tensor([-2.0, -4.5, 2.0, 0.0, 0.0, 4.5]))
    with pytest.raises(UserError, match="6 responses, 5 names"):
        fast.grpo_outcome_advantage(rewards, mask, names[:5])


@pytest.fixture
def verl(monkeypatch):
    """A stand-in with verl's registries, and a trainer module that imported a function by name."""
    names = ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos", "verl.utils")
    modules = {name: ModuleType(name) for name in (*names, "verl.utils.torch_functional", "verl.workers")}
    core, functional = modules["verl.trainer.ppo.core_algos"], modules["verl.utils.torch_functional"]
    core.losses, core.estimators = {"vanilla": None}, {}
    core.register_policy_loss = lambda name: lambda f: core.losses.__setitem__(name, f)
    core.register_adv_est = lambda name: lambda f: core.estimators.__setitem__(name, f)

    def vanilla(*_) -> tuple[torch.Tensor, dict]: ...

    core.compute_policy_loss_vanilla = vanilla
    core.compute_gae_advantage_return = lambda *_: "verl's"
    functional.logprobs_from_logits = modules["verl.workers"].logprobs_from_logits = lambda *_: "verl's"
    modules["verl.trainer.ppo"].core_algos, modules["verl.utils"].torch_functional = core, functional
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


def test_register_adds_names_and_replaces_only_when_told(verl):
    core, functional = verl["verl.trainer.ppo.core_algos"], verl["verl.utils.torch_functional"]
    fast.register()
    assert core.losses == {
        "vanilla": None,
        "fast": fast.policy_loss_vanilla,
        "fast_gspo": fast.policy_loss_gspo,
    }
    assert core.estimators == {"fast_grpo": fast.grpo_outcome_advantage, "fast_rloo": fast.rloo_outcome_advantage}
    assert core.compute_gae_advantage_return() == functional.logprobs_from_logits() == "verl's"
    fast.register(replace=True)
    assert core.losses["vanilla"] is fast.policy_loss_vanilla and core.losses["gspo"] is fast.policy_loss_gspo
    assert core.compute_gae_advantage_return is fast.gae_advantage_return
    assert functional.logprobs_from_logits is verl["verl.workers"].logprobs_from_logits is fast.logprobs_from_logits


def test_a_verl_whose_losses_return_four_values_gets_four(verl):
    core = verl["verl.trainer.ppo.core_algos"]
    returned = [torch.Tensor] * 4
    core.compute_policy_loss_vanilla.__annotations__["return"] = tuple[tuple(returned)]
    fast.register()
    old, new, advantages, mask = tokens()
    loss, metrics = fast.policy_loss_vanilla(old, new, advantages, mask, config=config())
    values = core.losses["fast"](old, new, advantages, mask, "token-mean", config())
    assert values[0].equal(loss) and [v.item() for v in values[1:]] == pytest.approx(list(metrics.values()))
    core.compute_policy_loss_vanilla.__annotations__["return"] = tuple[torch.Tensor, dict, int]
    with pytest.raises(UserError, match="verl's policy losses return"):
        fast.register()


def test_another_verl_is_refused_in_a_sentence(verl, monkeypatch):
    del verl["verl.trainer.ppo.core_algos"].register_adv_est
    with pytest.raises(UserError, match="no core_algos.register_adv_est"):
        fast.register()
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo", None)
    with pytest.raises(UserError, match="pip install verl"):
        fast.register()


def test_logprobs_from_logits():
    logits, labels = torch.randn(2, 3, 5, requires_grad=True), torch.randint(0, 5, (2, 3))
    expected = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(fast.logprobs_from_logits(logits, labels, False), expected)
