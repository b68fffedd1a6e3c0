"""Rollouts: engines that continue prompts, behind one protocol."""

from rlhf_fast.rollout.engine import CAPABILITIES, Engine, Request, Sample, check_for_rl
from rlhf_fast.rollout.generate import GenerateEngine, completions_for, context_length, decode, end_of_sequence_ids
from rlhf_fast.rollout.session import Session, Writing
from rlhf_fast.rollout.slots import SlotEngine, engine_for

__all__ = [
    "CAPABILITIES",
    "Engine",
    "GenerateEngine",
    "Request",
    "Sample",
    "Session",
    "SlotEngine",
    "Writing",
    "check_for_rl",
    "completions_for",
    "context_length",
    "decode",
    "end_of_sequence_ids",
    "engine_for",
]
