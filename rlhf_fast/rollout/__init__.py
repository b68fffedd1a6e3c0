"""Rollouts: engines that continue prompts, behind one protocol."""

from rlhf_fast.rollout.canary import check_logprobs
from rlhf_fast.rollout.colocate import ColocatedEngine
from rlhf_fast.rollout.engine import CAPABILITIES, Engine, Request, Sample, awake, check_for_rl
from rlhf_fast.rollout.generate import GenerateEngine, completions_for, context_length, decode, end_of_sequence_ids
from rlhf_fast.rollout.server import ServerEngine
from rlhf_fast.rollout.session import Session, Writing
from rlhf_fast.rollout.slots import SlotEngine, engine_for

__all__ = [
    "CAPABILITIES",
    "ColocatedEngine",
    "Engine",
    "GenerateEngine",
    "Request",
    "Sample",
    "ServerEngine",
    "Session",
    "SlotEngine",
    "Writing",
    "awake",
    "check_for_rl",
    "check_logprobs",
    "completions_for",
    "context_length",
    "decode",
    "end_of_sequence_ids",
    "engine_for",
]
