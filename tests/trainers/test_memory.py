"""Memory of real small runs: the plan against what the allocator saw, and the rehearsal before the first step."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

from rlhf_fast import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SafePPOConfig,
    SafePPOTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlhf_fast.errors import UserError
from rlhf_fast.models import Policy
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.rewards.judge import Judge
from rlhf_fast.rollout import GenerateEngine, Request, SlotEngine
from rlhf_fast.run.checkpoint import rng_state
from rlhf_fast.run.memory import GB, Job, Part, Plan, Shape, find_shape, plan
from rlhf_fast.trainers.loop import begin_round, optimizer_step
from rlhf_fast.trainers.memory import _ballast, check, compare, job_of, plan_of, weights_of

ROWS = [{"prompt": f"{i}. ", "completion": w} for i, w in enumerate(["a", "to be", "seventeen", "q", "1,000,000"])]
PAIRS = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["completion"][:1] + "?"} for r in ROWS]
PROMPTS = [{"prompt": f"{i}+"} for i in range(4)]


def letters(completions, **_):
    return [float(len(set(c))) for c in completions]


@pytest.fixture
def make(make_model, tokenizer, settings, scripted):
    """make(method, model options, **settings) -> a trainer of a tiny run."""
    responses = {p["prompt"]: ["abc", "abcdefg", "x!", "to be or not"] for p in PROMPTS}
    table = {
        "sft": (SFTTrainer, SFTConfig, ROWS, {"packing": False}),
        "reward": (RewardTrainer, RewardConfig, PAIRS, {}),
        "dpo": (DPOTrainer, DPOConfig, PAIRS, {}),
        "ppo": (PPOTrainer, PPOConfig, PROMPTS, {"entropy_coef": 0.01}),
        "safe-ppo": (SafePPOTrainer, SafePPOConfig, PROMPTS, {"cost_funcs": [letters]}),
        "grpo": (GRPOTrainer, GRPOConfig, PROMPTS, {"num_generations": 4, "num_iterations": 2, "beta": 0.1}),
    }

    def build(method, model=None, rows=None, engine=None, **more):
        trainer, config, default_rows, own = table[method]
        options = {"per_device_train_batch_size": 4, **own, **more}
        if method in ("ppo", "safe-ppo", "grpo"):
            options.setdefault("max_completion_length", 16)
        reward = options.pop("reward_funcs", letters)
        args = config(**settings(**options))
        given = {"train_dataset": rows or default_rows, "processing_class": tokenizer}
        if method in ("ppo", "safe-ppo", "grpo"):
            given |= {"reward_funcs": reward, "engine": engine or scripted(responses)}
        return trainer(model or make_model(), args=args, **given)

    return build


# ---- the plan against the allocator


def peak_bytes(f) -> int:
    """The most bytes that ``f`` had allocated at a time, counted at the allocator: also inside of operations."""
    gc.collect()  # what an earlier count had seen made must not be seen going in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        f()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_the_counter_sees_what_lives_at_once_also_inside_of_an_operation():
    def f():
        a = torch.zeros(250_000)
        b = a * 2  # two at once
        del a
        return b.sum()

    assert peak_bytes(f) == pytest.approx(2_000_000, abs=1000)
    x = torch.rand(1000, 1000)
    assert peak_bytes(lambda: x.sort(dim=0).values.sum()) >= 12_000_000, "values and the indices inside"


SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "max_position_embeddings": 1024}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048, "initializer_range": 0.02}
HEAD = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
RUNS = {
    "sft lora": ("sft", {"use_peft": True}),
    "sft lora, two micro-batches": ("sft", {"use_peft": True, "micro_batch_tokens": 1024}),
    "sft lora, everything kept": ("sft", {"use_peft": True, "gradient_checkpointing": False}),
    "sft lora, PEFT's own layers": ("sft", {"use_peft": True, "fused_layers": False}),
    "sft lora, PEFT's own layers in bfloat16": ("sft", {"use_peft": True, "fused_layers": False, "dtype": "bfloat16"}),
    "sft lora on some layers": ("sft", {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]}),
    "sft lora in bfloat16": ("sft", {"use_peft": True, "dtype": "bfloat16"}),
    "sft lora in bfloat16, everything kept": (
        "sft",
        {"use_peft": True, "dtype": "bfloat16", "gradient_checkpointing": False},
    ),
    "sft all weights": ("sft", {}),
    "sft all weights, everything kept": ("sft", {"gradient_checkpointing": False}),
    "dpo lora": ("dpo", {"use_peft": True}),
    "reward lora": ("reward", {"use_peft": True}),
    "grpo lora": ("grpo", {"use_peft": True}),
    "ppo lora": ("ppo", {"use_peft": True}),
    "safe ppo lora": ("safe-ppo", {"use_peft": True}),
}


def other_models():
    """A model of each architecture of which our layers replace only some, or none."""
    sizes = {**SMALL, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0, "tie_word_embeddings": False}
    phi3 = Phi3Config(**sizes)
    sizes = {"n_embd": 256, "n_inner": 768, "n_layer": 4, "n_head": 4, "n_positions": 1024, "vocab_size": 2048}
    gpt2 = GPT2Config(**sizes, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0, bos_token_id=None, eos_token_id=0)
    return {"phi3": Phi3ForCausalLM(phi3), "gpt2": GPT2LMHeadModel(gpt2)}


@pytest.mark.parametrize("keep", [False, True], ids=["", "everything kept"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["phi3", "gpt2"])
def test_the_planned_peak_of_layers_that_are_not_ours_is_within_ten_percent_too(kind, dtype, keep, make):
    settings = {"use_peft": True, "dtype": dtype, "gradient_checkpointing": not keep}
    check_peak("sft", other_models()[kind], make, **settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_planned_peak_of_an_adapter_on_the_head_counts_the_rows_that_are_kept(dtype, make, make_model):
    """A gradient row of 8,192 numbers for each of 2,000 tokens is most of the run."""
    model = make_model(**{**SMALL, "num_hidden_layers": 1, "vocab_size": 8192})
    made = check_peak("sft", model, make, use_peft=True, lora_target_modules=HEAD, dtype=dtype)
    assert max(made.peaks, key=made.peaks.get) == "loss"
    (rows,) = (p.bytes for p in made.parts if p.name == "gradient rows kept for the head")
    assert rows > 0.3 * made.tensors


def test_the_planned_peak_of_a_4bit_base_counts_the_weight_that_is_expanded(make, make_model, tmp_path):
    """Few tokens beside wide layers: the weight that is multiplied with is a quarter of the peak."""
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 512, "intermediate_size": 6144, "num_hidden_layers": 2, "vocab_size": 128}
    make_model(**{**SMALL, **wide}).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    settings = {"use_peft": True, "load_in_4bit": True, "dtype": "bfloat16", "lora_r": 4}
    made = check_peak("sft", str(tmp_path / "base"), make, tokens=6, **settings)
    assert 2 * 512 * 6144 > 0.25 * made.tensors


@pytest.mark.parametrize("name", RUNS)
def test_the_planned_peak_is_within_ten_percent_of_what_the_allocator_saw(name, make, make_model, scripted):
    """Two optimizer steps of 8 sequences of about 250 tokens: micro-batches of 2,000, or of 1,000."""
    method, more = RUNS[name]
    check_peak(method, make_model(**SMALL), make, scripted, **more)


def check_peak(method, model, make, scripted=None, tokens=250, **more) -> Plan:
    """Train on 8 sequences of so many tokens; returns the plan."""
    prompts = [{"prompt": c * 63} for c in "abcdefgh"]
    pairs = [{"prompt": c * 125, "chosen": "y" * 125, "rejected": "z" * 125} for c in "abcd"]
    # nearly all of it response: the plan cannot know how much, and counts on the worst
    sft = [{"prompt": c, "completion": "!" * (tokens - 2)} for c in "abcdefgh"]
    rows = {"sft": sft, "dpo": pairs, "reward": pairs}.get(method, prompts)
    more = {"gradient_checkpointing": True, "max_steps": 2, "logging_steps": 9, "lora_r": 8, **more}
    if method in ("grpo", "ppo", "safe-ppo"):
        script = {p["prompt"]: ["x" * 191 + "!", "y" * 190 + "z!"] for p in prompts}
        more |= {"engine": scripted(script), "max_completion_length": 192}
    size = 4 if method in ("dpo", "reward") else 8
    if more.get("dtype") == "bfloat16" and not isinstance(model, str):
        model = model.to(torch.bfloat16)
    made = make(method, model, rows, per_device_train_batch_size=size, **more)
    made.policy.train()

    def train():
        for _ in range(2):
            begin_round(made)
            optimizer_step(made, made.plan.pop(0))

    planned = plan_of(made)
    before = sum(p.bytes for p in planned.parts if p.name in ("frozen weights", "trained weights"))
    update = max(value for moment, value in planned.peaks.items() if "rollout" not in moment)  # nothing is sampled here
    measured = before + peak_bytes(train)
    assert update == pytest.approx(measured, rel=0.1)
    return planned


ENGINES = {
    "generate": lambda policy, sequences: GenerateEngine(policy, max_batch_size=sequences),
    "slots": lambda policy, sequences: SlotEngine(policy, slots=sequences),
}
# prompts' lengths, samples of each, new tokens, vocabulary; and whether the prompts or the tokens take the most
ROLLOUTS = {
    "long responses": ([64, 50, 40, 33], 8, 96, 2048, "tokens"),
    "long responses, few prompts": ([16, 9], 8, 128, 2048, "tokens"),
    "long prompts": ([256, 200] * 4, 2, 16, 2048, "prompts"),
    "many words": ([16, 12, 12, 8], 8, 32, 20_000, "tokens"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ROLLOUTS)
def test_the_planned_peak_of_a_rollout_is_within_ten_percent_of_what_the_allocator_saw(name, engine, make_model):
    prompts, n, new, vocab, moment = ROLLOUTS[name]
    # heads are not grouped: older transformers repeat those of a masked layer
    settings = {"vocab_size": vocab, "eos_token_id": None, "num_key_value_heads": 4}
    policy = silent(make_model(**{**SMALL, **settings}))
    policy.model.requires_grad_(False)
    policy.adapters.add("policy", lora_config(8))
    peaks = check_rollout(policy, ENGINES[engine], prompts, n, new, base="fp32")
    assert max(peaks, key=peaks.get) == f"{moment} of a rollout"


@pytest.mark.parametrize("engine", ENGINES)
def test_the_planned_peak_of_a_rollout_counts_the_weights_that_autocast_copies(engine, make_model):
    """All weights are trained, in float32, and multiplied in bfloat16: copies that stay from token to token."""
    policy = silent(make_model(**{**SMALL, "intermediate_size": 4096, "eos_token_id": None}))
    policy.compute_dtype = torch.bfloat16
    peaks = check_rollout(policy, ENGINES[engine], [16, 12], 4, 32, full=True)
    assert max(peaks.values()) > 2 * sum(p.numel() for p in policy.model.parameters())


def silent(model) -> Policy:
    """A policy that never ends a sequence, so that every sample is as long as it may be."""
    return Policy(model, SimpleNamespace(eos_token_id=None))


def check_rollout(policy, engine, prompts, n, new, **settings) -> dict[str, float]:
    """Sample ``n`` times ``new`` tokens after prompts of these lengths; returns the plan's peaks without the weights."""
    sizes = {"length": max(prompts) + new, "prompt_length": max(prompts), "num_generations": n}
    sizes["rollout_batch_size"] = len(prompts) * n
    job = Job(shape=Shape.of(policy.model.config.to_dict()), method="grpo", device="cpu", **sizes, **settings)
    peaks = plan(job, weights=[Part("weights", 0, "always")]).peaks
    peaks = {moment: value for moment, value in peaks.items() if "rollout" in moment}
    sampler = engine(policy, job.rollout_batch_size)
    requests = [Request([1 + i] * length, n=n, max_new_tokens=new, seed=i) for i, length in enumerate(prompts)]
    samples = []
    measured = peak_bytes(lambda: samples.extend(sampler.generate(requests)))
    assert {len(s.ids) for group in samples for s in group} == {new}
    assert max(peaks.values()) == pytest.approx(measured, rel=0.1)
    return peaks


