"""What the algorithms share that learn from their own samples: prompts in, scored responses, greedy evaluation."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.data.batch import Example, Experience, Prompt, TokenBatch
from rlhf_fast.data.prepare import Report, prepare_prompts
from rlhf_fast.errors import StepRefused, UserError
from rlhf_fast.models import Policy
from rlhf_fast.rewards import resolve_all
from rlhf_fast.rewards.experience import ScoredRollouts, annotate, blank_experience, restore_experience
from rlhf_fast.rollout import Engine, awake, check_for_rl, engine_for
from rlhf_fast.run.metrics import MetricsLog

from .alarms import alarms_of, sentence
from .config import RLConfig
from .engines import WeightSync, build_engine, shared_engine
from .evaluation import answers
from .guard import Guard
from .importance import alarm, distance_of, weigh
from .lagrangian import Lagrangian, cost_functions
from .trainer import Trainer

logger = logging.getLogger(__name__)


class RLTrainer(Trainer):
    """Base of PPO and GRPO.

    Args:
        reward_funcs: one or more reward functions or their names, see :mod:`rlhf_fast.rewards`; those of ``args`` when None.
        engine: a rollout engine; as ``args`` say when None. Before every rollout it gets the weights: one that can swap
            adapters the folder of the policy's (``update(folder, step)``), any other shares them (``update(None, step)``).
    """

    config_class = RLConfig
    record_class = Experience

    def __init__(self, model, reward_funcs=None, args=None, engine: Engine | None = None, **kwargs):
        args = args if args is not None else self.config_class()
        self.functions, self.names = resolve_all(reward_funcs if reward_funcs is not None else args.reward_funcs)
        self.check_rewards(args)
        self.held_out, _ = resolve_all(args.guard_reward)  # rewards that nothing learns from
        self.costs: list[Any] = []
        self.lagrangian: Lagrangian | None = None  # where costs have a limit
        super().__init__(model, args, **kwargs)
        with self.whole():  # what can write with the policy is tried
            engine = engine or build_engine(args, self.policy, self._engine_in_process)
        self.engine = shared_engine(engine, self.ranks)
        check_for_rl(self.engine, temperature=args.temperature)
        probe = min((p.input_ids for p in self.train_records), key=len)
        self.sync = WeightSync(self.engine, self.policy, args, probe, self.ranks)
        scoring = {"weights": args.reward_weights, "costs": self.costs}
        scoring |= {"held_out": self.held_out, "share": args.guard_share}
        self.rollouts = ScoredRollouts(self.engine, self.policy, self.functions, self.names, **scoring)
        self.completions: list[dict[str, Any]] = []  # of the last evaluation: prompt, completion, rewards, ...
        self.judged: dict[str, Tensor] = {}  # of each of those: reward, cost, held_out
        self.rollouts.check(self.train_records)
        if self.eval_records is not None:
            self.rollouts.check(self.eval_records)

    @classmethod
    def extra_arguments(cls, config: RLConfig) -> dict[str, Any]:
        return {"reward_funcs": config.reward_funcs}

    def _engine_in_process(self) -> Engine:
        """One that samples from the policy's own weights."""
        slots = self.rollout_batch_size or self.args.rollout_batch_size
        options = {"max_tokens": self.rollout_tokens, "merge_lora": self.args.rollout_merge_lora}
        return engine_for(self.policy, slots=slots, longest=self.sizes()["length"], **options)

    def check_rewards(self, args: RLConfig) -> None:
        """Raise UserError when there is nothing to learn from."""
        if not self.functions:
            raise UserError("reward_funcs is empty: name at least one, e.g. --reward_funcs answer")

    @property
    def best_metric(self) -> str:
        """What the policy does not learn from tells which policy is the best, where there is such."""
        return "held_out" if self.args.guard_reward else "reward"

    def own_callbacks(self) -> list[Any]:
        return [] if self.args.guard == "off" else [Guard(self.args.guard, self.args.guard_limits)]

    def add_reference(self) -> None:
        """Hold a reference beside the policy, and say which."""
        self.policy.add_reference()
        self.say(f"reference: {self.policy.reference}")

    def add_costs(self) -> None:
        """Have responses' costs scored, and their mean limited, if the config names costs."""
        if self.args.has_costs:
            self.costs = resolve_all(cost_functions(self.policy, self.args, self.say))[0]
            self.lagrangian = Lagrangian(self.args, self.ranks)

    @classmethod
    def tokenize(cls, records, tokenizer, args: RLConfig, **options) -> tuple[list[Prompt], Report]:
        limits = {"max_prompt_length": args.max_prompt_length, "allow_truncation": args.allow_truncation}
        return prepare_prompts(records, tokenizer, **limits, **options)

    @property
    def rollout_batch_size(self) -> int | None:
        """Most sequences sampled at once by the memory plan, which may be fewer than asked; None without a plan."""
        return None if self.memory_plan is None else self.memory_plan.job.rollout_batch_size

    @property
    def rollout_tokens(self) -> int | None:
        """Most tokens whose keys and values rollouts may hold by the memory plan; None without a plan: what is free then."""
        if self.memory_plan is not None:
            return self.memory_plan.job.rollout_batch_size * self.memory_plan.job.length
        # what is free differs from run to run, and with it who is written beside whom
        return 2 * self.args.rollout_batch_size * self.sizes()["length"] if self.args.deterministic else None

    def examples(self, record: Experience) -> list[Example]:
        return [record.example]

    def models(self) -> list[nn.Module]:
        """The policy, and what scores its responses: reward and cost models, and AI judges that are not behind a URL."""
        scorers = [getattr(f, "policy", None) for f in [*self.functions, *self.costs, *self.held_out]]
        return [self.policy, *(s for s in scorers if isinstance(s, Policy) and s is not self.policy)]

    def sizes(self) -> dict[str, Any]:
        """As if every response were as long as it may be."""
        a = self.args
        prompt = max(len(p.input_ids) for p in self.train_records)
        length = prompt + a.max_completion_length
        return {
            "length": length,
            "prompt_length": prompt,
            "record_tokens": length,
            "micro_batch_tokens": self.micro_batch_tokens or length * a.per_device_train_batch_size,
            "window_tokens": length * a.per_device_train_batch_size * a.gradient_accumulation_steps,
            "rollout_batch_size": a.rollout_batch_size,
        }

    def largest(self) -> list[Experience]:
        """The longest prompt with responses of full length, the last one cut to fill the budget; nothing is sampled."""
        sizes, prompt = self.sizes(), max((p.input_ids for p in self.train_records), key=len)
        tokens = max(min(sizes["micro_batch_tokens"], sizes["window_tokens"]), sizes["length"])
        whole, rest = divmod(tokens, sizes["length"])
        lengths = [sizes["length"]] * whole + [rest] * (rest > len(prompt))
        # real prompts differ: rows that these shared would not be tried
        vocabulary = self.policy.model.get_input_embeddings().num_embeddings
        prompts = [[(prompt[0] + i) % vocabulary, *prompt[1:]] for i in range(len(lengths))]
        return [blank_experience(p, n, self.entries, self.policy.device) for p, n in zip(prompts, lengths)]

    @property
    def entries(self) -> list[str]:
        """The per-token entries of a record that ``losses`` reads."""
        raise NotImplementedError

    def size(self, record: Experience) -> float:
        return sum(record.example.response_mask)

    @property
    def corrects(self) -> bool:
        """Whether advantages are weighed for the difference between the engine's log-probabilities and the trainer's."""
        asked = self.args.vllm_importance_sampling_correction
        return "lora_swap" in self.engine.capabilities if asked is None else asked

    def compare(self, experiences: list[Experience]) -> None:
        """Measure how far engine and trainer are apart on what was sampled, and weigh advantages by it where that is asked for."""
        a = self.args
        self.metrics.add(*distance_of(experiences))
        if self.corrects:
            bounds = a.vllm_importance_sampling_clip_min or 0.0, a.vllm_importance_sampling_clip_max
            self.metrics.add(*weigh(experiences, a.vllm_importance_sampling_mode, *bounds))

    @torch.no_grad()
    def respond(self, prompts: list[Prompt], n: int) -> tuple[list[Experience], dict[str, float]]:
        """``n`` scored responses to every prompt, siblings adjacent, and the metrics of the rollout. Collective.

        A rank may have no prompts; all fail where one does.
        """
        a = self.args
        limits = {"max_new_tokens": a.max_completion_length, "temperature": a.temperature}
        seed = a.seed * 1_000_003 + self.first_row

        def sample() -> tuple[list[Experience], dict[str, float]]:
            return self.rollouts.sample(prompts, n=n, seed=seed, **limits) if prompts else ([], {})

        with awake(self.engine):
            with self.timed("sync"):
                agreement = self.sync(self.step)
            experiences, metrics = self.ranks.together(sample)
        if prompts:
            self.times.add(self.rollouts.seconds)
        return experiences, {**metrics, **agreement}

    def watch(self, share: float, **figures: Tensor) -> None:
        """Add up what alarms look at before the step: means over a ``share`` of the window's tokens."""
        so_far = self.watched
        self.watched = {**so_far, **{n: so_far.get(n, 0.0) + x.detach() * share for n, x in figures.items()}}

    def watch_policy(self, metrics: dict[str, Tensor], share: float) -> None:
        """Watch how far the policy has moved since it sampled, by the metrics of its loss."""
        # the ratio's excess over 1, so that a window without a token has none
        self.watch(share, kl=metrics["approx_kl"], ratio=metrics["ratio_mean"] - 1.0)

    def inspect(self, figures: dict[str, float]) -> None:
        if "ratio" in figures:
            figures = {**figures, "ratio": 1.0 + figures["ratio"]}
        rung = {} if self.args.alarms == "off" else alarms_of(figures, self.args.alarm_limits)
        if rung and self.args.alarms == "stop":
            raise StepRefused(f"step {self.step + 1} is not taken: {sentence(rung)}")
        if rung and self.accelerator.is_main_process:
            logger.warning("step %d: %s", self.step + 1, sentence(rung))
        self.metrics.add({f"alarms/{name}": 1.0 for name in rung}, 1.0)

    def after_log(self, figures: dict[str, float]) -> None:
        alarm(figures, self.args.vllm_logprob_tolerance, self.step, type(self.engine).__name__)

    def annotate(self, experiences: list[Experience], *names: str, **passes: Callable[[TokenBatch], Tensor]) -> None:
        """Fill per-token entries in the micro-batches that fit in memory.

        Args:
            names: ``old_logprobs``, ``ref_logprobs``, or both.
            passes: further entries by name, each with what its pass returns.
        """
        roles = {"old_logprobs": "policy", "ref_logprobs": "reference"}
        logprobs = {name: functools.partial(self.logprobs, role=roles[name]) for name in names}
        annotate(self.micro_batches(experiences), {**logprobs, **passes}, self.pack)

    def logprobs(self, batch: TokenBatch, role: str) -> Tensor:
        """(N,) log-probabilities under ``role``, at the sampling temperature."""
        return self.policy.logprobs(batch, role=role, temperature=self.args.temperature)

    def assess(self) -> dict[str, float]:
        """Greedy answers to held-out prompts, scored by the reward functions, and the KL where there is a reference."""
        with self.whole():
            return answers(self)

    def after_evaluation(self, log: MetricsLog) -> None:
        log.completions(self.step, self.completions, shown=self.args.num_completions_to_print)

    def extra_state(self) -> dict[str, Any]:
        return {} if self.lagrangian is None else {"lagrangian": self.lagrangian.state()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if self.lagrangian is not None:
            self.lagrangian.load_state(state["lagrangian"])

    def restore_record(self, fields: dict[str, Any]) -> Experience:
        return restore_experience(fields, self.policy.device)
