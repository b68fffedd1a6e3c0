"""Settings do what their help says, senseless ones are refused by name, and the Python API is what TRL's users know."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model

import rlhf_fast
from rlhf_fast import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SafePPOConfig,
    SFTConfig,
    SFTTrainer,
)
from rlhf_fast.errors import UserError
from rlhf_fast.models import disable_dropout, load
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.run.checkpoint import list_checkpoints

ROWS = [
    {"prompt": f"{i} ", "completion": w} for i, w in enumerate(["a", "hello", "to be", "x+y=z", "no", "q", "w", "e"])
]
PAIRS = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "?"} for r in ROWS]
PROMPTS = [{"prompt": r["prompt"], "answer": r["completion"]} for r in ROWS]


@pytest.fixture
def sft(make_model, tokenizer, settings):
    def make(rows=ROWS, eval_rows=None, **more):
        args = SFTConfig(**settings(**{"packing": False, "per_device_train_batch_size": 2, **more}))
        return SFTTrainer(make_model(), args, train_dataset=rows, eval_dataset=eval_rows, processing_class=tokenizer)

    return make


# ---- what settings do


def test_bad_rows_stop_the_run_or_are_left_out(sft):
    rows = [*ROWS, {"prompt": "9 ", "completion": ""}]
    with pytest.raises(UserError, match="row 9"):
        sft(rows)
    assert len(sft(rows, bad_rows="drop").train_records) == len(ROWS)
    with pytest.raises(UserError, match="bad_rows is 'skip'"):
        sft(bad_rows="skip")


def test_no_setting_is_left_untested():
    """Each is named by a test of this folder or of the command line."""
    here = Path(__file__).parent
    words = {
        w
        for path in [*here.glob("test_*.py"), here.parent / "test_end_to_end.py"]
        for w in re.findall(r"\w+", path.read_text())
    }
    for config in (SFTConfig, RewardConfig, DPOConfig, KTOConfig, GRPOConfig, PPOConfig, SafePPOConfig):
        assert {f.name for f in dataclasses.fields(config)} <= words, config.__name__


LORA = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
COMMON = {"logging_steps": 10, "seed": 42, "dtype": "auto", "lr_scheduler_type": "linear", "warmup_ratio": 0.03, **LORA}
DEFAULTS = {
    SFTConfig: {"max_length": 1024, "packing": True},
    RewardConfig: {"center_rewards_coefficient": 0.01},
    DPOConfig: {"beta": 0.1, "loss_type": ["sigmoid"], "loss_weights": None, "label_smoothing": 0.0}
    | {"precompute_ref_log_probs": False},
    KTOConfig: {"beta": 0.1, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0},
    GRPOConfig: {"num_generations": 8, "max_completion_length": 512, "beta": 0.0, "num_iterations": 1, "epsilon": 0.2}
    | {"epsilon_high": None, "delta": None, "loss_type": "dapo", "importance_sampling_level": "token"}
    | {"advantage_baseline": "mean", "scale_rewards": "group", "mask_truncated_completions": False},
    PPOConfig: {"num_ppo_epochs": 4, "num_mini_batches": 1, "kl_coef": 0.05, "kl_target": None, "kl_estimator": "k1"}
    | {"cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "gamma": 1.0, "lam": 0.95, "whiten_rewards": False}
    | {"missing_eos_penalty": None, "entropy_coef": 0.0, "critic_warmup_steps": 0, "target_kl": None},
}


@pytest.mark.parametrize("config", DEFAULTS, ids=lambda c: c.__name__)
def test_defaults_are_those_that_users_rely_on(config):
    """A change of one is a change of everybody's runs: it is made here too, on purpose. Learning rates are tested below."""
    args, want = config(), {**COMMON, **DEFAULTS[config]}
    assert {name: getattr(args, name) for name in want} == want
    assert (args.learning_rate, args.gradient_checkpointing) == (None, None)  # the algorithm's; on, or as the plan says


def test_the_learning_rate_warms_up_and_decays(sft, run):
    """Logged after each step, so it is the next one's: 10 steps, 3 of them warm-up from 0."""
    rates = [
        s["lr"] for s in run(sft(learning_rate=0.3, lr_scheduler_type="linear", warmup_ratio=0.3, max_steps=10)).steps
    ]
    assert rates == pytest.approx([0.1, 0.2, 0.3] + [0.3 * i / 7 for i in range(6, -1, -1)])
    assert run(sft(learning_rate=0.3, lr_scheduler_type="constant", max_steps=2)).steps[0]["lr"] == 0.3


