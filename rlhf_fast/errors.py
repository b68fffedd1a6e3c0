"""The one exception for a user's mistake. The command line prints it as one sentence and exits with code 2."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a file, a setting or an argument: says what is wrong, where, what was found, and the fix."""


class StepRefused(UserError):
    """An optimizer step that must not go into the weights. The run is saved as it was before it."""


class RolloutError(UserError):
    """Rollout servers, or a reward function in this process, that gave no answer. Training can go on where it was once they do."""
