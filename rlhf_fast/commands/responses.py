"""A file of responses that a later run goes on with, and the note beside it of what wrote them.

Prompts alone do not tell whose responses a file holds: ``OUT.jsonl.about.json`` has a fingerprint of the weights, the sampling
settings and a hash of the prompts, and a run that differs in any of them does not add to the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_fast.errors import UserError

if TYPE_CHECKING:
    from rlhf_fast.data.batch import Prompt
    from rlhf_fast.models import Policy


def about_run(policy: Policy, prompts: Sequence[Prompt], sampling: dict[str, Any]) -> dict[str, Any]:
    """What decides the responses: weights and their dtype, prompts with their columns, sampling settings."""
    from rlhf_fast.models.fingerprint import digest, fingerprint

    weights = fingerprint(policy.model)
    if policy.adapters.names:
        weights["adapter"] = digest(policy.adapters.parameters(policy.role))
    rows = hashlib.sha256()
    for p in prompts:
        rows.update(json.dumps([p.input_ids, p.prompt, p.columns], default=str).encode())
    about = {"model": {**weights, "dtype": str(policy.model.dtype)}, "prompts": rows.hexdigest()[:16], **sampling}
    return json.loads(json.dumps(about))  # as it is read back: lists, not tuples


def note_path(output: Path) -> Path:
    return output.with_name(output.name + ".about.json")


def begin_or_resume(output: Path, prompts: Sequence[Prompt], n: int, about: dict[str, Any], restart: bool) -> int:
    """Prompts whose ``n`` responses the output holds already. Rows of a prompt that was not finished are cut off.

    Args:
        about: this run, as of :func:`about_run`; noted beside a file that is begun.
        restart: drop what the output holds.
    Raises:
        UserError: the output holds something else, or responses of another run; says what differs.
    """
    note = note_path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    if restart:
        output.unlink(missing_ok=True)
    if not output.exists():
        note.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        return 0
    _check_note(output, note, about)
    lines = output.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]  # the last may have been cut in the middle
    done = min(len(whole) // n, len(prompts))
    try:
        rows = [json.loads(line) for line in whole[: done * n]]
        same = len(whole) <= len(prompts) * n and all(
            row["prompt"] == prompts[i // n].prompt for i, row in enumerate(rows)
        )
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(f"{output} holds no responses to these prompts; choose another -o, or --restart to begin anew")
    with output.open("r+b") as file:
        file.truncate(sum(map(len, whole[: done * n])))
    return done


def _check_note(output: Path, note: Path, about: dict[str, Any]) -> None:
    remedy = "choose another -o, or --restart to begin anew"
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{output} exists, and no {note.name} beside it says what wrote it; {remedy}") from None
    except ValueError:
        raise UserError(f"{note} is not valid JSON, so nobody knows what wrote {output}; {remedy}") from None
    if before != about:
        differ = [_change(name, before.get(name), about.get(name)) for name in {**before, **about}]
        raise UserError(f"{output} was written with another {', '.join(filter(None, differ))}; {remedy}")


def _change(name: str, before: Any, now: Any) -> str:
    """The setting and its values where they differ; fingerprints say nothing to a reader."""
    if before == now:
        return ""
    return name if name in ("model", "prompts") else f"{name} ({json.dumps(before)}, now {json.dumps(now)})"