def test_the_default_learning_rate_depends_on_lora(make_model, tokenizer, settings):
    for trainer, config, rows, rates in (
        (SFTTrainer, SFTConfig, ROWS, (2e-5, 2e-4)),
        (RewardTrainer, RewardConfig, PAIRS, (1e-5, 1e-4)),
        (DPOTrainer, DPOConfig, PAIRS, (1e-6, 5e-6)),
        (GRPOTrainer, GRPOConfig, PROMPTS, (1e-6, 1e-5)),
        (PPOTrainer, PPOConfig, PROMPTS, (3e-6, 3e-5)),
    ):
        for use_peft, rate in zip((False, True), rates):
            more = {"reward_funcs": ["exact"]} if rows is PROMPTS else {}
            args = config(**settings(learning_rate=None, use_peft=use_peft, **more))
            made = trainer(make_model(), args=args, train_dataset=rows, processing_class=tokenizer)
            assert made.optimizer.param_groups[0]["lr"] == rate


def test_weight_decay_shrinks_what_has_no_gradient(sft, run):
    """Embeddings of characters that no row has: AdamW takes lr * decay of them away each step."""
    start = sft().policy.model.get_input_embeddings().weight[40].detach().clone()
    result = run(sft(learning_rate=0.01, weight_decay=0.5, max_steps=1))
    torch.testing.assert_close(result.weights["model.model.embed_tokens.weight"][40], start * (1 - 0.01 * 0.5))


def test_the_length_of_a_run(sft, run):
    """8 rows in windows of 2 * 2; max_steps goes on into further epochs."""
    assert len(run(sft(gradient_accumulation_steps=2, num_train_epochs=3)).steps) == 6
    result = run(sft(gradient_accumulation_steps=2, num_train_epochs=1, max_steps=5))
    assert [s["epoch"] for s in result.steps] == [0.5, 1.0, 1.5, 2.0, 2.5]


def test_when_to_log_evaluate_and_save(sft, run):
    made = sft(eval_rows=ROWS[:3], logging_steps=2, eval_steps=3, save_steps=2, save_total_limit=2, max_steps=7)
    steps = run(made).steps
    assert [s["step"] for s in steps if "loss" in s] == [2, 4, 6, 7]
    assert [s["step"] for s in steps if "eval_loss" in s] == [3, 6, 7]
    kept = list_checkpoints(Path(made.args.output_dir) / "checkpoints")
    assert [p.name for p in kept] == ["step-00000006", "step-00000007"]


def test_the_seed_decides_the_order_of_the_rows(sft, run):
    runs = [run(sft(seed=seed, max_steps=2)).losses for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_gradient_checkpointing_recomputes_and_changes_nothing(sft, run, monkeypatch):
    """Twice as many passes through a layer, the same weights."""
    ends, calls = [], []
    for checkpointing in (False, True):
        made = sft(gradient_checkpointing=checkpointing, max_steps=2)
        counted = []
        layer = made.policy.model.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, counted=counted: counted.append(torch.is_grad_enabled()))
        ends.append(run(made).weights)
        calls.append(sum(counted))
    assert calls == [2, 4]
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, atol=1e-6, rtol=0)