def test_weights_are_counted_once_however_often_they_are_used(make, make_model):
    made = make("ppo", make_model(tie_word_embeddings=True), use_peft=True, lora_r=2)
    parts = {p.name: p.bytes for p in weights_of([made.policy, made.policy.model], "adamw")}
    trained = sum(p.numel() for p in made.policy.parameters() if p.requires_grad)
    assert parts["trained weights"] == parts["gradients"] == 4 * trained
    assert parts["adamw state"] == 8 * trained
    frozen = sum(p.nbytes for p in made.policy.parameters() if not p.requires_grad)
    assert parts["frozen weights"] == pytest.approx(frozen, rel=0.01)  # and a few buffers


@pytest.mark.parametrize("kind", ["reward_funcs", "guard_reward", "cost_funcs"])
def test_a_judge_that_answers_in_this_process_is_counted_wherever_it_scores(
    kind, make, make_model, tokenizer, tmp_path
):
    for part in (make_model(), tokenizer):
        part.save_pretrained(tmp_path / "judge")
    judge = Judge(tmp_path / "judge")
    more = _frozen_bytes(make("grpo", use_peft=True, **{kind: [judge]})) - _frozen_bytes(make("grpo", use_peft=True))
    assert more == pytest.approx(sum(p.nbytes for p in judge.policy.parameters()), rel=0.01)


