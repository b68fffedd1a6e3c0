"""A prompt computed once for all its responses: the same losses, metrics and weights, from fewer tokens."""

from __future__ import annotations

import functools

import pytest
import torch

from rlhf_fast import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlhf_fast.models import load
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.rewards.model import RewardModel
from rlhf_fast.trainers.loop import optimizer_step

PROMPTS = ["what is one plus one = ", "name the colour of the sky - ", "a prompt "]
ANSWERS = [["2", "two", "three or so!", "2, i think"], ["blue", "red!", "azure", "grey, mostly"], ["x", "y", "zz", "!"]]
SCRIPT = dict(zip(PROMPTS, ANSWERS))  # "!" alone is a response of no token at all


def letters(completions, **_):
    """How many different ones: rewards differ within groups."""
    return [float(len(set(c))) for c in completions]


def sft(make, scripted, **settings):
    """Several answers to one prompt, weights included."""
    rows = [{"prompt": p, "completion": a, "weight": 1 + len(a)} for p, answers in SCRIPT.items() for a in answers]
    return make(SFTTrainer, SFTConfig(packing=False, **settings), rows)


def reward(make, scripted, **settings):
    """Pairs and rankings of four."""
    rows = [{"prompt": p, "responses": a, "ranking": [1, 2, 3, 4]} for p, a in SCRIPT.items()]
    rows += [{"prompt": p, "responses": a[:2], "ranking": [2, 1]} for p, a in SCRIPT.items()]
    return make(RewardTrainer, RewardConfig(center_rewards_coefficient=0.1, **settings), rows)


def dpo(make, scripted, loss_type="sigmoid", **settings):
    rows = [{"prompt": p, "chosen": a[0], "rejected": a[1]} for p, a in SCRIPT.items()]
    rows += [{"prompt": p, "chosen": a[3], "rejected": a[2]} for p, a in SCRIPT.items()]
    return make(DPOTrainer, DPOConfig(beta=0.5, loss_type=loss_type, **settings), rows)


def kto(make, scripted, **settings):
    rows = [
        {"prompt": p, "completion": a, "label": i % 2} for p, answers in SCRIPT.items() for i, a in enumerate(answers)
    ]
    return make(KTOTrainer, KTOConfig(beta=0.5, **settings), rows)


def grpo(make, scripted, **settings):
    """Groups of four; steps after the first have ratios, and the KL has a reference."""
    rows = [{"prompt": p} for p in SCRIPT]
    settings |= {"num_generations": 4, "num_iterations": 2, "beta": 0.1, "epsilon": 0.01}
    args = GRPOConfig(mask_truncated_completions=True, **settings)
    return make(GRPOTrainer, args, rows, reward_funcs=letters, engine=scripted(SCRIPT))


def ppo(make, scripted, **settings):
    """The same prompt often; a pass shuffles what lies beside what."""
    rows = [{"prompt": p} for p in [*SCRIPT] for _ in range(4)]
    args = PPOConfig(num_ppo_epochs=2, entropy_coef=0.01, vf_coef=1.0, whiten_rewards=True, **settings)
    return make(PPOTrainer, args, rows, reward_funcs=letters, engine=scripted(SCRIPT))


ALGORITHMS = {"sft": sft, "reward": reward, "dpo": dpo, "dpo ipo": functools.partial(dpo, loss_type="ipo")}
ALGORITHMS |= {"kto": kto, "ppo": ppo, "grpo": grpo, "grpo grpo": functools.partial(grpo, loss_type="grpo")}
ALGORITHMS["grpo gspo"] = functools.partial(grpo, importance_sampling_level="sequence")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_shared_prompt_changes_the_tokens_computed_and_nothing_else(
    name, lora, sgd, make_model, tokenizer, settings, scripted, run
):
    def make(trainer_class, args, rows, **more):
        peft = lora_config(r=4, alpha=8) if lora else None
        return trainer_class(
            make_model(), args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft, **more
        )

    results, tokens = [], []
    for shared_prefix in (False, True):
        more = {"per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 0.02, "max_grad_norm": 0.5}
        trainer = ALGORITHMS[name](make, scripted, **settings(shared_prefix=shared_prefix, **more))
        seen = []
        trainer.policy.model.get_input_embeddings().register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0].numel())
        )
        results.append(run(trainer))
        tokens.append(sum(seen))
    plain, shared = results
    # shuffled rows are seldom neighbours in SFT, KTO and PPO; the others always are
    assert tokens[1] < {"sft": 1.0, "kto": 1.0, "ppo": 1.0, "grpo": 0.6}.get(name.split()[0], 0.8) * tokens[0]
    # DPO's margins are differences of sums of up to 50, where float32 has steps of 4e-6
    assert shared.losses == pytest.approx(plain.losses, abs=3e-6 if "dpo" in name else 1e-6, rel=1e-6)
    for got, want in zip(shared.steps, plain.steps):
        assert got == pytest.approx(want, abs=1e-5, rel=1e-4)
    for parameter, weight in plain.weights.items():
        torch.testing.assert_close(shared.weights[parameter], weight, atol=1e-6, rtol=0, msg=parameter)


@pytest.mark.parametrize(("size", "parts"), [(3, [3, 3, 2]), (4, [4, 4]), (6, [4, 4]), (8, [8])])
def test_a_micro_batch_holds_whole_groups_where_it_can(size, parts, make_model, tokenizer, settings, scripted, run):
    """Groups of four in windows of eight and more; a micro-batch of six would cut the second group in two."""
    more = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": size, "num_generations": 4, "max_steps": 1}
    trainer = GRPOTrainer(
        make_model(),
        letters,
        args=GRPOConfig(**settings(**more)),
        train_dataset=[{"prompt": p} for p in PROMPTS],
        processing_class=tokenizer,
        engine=scripted(SCRIPT),
    )
    sizes = []
    pack = trainer.pack
    trainer.pack = lambda examples: (sizes.append(len(examples)), pack(examples))[1]
    trainer.records = trainer.collect(trainer.train_records[:2])
    optimizer_step(trainer, list(range(8)))
    assert sizes == parts


def test_a_reward_model_scores_a_group_as_it_scores_each(make_model, tokenizer, ids):
    policy = load(make_model(), tokenizer=tokenizer, role="reward")
    policy.add_head("reward")
    model = RewardModel(policy)
    asked = [(p, a.rstrip("!")) for p, answers in SCRIPT.items() for a in answers]
    calls = []
    policy.model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].numel()))
    together = model([p for p, _ in asked], [a for _, a in asked], [ids(a) for _, a in asked])
    one_by_one = [model([p], [a], [ids(a)])[0] for p, a in asked]
    assert together == pytest.approx(one_by_one, abs=1e-6)
    assert calls[0] < 0.6 * sum(calls[1:])


def test_the_implementation_of_attention_is_what_the_setting_names(make_model, tokenizer, settings):
    from rlhf_fast.errors import UserError

    rows = [{"prompt": p, "completion": "x"} for p in PROMPTS]
    given = {"train_dataset": rows, "processing_class": tokenizer}
    made = SFTTrainer(make_model(), SFTConfig(**settings(attn_implementation="sdpa")), **given)
    assert made.policy.attention == "sdpa"
    with pytest.raises(UserError, match="attn_implementation is 'flash'; choose one of auto, varlen"):
        SFTConfig(attn_implementation="flash")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="attn_implementation is varlen, but it runs on CUDA only"):
            SFTTrainer(make_model(), SFTConfig(**settings(attn_implementation="varlen")), **given)