def test_the_dtype_is_that_of_the_weights(make_model, tokenizer, settings, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, dtype in (("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        made = SFTTrainer(str(tmp_path / "model"), SFTConfig(**settings(dtype=name)), train_dataset=ROWS)
        assert made.policy.model.dtype == dtype


def test_lora_settings_reach_the_adapter(sft):
    made = sft(use_peft=True, lora_r=3, lora_alpha=5, lora_dropout=0.25, lora_target_modules=["q_proj", "down_proj"])
    config = made.policy.adapters.config("policy")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 5, 0.25)
    assert {n.split(".")[-4] for n, p in made.policy.named_parameters() if p.requires_grad} == {"q_proj", "down_proj"}
    everywhere = {n.split(".")[-4] for n, p in sft(use_peft=True).policy.named_parameters() if p.requires_grad}
    assert everywhere == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_fused_layers_are_said_once_and_can_be_turned_off(sft, run, capsys):
    """The same losses either way."""
    losses = {}
    for on in (True, False):
        made = sft(use_peft=True, fused_layers=on, max_steps=2, quiet=False)
        said = capsys.readouterr().out
        assert said.count("fused: 14 LoRA layers, 2 MLPs, 5 norms") == on
        assert bool(made.policy.fusion.fused) is on
        losses[on] = [s["loss"] for s in run(made).steps]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_too_long_rows_are_refused_then_cut_on_request(make_model, tokenizer, settings):
    """For each trainer with its own limit; prompts are left out instead of cut."""
    long = {"prompt": "0123456789", "completion": "abcdef", "chosen": "abcdef", "rejected": "ghijkl"}
    for trainer, config, limit in (
        (SFTTrainer, SFTConfig, {"max_length": 12}),
        (RewardTrainer, RewardConfig, {"max_length": 12}),
        (DPOTrainer, DPOConfig, {"max_length": 12}),
        (GRPOTrainer, GRPOConfig, {"max_prompt_length": 9, "reward_funcs": ["random"]}),
        (PPOTrainer, PPOConfig, {"max_prompt_length": 9, "reward_funcs": ["random"]}),
    ):
        keys = {"SFT": ("prompt", "completion"), "GRP": ("prompt",), "PPO": ("prompt",)}
        keys = keys.get(trainer.__name__[:3], ("prompt", "chosen", "rejected"))
        rows = [{k: row[k] for k in keys} for row in (long, {**long, "prompt": "01"})]
        given = {"train_dataset": rows, "processing_class": tokenizer}
        with pytest.raises(UserError, match=f"longer than {next(iter(limit))} .* set allow_truncation: true"):
            trainer(make_model(), args=config(**settings(**limit)), **given)
        made = trainer(make_model(), args=config(**settings(**limit, allow_truncation=True)), **given)
        if "max_length" in limit:
            examples = itertools.chain(*(r if isinstance(r, list) else r.responses for r in made.train_records))
            assert max(map(len, examples)) == 12
        else:
            assert [len(p.input_ids) for p in made.train_records] == [2]


def test_a_quiet_run_prints_nothing_and_another_says_what_it_does(make_model, tokenizer, settings, capfd):
    for quiet in (True, False):
        args = DPOConfig(**settings(quiet=quiet, report_to=[]))
        DPOTrainer(
            make_model(), args=args, train_dataset=PAIRS, processing_class=tokenizer, eval_dataset=PAIRS[:3]
        ).train()
        said = capfd.readouterr().out
        if quiet:
            assert said == ""
    assert "reference: a frozen copy of the starting weights" in said
    assert "train: 8 of 8 rows" in said
    assert "eval: 3 of 3 rows" in said


def test_rollouts_fill_so_many_slots_and_are_evaluated_on_a_few_prompts(make_model, tokenizer, settings):
    """12 samples over 5 slots; the memory is free again when the update begins."""
    args = GRPOConfig(
        **settings(rollout_batch_size=5, num_generations=4, max_completion_length=3, num_eval_prompts=2, max_steps=1)
    )
    made = GRPOTrainer(
        make_model(), "random", args=args, train_dataset=PROMPTS, eval_dataset=PROMPTS, processing_class=tokenizer
    )
    rows, held = [], []

    def look(module, inputs, out):
        rows.append(len(inputs[0]))
        held.append(made.engine.cache.nbytes)

    hook = made.policy.model.get_input_embeddings().register_forward_hook(look)
    made.collect(made.train_records[:3])
    assert max(rows) == 5 and max(held) > 0
    assert made.engine.cache.nbytes == 0
    hook.remove()
    assert made.evaluate()["eval_num_completions"] == 2.0


# ---- what is refused


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (SFTConfig, {"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; it must be at least 1"),
        (SFTConfig, {"save_steps": 0}, "save_steps is 0"),
        (SFTConfig, {"eval_steps": 0}, "eval_steps is 0"),
        (SFTConfig, {"warmup_ratio": 10}, "warmup_ratio is 10; it is a share"),
        (SFTConfig, {"lr_scheduler_type": "cosin"}, "lr_scheduler_type is 'cosin'; choose one of linear, cosine"),
        (SFTConfig, {"dtype": "fp16"}, "dtype is 'fp16'; choose one of auto, float32, bfloat16"),
        (DPOConfig, {"loss_type": ["sigmoid", "hing"]}, "loss_type is 'hing'; choose one of sigmoid"),
        (DPOConfig, {"loss_type": []}, "name at least one"),
        (DPOConfig, {"loss_type": ["ipo", "hinge"], "simpo_gamma": 1.0}, "simpo_gamma has no effect"),
        (DPOConfig, {"loss_weights": [1.0, 2.0]}, "loss_weights has 2 entries for 1 loss_type"),
        (DPOConfig, {"beta": 0.0}, "beta is 0.0; it must be above 0"),
        (DPOConfig, {"label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing has no effect"),
        (GRPOConfig, {"loss_type": "grop"}, "loss_type is 'grop'; choose one of grpo, dapo"),
        (GRPOConfig, {"loss_type": "cispo"}, "cispo needs epsilon_high"),
        (PPOConfig, {"kl_coef": 0.0, "kl_target": 6.0}, "kl_target adapts kl_coef, which is 0.0"),
        (
            GRPOConfig,
            {"loss_type": "reinforce", "importance_sampling_level": "sequence"},
            "no effect with loss_type reinforce",
        ),
        (GRPOConfig, {"importance_sampling_level": "word"}, "importance_sampling_level is 'word'"),
        (GRPOConfig, {"scale_rewards": "std"}, "scale_rewards is 'std'"),
        (GRPOConfig, {"advantage_baseline": "max"}, "advantage_baseline is 'max'"),
        (GRPOConfig, {"delta": 0.5}, "delta is 0.5; it bounds the ratio from above and must exceed 1"),
        (
            GRPOConfig,
            {"delta": 2.0, "loss_type": "reinforce"},
            "delta is 2.0 and has no effect with loss_type reinforce",
        ),
        (GRPOConfig, {"use_bias_correction_kl": False}, "set beta above 0"),
        (GRPOConfig, {"loss_type": "vespo", "use_vllm": True}, "vllm_importance_sampling_correction: false"),
        (GRPOConfig, {"num_iterations": 0}, "num_iterations is 0"),
        (GRPOConfig, {"num_generations": 3}, "num_generations is 3: .* = 8 responses"),
        (GRPOConfig, {"num_generations": 1}, "num_generations is 1: it must be at least 2"),
        (GRPOConfig, {"dynamic_sampling_rounds": -1}, "dynamic_sampling_rounds is -1; it must be at least 0"),
        (
            GRPOConfig,
            {"soft_overlong_cache": 600},
            "soft_overlong_cache is 600; .* max_completion_length of 512 tokens",
        ),
        (PPOConfig, {"reward_clip": 0.0}, "reward_clip is 0.0; it must be above 0"),
        (PPOConfig, {"kl_estimator": "k4"}, "kl_estimator is 'k4'; choose one of k1"),
        (PPOConfig, {"num_mini_batches": 0}, "num_mini_batches is 0"),
        (PPOConfig, {"kl_target": 0.0}, "kl_target is 0.0; it must be above 0"),
    ],
    ids=str,
)
def test_senseless_settings_are_refused_by_name(config, values, message):
    with pytest.raises(UserError, match=message):
        config(**values)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_what_a_trainer_cannot_do_without_is_asked_for_by_name(model, tokenizer, settings):
    common = {"train_dataset": PROMPTS, "processing_class": tokenizer}
    for make, message in (
        (lambda: GRPOTrainer(model, args=GRPOConfig(**settings()), **common), "reward_funcs is empty"),
        (lambda: PPOTrainer(model, args=PPOConfig(**settings()), **common), "PPO needs a reward: --reward_model_path"),
        (
            lambda: GRPOTrainer(model, ["random"], args=GRPOConfig(**settings(reward_weights=[1.0, 2.0])), **common),
            "reward_weights has 2 entries for the rewards random",
        ),
        (
            lambda: GRPOTrainer(model, _needs_solution, args=GRPOConfig(**settings()), **common),
            "'_needs_solution' needs a column 'solution'; the prompts' columns are: answer",
        ),
        (
            lambda: PPOTrainer(model, _needs_solution, args=PPOConfig(**settings()), **common),
            "'_needs_solution' needs a column 'solution'",
        ),
        (lambda: SFTTrainer(model, SFTConfig(**settings()), processing_class=tokenizer), "train_dataset is missing"),
        (lambda: SFTTrainer(model, SFTConfig(**settings()), train_dataset=[], processing_class=tokenizer), "is empty"),
        (lambda: SFTTrainer(model, SFTConfig(**settings()), train_dataset=ROWS), "pass processing_class=tokenizer"),
        (
            lambda: SFTTrainer(get_peft_model(model, LoraConfig(r=2)), SFTConfig(**settings()), train_dataset=ROWS),
            "model is a PeftModel.*the plain model and a peft_config",
        ),
    ):
        with pytest.raises(UserError, match=message):
            make()


def _needs_solution(completions, solution):
    return [0.0] * len(completions)


# ---- the Python API


def test_importing_the_package_imports_no_torch():
    code = (
        "import sys, rlhf_fast; assert not {'torch', 'transformers'} & set(sys.modules); "
        "from rlhf_fast import SFTConfig; assert 'torch' in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_trainer_is_at_the_top_of_the_package():
    for name in ("SFT", "Reward", "DPO", "KTO", "PPO", "SafePPO", "GRPO"):
        assert getattr(rlhf_fast, f"{name}Trainer").config_class is getattr(rlhf_fast, f"{name}Config")
    with pytest.raises(AttributeError, match="no attribute 'XPOTrainer'"):
        _ = rlhf_fast.XPOTrainer


@pytest.mark.parametrize("dataset", [PROMPTS, Dataset.from_list(PROMPTS)], ids=["list", "datasets"])
def test_the_call_that_users_of_trl_know(dataset, model, tokenizer, settings):
    """A model object, a reward function, a list or Dataset, a LoraConfig; then evaluate and save_model."""

    def reward_len(completions, **kwargs):
        return [-abs(3 - len(completion)) for completion in completions]

    training_args = GRPOConfig(**settings(num_generations=4, max_completion_length=5, max_steps=2))
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward_len,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    figures = trainer.train()
    assert {"reward", "reward_std", "rewards/reward_len/mean", "grad_norm", "lr", "eval_reward"} <= figures.keys()
    assert trainer.evaluate()["eval_reward"] == figures["eval_reward"]
    trainer.save_model(training_args.output_dir + "-copy")
    saved = Path(training_args.output_dir + "-copy")
    assert json.loads((saved / "adapter_config.json").read_text())["r"] == 2
    trained = {n for n, p in trainer.policy.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n for n in trained)


def test_no_dropout_is_left_outside_supervised_fine_tuning(make_model, tokenizer, settings):
    """In modules, in numbers that layers hand to F.dropout, and in the adapters of roles that are added later."""
    dropping = {"attention_dropout": 0.2}
    peft = lora_config(r=2, alpha=4, dropout=0.3)
    given = {"train_dataset": PROMPTS, "processing_class": tokenizer, "peft_config": peft}
    made = PPOTrainer(make_model(**dropping), "random", args=PPOConfig(**settings()), **given)
    assert _dropouts(made.policy) == set()
    given["train_dataset"] = ROWS
    kept = SFTTrainer(make_model(**dropping), SFTConfig(**settings()), **given)
    assert _dropouts(kept.policy) == {0.2, 0.3}


def _dropouts(policy):
    rates = {m.p for m in policy.modules() if isinstance(m, torch.nn.Dropout)}
    rates |= {v for m in policy.modules() for k, v in vars(m).items() if "drop" in k and isinstance(v, float)}
    return rates - {0.0}


def test_dropout_of_models_that_keep_a_bare_number_is_turned_off_too():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    model = OPTForCausalLM(OPTConfig(**sizes, vocab_size=20, max_position_embeddings=16, dropout=0.5)).train()
    row = torch.arange(8)[None]
    assert not torch.equal(model(row).logits, model(row).logits)
    disable_dropout(model)
    assert torch.equal(model(row).logits, model(row).logits)


def test_a_layer_called_like_a_role_is_not_taken_for_its_adapter(make_model, tokenizer):
    """Some models name a layer "value"; the policy's adapter on it must not be mistaken for the critic's."""
    model = make_model()
    attention = model.model.layers[0].self_attn
    attention.value = attention.v_proj
    policy = load(model, tokenizer=tokenizer, peft_config=lora_config(r=2, alpha=4, target_modules=["value", "q_proj"]))
    policy.add_role("value", trainable=False)
    names = {role: policy.adapters.parameters(role) for role in ("policy", "value")}
    assert names["policy"].keys() == names["value"].keys()
    assert all(p.requires_grad for p in names["policy"].values())
    assert not any(p.requires_grad for p in names["value"].values())


def test_processes_that_work_together_in_a_way_that_is_not_known_here_are_refused(
    make_model, tokenizer, settings, monkeypatch
):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(UserError, match=r"told to use DEEPSPEED, and .* replicas \(DDP\) or shards \(FSDP2\) here"):
        SFTTrainer(make_model(), SFTConfig(**settings()), train_dataset=ROWS, processing_class=tokenizer)