def _frozen_bytes(trainer):
    return next(p.bytes for p in weights_of(trainer.models(), "adamw") if p.name == "frozen weights")


def test_the_plan_and_the_peak_are_reported_together():
    made = Plan(Job(shape=find_shape("Qwen2.5-7B")), (Part("weights", 21.3 * GB, "always"),), None)
    assert compare(made, int(20.9 * GB)) == "memory: planned 21.3 GB, peak 20.9 GB (+2%)"


# ---- what the plan settles


def test_the_plan_answers_what_the_config_leaves_open_and_nothing_else(make, make_model, monkeypatch, capsys, run):
    """On a device as large as this very run needs: all is kept, recomputed, recomputed and offloaded."""

    def build(**more):
        model = make_model(num_hidden_layers=8)
        options = {"use_peft": True, "lora_r": 2, "gradient_checkpointing": None, "quiet": False, "max_steps": 1}
        return make("sft", model, **{**options, **more})

    ends = []
    for checkpointing, offload in ((False, False), (True, False), (True, True)):
        monkeypatch.undo()
        needed = plan_of(build(gradient_checkpointing=checkpointing, offload_activations=offload)).tensors
        monkeypatch.setattr("rlhf_fast.trainers.memory.device_bytes", lambda *_, needed=needed: int(needed * 1.001))
        capsys.readouterr()
        made = build()
        assert (made.memory_plan.job.checkpointing, made.memory_plan.job.offload) == (checkpointing, offload)
        assert (made.policy.host_inputs is not None) == offload
        assert made.micro_batch_tokens == made.memory_plan.job.tokens <= made.sizes()["window_tokens"]
        assert "memory: 0.0 GB planned of 0.0 GB: micro_batch_tokens" in capsys.readouterr().out
        ends.append(run(made).weights)
    for end in ends[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ends[0].values(), end.values()))
    made = build(gradient_checkpointing=False, micro_batch_tokens=31)
    assert (made.micro_batch_tokens, made.memory_plan.job.checkpointing) == (31, False)


