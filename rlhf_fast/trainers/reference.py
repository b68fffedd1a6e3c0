"""Log-probabilities of whole responses under the reference: in the micro-batches of training, or once for all runs.

Those computed once are kept on disk under a hash of everything they follow from: the tokens (so that the data, the tokenizer,
the chat template and ``max_length`` count by what they make), the weights, and how the passes are run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_fast.data.batch import Example
from rlhf_fast.models.fingerprint import fingerprint
from rlhf_fast.run.cache import cache_folder, read_numbers, write_numbers

if TYPE_CHECKING:
    from .trainer import Trainer

logger = logging.getLogger(__name__)
FORMAT = 1  # raised when a change of our own shifts the numbers


@torch.no_grad()
def response_logprobs(trainer: Trainer, records: Sequence[Any], role: str = "reference") -> list[list[float]]:
    """Summed log-probabilities of each record's K responses under ``role``.

    In the micro-batches that are trained: policy and reference then agree to the last bit before the first step.
    """
    results: list[list[float]] = [[]] * len(records)
    parts = trainer.split(records)
    for part in parts + parts[-1:] * trainer.idle_passes(len(parts)):
        groups = [trainer.examples(records[i]) for i in part]
        batch = trainer.pack([e for group in groups for e in group])
        logprobs = trainer.policy(batch, role=role)
        sums = iter(trainer.response_sums(logprobs, batch).tolist())
        for i, group in zip(part, groups):
            results[i] = [next(sums) for _ in group]
    return results


def precomputed(trainer: Trainer, records: Sequence[Any]) -> list[list[float]]:
    """:func:`response_logprobs` of the reference, from an earlier run where one has kept them. Collective.

    Records hold equally many responses. What was kept is tried on one micro-batch before it is trusted.
    """
    key = cache_key(trainer, records)
    path = cache_folder() / "reference_logprobs" / f"{key}.safetensors"
    shape = (len(records), len(trainer.examples(records[0])))
    kept = trainer.ranks.from_main(lambda: read_numbers(path, key, shape))
    if kept is not None and not trainer.ranks.any(not _agrees(trainer, records, kept)):
        trainer.say(f"reference: log-probabilities of {len(records):,} rows read from {path}")
        return kept.tolist()
    numbers = torch.tensor(trainer.ranks.gather(response_logprobs(trainer, trainer.ranks.share(records))))
    if trainer.accelerator.is_main_process:
        write_numbers(path, key, numbers)
    trainer.say(f"reference: log-probabilities of {len(records):,} rows computed, kept in {path}")
    return numbers.tolist()


def _agrees(trainer: Trainer, records: Sequence[Any], kept: Tensor) -> bool:
    """Whether the reference says of one micro-batch what was kept, but for rounding (a fingerprint is not all weights)."""
    some = trainer.split(records[: trainer.args.per_device_train_batch_size])[0]
    now = torch.tensor(response_logprobs(trainer, [records[i] for i in some]))
    if torch.allclose(now, kept[some], rtol=1e-2, atol=0.1):
        return True
    worst = float((now - kept[some]).abs().max())
    logger.warning(
        "kept reference log-probabilities are off by %.3g nats from what the model says; computing anew", worst
    )
    return False


def cache_key(trainer: Trainer, records: Sequence[Any]) -> str:
    """Hash of what the reference's log-probabilities of ``records`` follow from."""
    policy, a = trainer.policy, trainer.args
    about = {
        "versions": [FORMAT, *(importlib.metadata.version(name) for name in ("torch", "transformers"))],
        "base": fingerprint(policy.model_for("reference")),
        "passes": [str(policy.model.dtype), str(policy.compute_dtype), policy.device.type, a.attn_implementation],
    }
    if getattr(a, "ld_alpha", None) is not None:
        about["ld_alpha"] = a.ld_alpha
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    if "reference" in policy.adapters.names:
        for name, parameter in sorted(policy.adapters.parameters("reference").items()):
            digest.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())
    for record in records:
        for example in trainer.examples(record):
            digest.update(_bytes(example))
    return digest.hexdigest()[:32]


def _bytes(example: Example) -> bytes:
    """The tokens and which of them count, their number first, so that no two lists of examples read alike."""
    length = len(example).to_bytes(8, "little")
    return length + torch.tensor(example.input_ids).numpy().tobytes() + bytes(example.response_mask)
