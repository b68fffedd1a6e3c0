"""Which engine a run samples with, and how the policy's weights get there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.errors import UserError
from rlhf_fast.models import Policy
from rlhf_fast.rollout import (
    ColocatedEngine,
    Engine,
    Request,
    Sample,
    ServerEngine,
    check_logprobs,
    end_of_sequence_ids,
)
from rlhf_fast.run.distribution import Ranks

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


def shared_engine(engine: Engine, ranks: Ranks) -> Engine:
    """``engine`` as one of several processes uses it: servers are led by the first, what runs in a process is its own.

    Raises:
        UserError: the engine loads adapters and serves one process only.
    """
    if len(ranks) == 1 or "lora_swap" not in engine.capabilities:
        return engine
    if not isinstance(engine, ServerEngine):
        raise UserError(
            f"{type(engine).__name__} serves one process, and this run has {len(ranks)}; sample from servers (vllm_mode "
            "server), or leave use_vllm out"
        )
    return SharedServers(engine, ranks)


class SharedServers:
    """Servers that all processes of a run share: the first one sends weights, wakes them and lets them sleep while the others
    wait, and every process has its own prompts answered. All calls but ``generate`` and ``probe`` are collective.
    """

    def __init__(self, engine: ServerEngine, ranks: Ranks) -> None:
        self.engine, self.ranks, self.capabilities = engine, ranks, engine.capabilities

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Continue every request; entry i holds the ``n`` samples of request i."""
        return self.engine.generate(requests)

    def probe(self, request: Request) -> dict[str, Sample]:
        """One sample from every server that holds the current weights, by its URL."""
        return self.engine.probe(request)

    def update(self, adapter_dir: str | Path | None, version: int) -> None:
        """Load the adapter in a folder that the servers can read; all processes ask for it from now on."""
        self._lead(lambda: self.engine.update(adapter_dir, version))

    def reset_cache(self) -> None:
        """Forget every cached prefix."""
        self._lead(self.engine.reset_cache)

    def sleep(self) -> None:
        """Give the servers' GPU memory back until :meth:`wake`."""
        self._lead(self.engine.sleep)

    def wake(self) -> None:
        """Undo :meth:`sleep`."""
        self._lead(self.engine.wake)

    def _lead(self, work: Callable[[], None]) -> None:
        """Do it on the first process; which servers hold which weights after that is known to all."""

        def lead() -> dict[str, Any]:
            work()
            return self.engine.holding()

        self.engine.follow(self.ranks.from_main(lead))


class WeightSync:
    """Gives an engine the policy's weights before every rollout, and checks that it has them. Collective.

    The adapter is saved in ``folder`` for engines that load it; they must be able to read it.

    Args:
        probe: token ids of a prompt for :func:`check_logprobs`.
    """

    def __init__(self, engine: Engine, policy: Policy, args: RLConfig, probe: Sequence[int], ranks: Ranks) -> None:
        self.engine, self.policy, self.args, self.probe, self.ranks = engine, policy, args, probe, ranks
        self.folder = Path(args.output_dir) / "rollout"
        self.sends = "lora_swap" in engine.capabilities
        if self.sends:
            check_adapter_only(type(engine).__name__, policy)

    def __call__(self, step: int) -> dict[str, float]:
        """The weights as they are at ``step``; how far both sides' log-probabilities are apart, as a metric.

        Raises:
            UserError: they are too far apart, or the engine cannot load the adapter.
        """
        if not self.sends:
            self.engine.update(None, step)
            return {}
        folder = self.folder / f"step-{step:08d}"
        self.ranks.from_main(lambda: self.policy.adapters.save(self.policy.role, folder))
        self.engine.update(folder, step)
        return {"sampling/canary_logp_difference": self.ranks.from_main(lambda: self._check(folder))}

    def _check(self, folder: Path) -> float:
        for old in self.folder.iterdir():  # what no server needs any more
            if old != folder:
                shutil.rmtree(old)
        settings = {"temperature": self.args.temperature, "tolerance": self.args.vllm_logprob_tolerance}
        return check_logprobs(self.engine, self.policy, self.probe, **settings)