def test_a_plan_that_does_not_fit_says_so_and_fewer_sequences_are_sampled(make, monkeypatch, capsys):
    monkeypatch.setattr("rlhf_fast.trainers.memory.device_bytes", lambda *_: 1000)
    made = make("grpo", use_peft=True, quiet=False, rollout_batch_size=100)
    assert "it does not fit; try " in capsys.readouterr().out
    assert made.rollout_batch_size == 8
    assert made.rollout_tokens == 8 * made.memory_plan.job.length, "what the plan counts for keys and values"
    monkeypatch.undo()
    assert make("grpo", rollout_batch_size=100).rollout_batch_size is None, "no GPU, no plan"


def test_a_model_without_a_plan_trains_as_the_config_says(make, monkeypatch, capsys):
    monkeypatch.setattr("rlhf_fast.trainers.memory.device_bytes", lambda *_: 10**9)

    def refuse(*_, **__):
        raise UserError("config.json has no hidden_size")

    monkeypatch.setattr("rlhf_fast.run.memory.Shape.of", refuse)
    made = make("sft", quiet=False, gradient_checkpointing=None)
    assert made.memory_plan is None
    assert made.micro_batch_tokens is None
    assert made.policy.model.is_gradient_checkpointing
    assert "no memory plan: config.json has no hidden_size" in capsys.readouterr().out


