"""Formulas of the algorithms that have no kernel of their own."""

from rlhf_fast.losses.importance import sequence_importance

__all__ = ["sequence_importance"]
