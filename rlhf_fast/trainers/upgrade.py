"""Checkpoints of other versions: what an earlier one lacks is filled in where its meaning is known, else one sentence says so.

``FORMAT`` numbers what :func:`.resume.state_of` gives. Who adds, removes or renames a field there, in ``extra_state`` or in
``Experience`` raises it, and says here what its absence meant; a test compares the fields with those of the number.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from rlhf_fast.errors import UserError

logger = logging.getLogger(__name__)
FORMAT = 2  # states of format 1 named none

# what stood for fields of a state, and of a process's part of it, before there were such
MEANT = {"skipped": 0, "best": {"step": None, "value": math.nan}, "stopped": None, "rolls_back": False, "callbacks": {}}
MEANT_LOCAL = {"metrics": {"sums": {}, "weights": {}}, "tokens": 0}
# what a checkpoint was compared with, or has settled: its run is taken at its word that it was the same
TAKEN = {
    "data": "the rows",
    "base": "the base",
    "frozen": "the reference and reward models",
    "micro_batch_tokens": "the micro-batches",
}


def stamp() -> dict[str, Any]:
    """What a state says of the version that wrote it."""
    return {"format": FORMAT, "version": _version()}


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("rlhf_fast")
    except importlib.metadata.PackageNotFoundError:
        return "a checkout"


def upgraded(state: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` with the fields of this version.

    Args:
        state: of a checkpoint, of any version.
        here: what the run that is to go on would save now, in its first process.
    Raises:
        UserError: a newer version wrote it, or an earlier one whose fields do not suffice; says which and what to do.
    """
    written = state.get("format", 1)
    if written == FORMAT:
        return dict(state)
    if written > FORMAT:
        raise UserError(
            f"the checkpoint was written by a newer rlhf_fast ({state['version']}; its format is {written}, this one, "
            f"{_version()}, reads up to {FORMAT}): update rlhf_fast, then --resume"
        )
    state = {**MEANT, **state, **stamp()}
    if "weights" in state:  # a head was a vector before there were several on one base
        shapes = {name: weight.shape for name, weight in here["weights"].items()}
        state["weights"] = {n: in_shape(w, shapes.get(n, w.shape)) for n, w in state["weights"].items()}
    if taken := [name for name in TAKEN if name not in state]:
        logger.warning(
            "the checkpoint is of an earlier version and does not say which %s its run had: those of this run are taken",
            " and ".join(TAKEN[name].removeprefix("the ") for name in taken),
        )
        state |= {name: here[name] for name in taken}
    if isinstance(state.get("ranks"), list):
        state["ranks"] = [{**MEANT_LOCAL, **local} for local in state["ranks"]]
    if missing := list(_missing(state, here)):
        raise too_old(f"lacks {', '.join(missing)}")
    return state


def in_shape(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """``tensor`` in ``shape`` if they differ by dimensions of 1 alone, else as it is."""
    same = [n for n in tensor.shape if n != 1] == [n for n in shape if n != 1]
    return tensor.reshape(shape) if same else tensor


def reshape_moments(optimizer: Optimizer) -> None:
    """Give what an optimizer keeps of each parameter the parameter's shape, see :func:`in_shape`."""
    for parameter, kept in optimizer.state.items():
        kept.update({n: in_shape(x, parameter.shape) for n, x in kept.items() if n.startswith("exp_avg")})


def too_old(why: str) -> UserError:
    """The error for a checkpoint of an earlier version that cannot be read, which ``why`` explains."""
    return UserError(
        f"the checkpoint was written by an earlier rlhf_fast and {why}, without which a run cannot go on exactly: finish it with "
        "the version that began it (versions and commit are in the run's record.jsonl), or begin a new run in another output_dir"
    )


def _missing(state: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Names of fields that ``here`` has and ``state`` has not."""
    missing = [name for name in here if name not in state]
    if "extra" in state:
        missing += [f"extra.{name}" for name in here["extra"] if name not in state["extra"]]
    for local in state.get("ranks", [])[:1]:
        missing += [f"ranks.{name}" for name in here["ranks"][0] if name not in local]
    return missing