def test_the_job_of_a_run_says_what_its_config_needs(make):
    """A copy of the weights where the loss has a reference, and the share of the GPU that a vLLM keeps."""
    for method, more, reference in (
        ("sft", {}, False),
        ("dpo", {}, True),
        ("dpo", {"loss_type": ["orpo"]}, False),
        ("grpo", {"beta": 0.0}, False),
        ("grpo", {"beta": 0.0, "kl_coef": 0.1}, True),
        ("ppo", {}, True),
    ):
        made = make(method, **more)
        assert job_of(made).reference == made.args.needs_reference == reference
    vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.25}
    assert job_of(make("grpo", use_peft=True, **vllm)).vllm_share == 0.25
    assert job_of(make("grpo", use_peft=True)).vllm_share == 0


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]], ids=["layers", "head"])
def test_the_plan_counts_the_weights_that_rollouts_merge(targets, make):
    """As many bytes as the merge takes; none unless it is asked for, nor in full fine-tuning."""
    settings = {"use_peft": True, "lora_target_modules": targets}
    made = make("grpo", **settings, rollout_merge_lora=True)
    merged = [p for p in plan_of(made).parts if p.name == "weights with the adapter in them"]
    assert {p.when for p in merged} == {"prefill", "decode"}
    assert {p.bytes for p in merged} == {made.policy.adapters.merged_bytes("policy")}
    for other in (make("grpo", **settings), make("grpo", rollout_merge_lora=True)):
        assert not job_of(other).merged_bytes


def test_keys_and_values_are_planned_where_the_policy_itself_writes(make):
    """A vLLM beside it takes its share instead, for good or while it samples; evaluations are the policy's own."""
    vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.25, "use_peft": True}
    here, colocated = job_of(make("grpo", use_peft=True)), job_of(make("grpo", **vllm))
    sleeping = job_of(make("grpo", **vllm, vllm_enable_sleep_mode=True))
    assert [j.writes for j in (here, colocated, sleeping)] == [True, False, False]
    made = {job: plan(replace(job, device="cuda"), 10**9) for job in (here, colocated, sleeping)}
    assert made[here].total("prefill") and made[here].total("decode")
    for job in (colocated, sleeping):
        assert not made[job].total("prefill") and not made[job].total("decode")
    shares = [[(p.bytes, p.when) for p in made[job].parts if "vLLM" in p.name] for job in (here, colocated, sleeping)]
    assert shares == [[], [(0.25e9, "outside")], [(0.25e9, "vllm")]]
    weights = made[sleeping].total("always")
    assert made[sleeping].needed == max(made[sleeping].tensors, weights + 0.25e9) + made[sleeping].total("outside")
    trainer = make("grpo", **vllm)
    trainer.eval_records = trainer.train_records
    assert job_of(trainer).writes and plan(job_of(trainer), 10**9).total("decode")


# ---- the rehearsal


def everything(trainer):
    """What a rehearsal must leave alone."""
    weights = {n: p.detach().clone() for n, p in trainer.policy.named_parameters()}
    gradients = {n: p.grad for n, p in trainer.policy.named_parameters()}
    return copy.deepcopy(
        (
            weights,
            gradients,
            trainer.metrics.state(),
            trainer.optimizer.state_dict(),
            rng_state(),
            float(trainer.window_loss),
        )
    )


