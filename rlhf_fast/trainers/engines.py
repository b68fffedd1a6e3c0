"""Which engine a run samples with, and how the policy's weights get there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_fast.errors import UserError
from rlhf_fast.models import Policy
from rlhf_fast.rollout import ColocatedEngine, Engine, ServerEngine, check_logprobs, end_of_sequence_ids

from .config import RLConfig


def build_engine(args: RLConfig, policy: Policy, in_process: Callable[[], Engine]) -> Engine:
    """The engine that ``args`` ask for; ``in_process`` makes the one that shares the policy's weights.

    Raises:
        UserError: a server does not answer, vLLM is missing, or there is no adapter that could be sent.
    """
    if not args.use_vllm:
        return in_process()
    check_adapter_only("use_vllm", policy)
    if args.vllm_mode == "colocate":
        share = args.vllm_gpu_memory_utilization
        sleep = args.vllm_enable_sleep_mode
        return ColocatedEngine(policy, allow_sleep=sleep, gpu_memory_utilization=share, seed=args.seed)
    # runs that share a server must not unload each other's adapter
    name = re.sub(r"[^A-Za-z0-9_-]", "-", Path(args.output_dir).resolve().name)[-40:].strip("-")
    return ServerEngine(
        args.vllm_server_base_url,
        stop_ids=end_of_sequence_ids(policy.model, policy.tokenizer),
        adapter_name=name or "policy",
        api_key=os.environ.get("RLHF_FAST_API_KEY"),
        timeout=args.vllm_request_timeout,
        patience=args.vllm_server_timeout,
        allow_sleep=args.vllm_enable_sleep_mode,
    )


def check_adapter_only(what: str, policy: Policy) -> None:
    """Refuse an engine with weights of its own where the run trains more than an adapter, which is all that is sent."""
    if not policy.adapters.names:
        raise UserError(
            f"{what} samples with weights of its own and gets the adapter only, and this run trains all weights: add "
            "use_peft, or leave use_vllm out to sample in process"
        )


class WeightSync:
    """Gives an engine the policy's weights before every rollout, and checks that it has them.

    Args:
        folder: where the adapter is saved for engines that load it; they must be able to read it.
        probe: token ids of a prompt for :func:`check_logprobs`.
    """

    def __init__(self, engine: Engine, policy: Policy, args: RLConfig, probe: Sequence[int], world: int = 1) -> None:
        self.engine, self.policy, self.args, self.probe = engine, policy, args, probe
        self.folder = Path(args.output_dir) / "rollout"
        self.sends = "lora_swap" in engine.capabilities
        if self.sends:
            check_adapter_only(type(engine).__name__, policy)
        if self.sends and world > 1:
            raise UserError(
                f"{type(engine).__name__} serves one process, and this run has {world}; give one process several servers in "
                "vllm_server_base_url"
            )

    def __call__(self, step: int) -> dict[str, float]:
        """The weights as they are at ``step``; how far both sides' log-probabilities are apart, as a metric.

        Raises:
            UserError: they are too far apart, or the engine cannot load the adapter.
        """
        if not self.sends:
            self.engine.update(None, step)
            return {}
        folder = self.folder / f"step-{step:08d}"
        self.policy.adapters.save(self.policy.role, folder)
        self.engine.update(folder, step)
        for old in self.folder.iterdir():
            if old != folder:
                shutil.rmtree(old)
        difference = check_logprobs(
            self.engine,
            self.policy,
            self.probe,
            temperature=self.args.temperature,
            tolerance=self.args.vllm_logprob_tolerance,
        )
        return {"sampling/canary_logp_difference": difference}
