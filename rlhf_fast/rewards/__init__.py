"""Rewards: plain functions that score completions, found by name and called so that a fault is never a score."""

from rlhf_fast.rewards.code import Code
from rlhf_fast.rewards.evaluate import Evaluation, evaluate_policy, pass_at_k
from rlhf_fast.rewards.faults import Fault
from rlhf_fast.rewards.functions import (
    BUILT_IN,
    RewardFunction,
    RewardTable,
    check_columns,
    import_callable,
    resolve,
    resolve_all,
    reward_name,
    score,
)
from rlhf_fast.rewards.judge import Judge
from rlhf_fast.rewards.math_answers import Math
from rlhf_fast.rewards.model import RewardModel
from rlhf_fast.rewards.verifiers import Answer, Exact, Format, Length, Random

__all__ = [
    "BUILT_IN",
    "Answer",
    "Code",
    "Evaluation",
    "Exact",
    "Fault",
    "Format",
    "Judge",
    "Length",
    "Math",
    "Random",
    "RewardFunction",
    "RewardModel",
    "RewardTable",
    "check_columns",
    "evaluate_policy",
    "import_callable",
    "pass_at_k",
    "resolve",
    "resolve_all",
    "reward_name",
    "score",
]