@pytest.mark.parametrize("budget", [None, 60])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_a_rehearsal_leaves_no_trace(method, lora, budget, make, run):
    """The same run, bit for bit, with and without."""
    runs = []
    for tried in (False, True):
        made = make(method, use_peft=lora, memory_check=tried, micro_batch_tokens=budget, max_steps=2)
        runs.append(run(made))
    assert runs[0].steps == runs[1].steps
    assert all(torch.equal(a, b) for a, b in zip(runs[0].weights.values(), runs[1].weights.values()))


def test_a_rehearsal_restores_random_state_and_what_losses_note_down(make):
    dropping = make("sft", use_peft=True, lora_dropout=0.5, memory_check=True)
    dropping.policy.train()
    before = torch.get_rng_state()
    check(dropping)
    assert torch.equal(torch.get_rng_state(), before)
    moving = make("ppo", memory_check=True)
    check(moving)
    assert moving.watched == {}


def forwards(trainer):
    """Tokens of every forward pass of the policy from here on."""
    seen = []
    trainer.policy.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    return seen


@pytest.mark.parametrize("method", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_a_rehearsal_runs_the_largest_micro_batch_that_can_come(method, make):
    made = make(method, memory_check=True, micro_batch_tokens=60, max_steps=2, gradient_accumulation_steps=2)
    seen = forwards(made)
    check(made)
    rehearsed = max(seen)
    sizes = made.sizes()
    assert sizes["record_tokens"] <= rehearsed <= 60
    seen.clear()
    made.train()
    assert max(seen) <= rehearsed


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_rehearsal_shares_no_rows_that_different_prompts_would_not(method, make, scripted):
    """Prompts of 30 tokens, responses of 16: four records fill a budget of 200."""
    prompts = [{"prompt": c * 30} for c in "abcdefgh"]
    engine = scripted({p["prompt"]: ["abc", "abcdefg", "x!", "to be or not"] for p in prompts})
    made = make(method, rows=prompts, engine=engine, micro_batch_tokens=200, per_device_train_batch_size=8)
    length = made.sizes()["length"]
    assert made.tokens(made.largest()) == 200 // length * length


def test_a_rehearsal_carries_what_a_step_holds_besides(make):
    """Two moments in float32; and gradients, as PPO takes two micro-batches a step."""
    made = make("ppo", memory_check=True)
    trained = sum(p.nbytes for p in made.parameters)
    assert _ballast(made).nbytes == 2 * trained + trained
    made.train()
    # the moments are there now, but of the critic's own head over words, which nothing trains
    assert trained <= _ballast(made).nbytes < 1.2 * trained


def test_a_rehearsal_of_ppo_trains_the_policy_though_warm_up_comes_first(make, monkeypatch):
    made = make("ppo", memory_check=True, critic_warmup_steps=20)
    asked = []
    monkeypatch.setattr(made.policy, "logprobs", lambda *a, f=made.policy.logprobs, **k: asked.append(1) or f(*a, **k))
    check(made)
    assert asked
    assert made.step == 0


class OutOfMemory:
    """A device that holds passes of at most ``limit`` tokens."""

    def __init__(self, trainer, limit):
        trainer.policy.model.get_input_embeddings().register_forward_pre_hook(self)
        self.limit = limit

    def __call__(self, module, args):
        if args[0].numel() > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_micro_batch_that_does_not_fit_is_halved_until_it_does(make, capsys, run):
    made = make("sft", memory_check=True, micro_batch_tokens=64, quiet=False)
    OutOfMemory(made, 20)
    before = everything(made)
    check(made)
    assert made.micro_batch_tokens <= 20
    said = capsys.readouterr().out
    assert "does not fit (in the forward pass); going on with micro_batch_tokens" in said
    after = everything(made)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values()))
    assert before[1:4] == after[1:4]
    assert len(run(made).losses) == 2, "and training goes on within the limit"


