"""Runs that sample through a server: the same run as in process, and what happens when the server does not play along."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("uvicorn")

import rlhf_fast.trainers.engines
from rlhf_fast import GRPOConfig, GRPOTrainer, PPOConfig, PPOTrainer
from rlhf_fast.errors import RolloutError, UserError
from rlhf_fast.models import load
from rlhf_fast.models.adapters import lora_config
from rlhf_fast.rollout import CAPABILITIES, ServerEngine
from rlhf_fast.run.checkpoint import list_checkpoints
from rlhf_fast.trainers import loop
from tests.rollout.conftest import Served
from tests.rollout.test_server import Faults

ROWS = [{"prompt": f"{i}+{i * 3 % 7}="} for i in range(8)]


class Recorder:
    """A reward, and the token ids of everything it was shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, completions, completion_ids, **_):
        self.seen.append([list(ids) for ids in completion_ids])
        return [sum(c.count(v) for v in "aeiou") / 4 for c in completions]


@pytest.fixture
def served(make_model, tokenizer):
    """served(wrap=None, **changes of the base) -> the base that is trained, served; stopped after the test."""
    running = []

    def start(wrap=None, **config):
        policy = load(make_model(**config), tokenizer=tokenizer, device="cpu")
        running.append(Served(policy, wrap, slots=8).start())
        return running[-1]

    yield start
    for each in running:
        each.stop()


@pytest.fixture
def run_grpo(make_model, tokenizer, settings):
    """run_grpo(url or None, **settings) -> a trainer of four responses to each of two prompts a step, and its recorder."""

    def make(url=None, peft=True, kind=GRPOTrainer, **more):
        options = {"num_generations": 4} if kind is GRPOTrainer else {"num_ppo_epochs": 1}
        options |= {"max_completion_length": 10, "learning_rate": 0.02, "max_steps": 2, "temperature": 0.9, **more}
        if url is not None:
            options |= {"use_vllm": True, "vllm_server_base_url": url, "vllm_server_timeout": 0.0}
        config = GRPOConfig if kind is GRPOTrainer else PPOConfig
        reward = Recorder()
        trainer = kind(
            make_model(),
            reward,
            args=config(**settings(**options)),
            train_dataset=ROWS,
            processing_class=tokenizer,
            peft_config=lora_config(r=4, alpha=8) if peft else None,
        )
        return trainer, reward

    return make


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", [GRPOTrainer, PPOTrainer])
def test_a_run_through_a_server_is_the_run_in_process(run_grpo, served, run, sgd, kind):
    """Two steps whose updates change what is sampled next: the same tokens, the same weights to fp32's precision."""
    one, here = run_grpo(kind=kind, learning_rate=1.0)
    two, there = run_grpo(served().url, kind=kind, learning_rate=1.0)
    steps = [run(trainer).steps for trainer in (one, two)]
    assert there.seen == here.seen and len(here.seen) == 2
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(two)[name], weight, atol=1e-5, rtol=1e-4)
    assert all(0 <= step["sampling/canary_logp_difference"] < 1e-5 for step in steps[1])
    assert not any("sampling/canary_logp_difference" in step for step in steps[0])


def test_the_server_holds_the_last_version_only_and_so_does_the_run_folder(run_grpo, served):
    server = served()
    trainer, _ = run_grpo(server.url)
    trainer.train()
    name = Path(trainer.args.output_dir).name
    assert list(server.service.models.roles) == ["base", f"{name}-v1"]  # step 1 was the last to sample
    assert [f.name for f in (Path(trainer.args.output_dir) / "rollout").iterdir()] == ["step-00000001"]


def test_several_servers_share_a_run(run_grpo, served):
    one, here = run_grpo()
    two, there = run_grpo([served().url, served().url])
    one.train()
    two.train()
    assert here.seen == there.seen


def test_a_server_that_may_sleep_sleeps_through_the_update(run_grpo, served, monkeypatch):
    server = served()
    trainer, _ = run_grpo(server.url, vllm_enable_sleep_mode=True)
    asleep, step = [], loop.optimizer_step
    monkeypatch.setattr(loop, "optimizer_step", lambda *given: (asleep.append(server.worker.asleep), step(*given))[1])
    trainer.train()
    assert asleep == [True, True]


def test_training_all_weights_is_refused_because_only_an_adapter_is_sent(run_grpo, served, make_model):
    url = served().url
    with pytest.raises(
        UserError, match="use_vllm samples with weights of its own.*add use_peft, or leave use_vllm out"
    ):
        run_grpo(url, peft=False)


def test_a_server_of_another_base_stops_the_run_before_its_first_step(run_grpo, served):
    server = served(initializer_range=0.3)
    trainer, reward = run_grpo(server.url)
    with pytest.raises(UserError, match=f"{server.url} differ from the trainer's by .* serve the base that is trained"):
        trainer.train()
    assert reward.seen == []
    tolerant, reward = run_grpo(server.url, vllm_logprob_tolerance=1e9)
    tolerant.train()
    assert len(reward.seen) == 2