def test_a_record_that_does_not_fit_alone_says_what_takes_the_memory_and_what_to_change(make):
    for more, remedy in (
        ({"gradient_checkpointing": False}, "set gradient_checkpointing: true"),
        ({"gradient_checkpointing": True}, "set offload_activations: true"),
        ({"gradient_checkpointing": True, "offload_activations": True}, r"halve max_length \(now 1024\)"),
    ):
        made = make("sft", memory_check=True, micro_batch_tokens=64, **more)
        OutOfMemory(made, 3)
        with pytest.raises(UserError, match=rf"out of memory in the forward pass of the smallest .*GB\); {remedy}"):
            made.train()
        assert all(p.grad is None for p in made.policy.parameters())


# ---- token budgets


def test_a_budget_fills_micro_batches_longest_first(make):
    made = make("sft", micro_batch_tokens=20, per_device_train_batch_size=5)
    parts = made.micro_batches(list(made.train_records))
    sizes = [made.tokens(part) for part in parts]
    assert sorted(len(r[0]) for part in parts for r in part) == sorted(len(r[0]) for r in made.train_records)
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) <= 20
    assert sum(sizes[:2]) > 20, "what fits together is together"


def test_a_record_larger_than_the_budget_is_alone(make):
    made = make("dpo", micro_batch_tokens=1)
    assert [len(part) for part in made.micro_batches(list(made.train_records))] == [1] * 5


def test_bundles_stay_together_and_are_cut_only_where_they_exceed_the_budget(make):
    made = make("sft", micro_batch_tokens=30)
    records = sorted(made.train_records, key=lambda r: len(r[0]))
    made.bundles = lambda records: [[0, 4], [1, 2, 3]]
    lengths = [len(r[0]) for r in records]
    assert sum(lengths[1:4]) <= 30
    assert sorted(made.split(records)) == [[0, 4], [1, 2, 3]]
    made.micro_batch_tokens = lengths[1] + lengths[2]
    parts = made.split(records)
    assert [1, 2] in parts, "siblings as long as they fit"
    assert sorted(i for part in parts for i in part) == [0, 1, 2, 3, 4]


def test_evaluation_and_passes_without_gradients_keep_to_the_budget(make):
    for method in ("dpo", "grpo", "ppo"):
        made = make(method, micro_batch_tokens=40, max_steps=1)
        seen = forwards(made)
        made.train()
        assert max(seen) <= max(40, made.sizes()["record_tokens"])
    made = make("sft", micro_batch_tokens=20)
    made.eval_records = made.train_records
    one = make("sft", per_device_train_batch_size=8)
    one.eval_records = one.train_records
    seen = forwards(made)
    assert made.evaluate()["eval_loss"] == pytest.approx(one.evaluate()["eval_loss"], rel=1e-6)
    assert max(seen) <= 20


def test_senseless_settings_are_refused(settings):
    with pytest.raises(UserError, match="micro_batch_tokens is 0; it must be at least 1, or unset"):
        SFTConfig(**settings(micro_batch_tokens=0))
    with pytest.raises(UserError, match="offload_activations moves what gradient_checkpointing keeps"):
        SFTConfig(**settings(offload_activations=True))


def test_offloaded_activations_change_no_bit_of_a_run(make, run):
    runs = []
    for offload in (False, True):
        made = make("grpo", use_peft=True, gradient_checkpointing=True, offload_activations=offload, max_steps=2)
        runs.append(run(made))
    assert made.policy.host_inputs.moved_bytes > 0
    assert runs[0].steps == runs[1].steps
    assert all(torch.equal(a, b) for a, b in zip(runs[0].weights.values(), runs[1].weights.values()))


def test_the_plan_knows_the_host_memory_of_offloaded_activations(make, run):
    settings = {"gradient_checkpointing": True, "offload_activations": True, "per_device_train_batch_size": 5}
    made = make("sft", use_peft=True, max_steps=1, **settings)
    planned = plan_of(made).host
    run(made)
    assert made.policy.host_inputs.total_bytes == planned > 0