def test_a_run_whose_server_dies_is_saved_there_and_goes_on_to_the_same_end(run_grpo, served):
    """Killed before its third rollout, started again, resumed: bit for bit the weights of a run that never stopped. The
    last bits of a server's log-probabilities depend on who else it writes for, so nothing is corrected by them here."""
    run_grpo = functools.partial(run_grpo, vllm_importance_sampling_correction=False)
    whole, _ = run_grpo(served().url, max_steps=4, save_steps=100)
    whole.train()

    server = served()
    trainer, _ = run_grpo(server.url, max_steps=4, save_steps=100)
    trainer.engine.backoff = 0.01
    trainer.after_step = lambda: trainer.step == 2 and server.kill()
    with pytest.raises(RolloutError, match=r"cannot be reached.*saved at step 2; continue with --resume"):
        trainer.train()
    folder = trainer.args.output_dir
    assert [p.name for p in list_checkpoints(Path(folder) / "checkpoints")] == ["step-00000002"]
    again, _ = run_grpo(served().url, max_steps=4, save_steps=100, output_dir=folder)
    again.train(resume_from_checkpoint=True)
    for name, weight in weights(whole).items():
        assert torch.equal(weights(again)[name], weight), name


def off_by(ratio):
    """A middleware: log-probabilities of rollouts (not of the probe's single sample) are reported lower, so that the policy
    finds every token ``ratio`` times as likely as the engine did."""

    def shift(answer):
        for choice in answer["choices"] if len(answer["choices"]) > 1 else ():
            reported = choice["logprobs"]["token_logprobs"]
            choice["logprobs"]["token_logprobs"] = [x - math.log(ratio) for x in reported]
        return answer

    def wrap(app):
        faults = Faults(app)
        faults.always = shift
        return faults

    return wrap


@pytest.mark.parametrize(
    ("correction", "by"),
    [
        ({"mode": "token_truncate", "clip_max": 2.0}, 1.25),
        ({"mode": "token_truncate", "clip_max": 1.2}, 1.2),
        ({"mode": "sequence_truncate", "clip_max": 1.2}, 1.2),
    ],
)
def test_the_loss_is_weighed_by_how_much_likelier_the_policy_finds_what_was_sampled(
    run_grpo, served, run, correction, by, caplog
):
    """Every ratio is 1.25, of a token, and more of a response: weights are the same everywhere, and so scale the gradient."""
    settings = {f"vllm_importance_sampling_{name}": value for name, value in correction.items()}
    (plain,) = run(run_grpo(served().url, max_steps=1)[0]).steps
    (step,) = run(run_grpo(served(off_by(1.25)).url, max_steps=1, **settings)[0]).steps
    assert step["grad_norm"] == pytest.approx(by * plain["grad_norm"], rel=1e-4)
    assert step["sampling/importance_sampling_ratio/mean"] == pytest.approx(by, rel=1e-4)
    assert step["sampling/importance_sampling_ratio/max"] == pytest.approx(by, rel=1e-4)
    assert step["sampling/sampling_logp_difference/mean"] == pytest.approx(math.log(1.25), rel=1e-3)
    assert plain["sampling/sampling_logp_difference/mean"] < 1e-5
    assert caplog.text.count("step 1: the log-probabilities of what ServerEngine sampled differ") == 1  # the alarm


def test_a_response_is_weighed_by_the_product_of_its_ratios(run_grpo, served, run):
    """Nothing is cut: a response of T tokens weighs 1.25^T, more than any of its tokens."""
    settings = {"vllm_importance_sampling_mode": "sequence_truncate", "vllm_importance_sampling_clip_max": 1e6}
    (plain,) = run(run_grpo(served().url, max_steps=1)[0]).steps
    (step,) = run(run_grpo(served(off_by(1.25)).url, max_steps=1, **settings)[0]).steps
    assert step["grad_norm"] > 1.3 * plain["grad_norm"]


def test_an_engine_of_ones_own_gets_the_adapter_too(run_grpo, served, make_model, tokenizer, settings):
    """A ServerEngine handed to the trainer, as from Python; with a prompt's deadline from the config when it builds one."""
    server = served()
    trainer, _ = run_grpo(server.url, vllm_request_timeout=7.0)
    assert trainer.engine.timeout == 7.0 and trainer.engine.stop_ids == (0,)
    engine = ServerEngine(server.url, adapter_name="mine", patience=0.0)
    args = GRPOConfig(**settings(num_generations=4, max_completion_length=5, max_steps=1))
    options = {"train_dataset": ROWS, "processing_class": tokenizer, "engine": engine}
    GRPOTrainer(make_model(), Recorder(), args=args, peft_config=lora_config(r=2), **options).train()
    assert "mine-v0" in server.service.models.roles
    with pytest.raises(UserError, match="ServerEngine samples with weights of its own"):
        GRPOTrainer(make_model(), Recorder(), args=args, **options)


def test_vllm_in_process_is_chosen_by_name_and_gets_its_settings(run_grpo, monkeypatch):
    """This model object has no name that vLLM could load it by; what vLLM would be asked for is in test_server."""
    options = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.4, "seed": 3}
    with pytest.raises(UserError, match="vllm_mode colocate loads the base by its name"):
        run_grpo(**options)
    with pytest.raises(UserError, match="choose one of server, colocate"):
        run_grpo(use_vllm=True, vllm_mode="colocated")
    asked = []
    monkeypatch.setattr(rlhf_fast.trainers.engines, "ColocatedEngine", lambda _, **given: asked.append(given) or Idle())
    run_grpo(**options, vllm_enable_sleep_mode=True)
    assert asked == [{"allow_sleep": True, "gpu_memory_utilization": 0.4, "seed": 3}]


class Idle:
    capabilities = CAPABILITIES
