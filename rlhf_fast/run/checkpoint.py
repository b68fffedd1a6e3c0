"""Checkpoints that survive ``kill -9``, a full disk and a flipped bit.

A checkpoint is a directory ``step-00000100`` holding ``state.json`` (the tree of the state), ``tensors-*.safetensors``
(its tensors) and ``manifest.json`` (size and SHA-256 of both kinds). It is written under a hidden name, synced to disk
and renamed, so that a directory with the final name is complete; the manifest proves that it still is. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import numbers
import os
import random
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf_fast.errors import UserError
from rlhf_fast.run.disk import disk_faults

log = logging.getLogger("rlhf_fast.run.checkpoint")

FORMAT = 1
MANIFEST = "manifest.json"
TREE = "state.json"
# one shard is copied to host memory at a time, so this bounds what a save costs besides the model
SHARD_BYTES = 4 << 30
_STEP = re.compile(r"step-(\d{8,})(\.old)?")
# what safetensors can name; any other dtype is stored as its bytes
_NATIVE = frozenset(
    (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    + (torch.uint16, torch.uint32, torch.uint64)
    + (torch.float16, torch.bfloat16, torch.float32, torch.float64)
)


class OtherFormat(str):
    """What :func:`find_fault` says of a checkpoint whose bytes are well and laid out otherwise than this version reads."""


class TrainerState(Protocol):
    """What a trainer must give so that a resumed run repeats the uninterrupted one bit for bit.

    ``state()`` returns nested dicts and lists of tensors, numbers, strings, bools and None with, between them:

    - ``model``: adapters and heads (or all weights, in full fine-tuning);
    - ``optimizer``, ``scheduler``: their ``state_dict()``; the gradient scaler's too when there is one;
    - ``rng``: a list with one `rng_state()` per rank;
    - ``step`` and ``epoch``: optimizer steps done;
    - ``data``: the cursor of what was CONSUMED by finished optimizer steps (not what a loader has pre-fetched), and the
      order it counts in (its seed or its permutation);
    - ``rollout``: the experience buffer with the epoch and minibatch reached in it, for trainers that reuse samples;
    - ``controllers``: the adaptive KL coefficient, Lagrange multipliers, running statistics (reward or value whitening);
    - ``hashes``: of the base weights and of the tokenizer, so that a resume on another model is refused.

    Saves happen at optimizer steps, so a kill inside an accumulation window replays the window. `MetricsLog` needs nothing
    here: it drops the lines past the resumed step.
    """

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


# ---------------------------------------------------------------------------------------------------------------- saving


def save_checkpoint(
    root: Path | str, step: int, state: dict[str, Any], *, keep: int, protect: Collection[int] = ()
) -> Path:
    """Write ``state`` as ``root/step-<step>``, atomically, then remove all but the newest ``keep`` checkpoints.

    A process killed at any moment leaves the earlier checkpoints and either no trace or the complete new one. Checkpoints
    of later steps belong to a run that was rewound: they are set aside as ``step-*.abandoned``, not deleted.

    Args:
        root: directory of the run's checkpoints; made when missing. One process writes to it.
        step: optimizer steps done, >= 0.
        state: nested dicts, lists and tuples of tensors, numbers, strings, bools and None (`TrainerState`). Tensors may
            be on any device and have any dtype, shape and strides; the very same tensor met twice is stored once.
        keep: checkpoints to leave in ``root``, >= 1.
        protect: steps whose checkpoints stay too, besides the newest ``keep`` of the others.
    Returns:
        the new checkpoint's directory.
    Raises:
        UserError: the disk is full or not writable; nothing is left behind.
        TypeError: the state holds something else; the message names where.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"save_checkpoint needs keep >= 1 and step >= 0, got keep={keep}, step={step}")
    root = Path(root)
    tree, tensors = _flatten(state)
    final = checkpoint_path(root, step)
    temporary = root / f".tmp-{final.name}-{os.getpid()}"
    with disk_faults("the checkpoint", root):
        root.mkdir(parents=True, exist_ok=True)
        _sync(root.parent)
        _remove_leftovers(root)
        _check_space(root, len(tree) + sum(t.nbytes for t in tensors.values()))
        try:
            temporary.mkdir()
            _write_files(temporary, step, tree, tensors)
            _move_into_place(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _prune(root, step, keep, protect)
    return final


def _write_files(folder: Path, step: int, tree: bytes, tensors: dict[str, Tensor]) -> None:
    (folder / TREE).write_bytes(tree)
    for i, shard in enumerate(_shards(tensors), start=1):
        path = folder / f"tensors-{i:05d}.safetensors"
        save_file({name: _storable(tensor) for name, tensor in shard.items()}, path)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(folder.iterdir())}
    manifest = {"format": FORMAT, "step": step, "files": files}
    manifest["sha256"] = _digest(manifest)
    (folder / MANIFEST).write_text(_written(manifest))
    for path in folder.iterdir():
        _sync(path)
    _sync(folder)


def _shards(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    if shard:
        yield shard


def _storable(tensor: Tensor) -> Tensor:
    """A contiguous host copy that shares memory with no other; foreign dtypes as bytes."""
    tensor = tensor.resolve_conj().resolve_neg().cpu().clone(memory_format=torch.contiguous_format)
    return tensor if tensor.dtype in _NATIVE else tensor.reshape(-1).view(torch.uint8)


def _move_into_place(temporary: Path, final: Path) -> None:
    old = final.with_name(final.name + ".old")
    if final.exists():
        # a kill between the two renames leaves only `.old`, which `latest_checkpoint` accepts
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    temporary.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _prune(root: Path, step: int, keep: int, protect: Collection[int]) -> None:
    for path in list_checkpoints(root):
        if checkpoint_step(path) > step:
            aside = _free_name(path.with_name(path.name + ".abandoned"))
            path.rename(aside)
            log.warning("checkpoint %s is past the step just saved: set aside as %s", path.name, aside.name)
    for path in [p for p in list_checkpoints(root) if checkpoint_step(p) not in protect][:-keep]:
        # hidden first: half a deleted checkpoint must not look like a damaged one
        doomed = root / f".tmp-{path.name}-deleted"
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    _sync(root)


def _free_name(path: Path) -> Path:
    candidate, n = path, 2
    while candidate.exists():
        candidate, n = path.with_name(f"{path.name}-{n}"), n + 1
    return candidate


def _remove_leftovers(root: Path) -> None:
    """Delete what a killed save left: it is complete under another name, or of no use."""
    for path in root.iterdir():
        replaced = path.name.endswith(".old") and path.with_suffix("").exists()
        if path.name.startswith(".tmp-step-") or (_STEP.fullmatch(path.name) and replaced):
            shutil.rmtree(path, ignore_errors=True)


def _check_space(root: Path, needed: int) -> None:
    needed += 1 << 20  # headers, manifest, blocks
    free = shutil.disk_usage(root).free
    if free < needed:
        raise UserError(
            f"the checkpoint needs {_size(needed)} and {root} has {_size(free)} free; "
            "free some space, keep fewer checkpoints, or use another output_dir"
        )


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


# --------------------------------------------------------------------------------------------------------------- loading


def list_checkpoints(root: Path | str) -> list[Path]:
    """The checkpoints in ``root``, oldest step first, not verified. Empty when the directory does not exist."""
    root = Path(root)
    found = [p for p in root.iterdir() if _STEP.fullmatch(p.name) and p.is_dir()] if root.is_dir() else []
    return sorted(found, key=lambda p: (checkpoint_step(p), not p.name.endswith(".old")))


def checkpoint_path(root: Path | str, step: int) -> Path:
    """Where the checkpoint of ``step`` lies in ``root``."""
    return Path(root) / f"step-{step:08d}"


def checkpoint_step(path: Path | str) -> int:
    """The optimizer step in a checkpoint's name."""
    match = re.match(r"step-(\d+)", Path(path).name)
    if match is None:
        raise UserError(f"{path} is not a checkpoint: its name should look like step-00000100")
    return int(match[1])


def latest_checkpoint(root: Path | str) -> Path | None:
    """The newest checkpoint in ``root`` whose every byte is as it was written, or None. Logs what it skips and why.

    Raises:
        UserError: that one was written by another version. Falling back to one before it would lose good steps.
    """
    for path in reversed(list_checkpoints(root)):
        fault = find_fault(path)
        if fault is None:
            return path
        if isinstance(fault, OtherFormat):
            raise UserError(f"cannot resume from {path}: {fault}")
        log.warning("skipping checkpoint %s: %s", path, fault)
    return None


def find_checkpoint(root: Path | str, resume: bool | str | Path) -> Path:
    """The checkpoint to resume from: True is the latest good one in ``root``, a path is that checkpoint, verified.

    Raises:
        UserError: there is none, or the one asked for is damaged.
    """
    if resume is not True:
        path = Path(resume)
        fault = find_fault(path)
        if fault is not None:
            raise UserError(f"cannot resume from {path}: {fault}")
        return path
    path = latest_checkpoint(root)
    if path is None:
        damaged = len(list_checkpoints(root))
        what = f"all {damaged} checkpoints in {root} are damaged" if damaged else f"there is no checkpoint in {root}"
        raise UserError(f"cannot resume: {what}; start again without --resume, or give another output_dir")
    return path


def find_fault(path: Path | str) -> str | None:
    """What is wrong with a checkpoint (missing, truncated, altered), or None. Reads every byte."""
    path = Path(path)
    if not path.is_dir():
        return "no such directory"
    try:
        text = (path / MANIFEST).read_text()
        manifest = json.loads(text)
        if _written(manifest) != text:  # white space is covered by no digest
            return f"{MANIFEST} was altered"
        expected, files = manifest.pop("sha256"), manifest["files"]
        if _digest(manifest) != expected:
            return f"{MANIFEST} was altered"
        if manifest["format"] != FORMAT:
            return OtherFormat(
                f"another version of rlhf_fast wrote it (its files have format {manifest['format']}, this one reads {FORMAT}): "
                "go on with that version; the run's record.jsonl names it"
            )
        return next((fault for name, entry in files.items() if (fault := _file_fault(path / name, entry))), None)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"


def _file_fault(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path.name} has {size} bytes instead of {entry['bytes']}"
    return None if _sha256(path) == entry["sha256"] else f"{path.name} was altered: its SHA-256 differs"


def load_checkpoint(path: Path | str, *, device: torch.device | str = "cpu", verify: bool = True) -> dict[str, Any]:
    """The state that `save_checkpoint` was given, tuples as lists, tensors in memory of their own on ``device``.

    Args:
        verify: check every byte first; False right after `latest_checkpoint` or `find_checkpoint`, which did.
    Raises:
        UserError: the checkpoint is missing or damaged; says how.
    """
    path = Path(path)
    fault = find_fault(path) if verify else None
    if fault is not None:
        raise UserError(f"cannot load checkpoint {path}: {fault}")
    tensors: dict[str, Tensor] = {}
    for name in json.loads((path / MANIFEST).read_text())["files"]:
        if not name.endswith(".safetensors"):
            continue
        with safe_open(path / name, framework="pt") as file:
            # a copy: memory mapped from the file would follow the file's fate, and its alignment can change kernels' bits
            tensors |= {key: file.get_tensor(key).clone().to(device) for key in file.keys()}  # noqa: SIM118
    return _decode(json.loads((path / TREE).read_text()), tensors)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _written(manifest: dict[str, Any]) -> str:
    """A manifest as its file has it."""
    return json.dumps(manifest, indent=1) + "\n"


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------- state <-> files
# JSON carries None, bools, strings, 64-bit integers, finite floats, lists and dicts with string keys as they are. The rest
# is an object with one key that starts with "$": $tensor, $int, $float, $dict.


def _flatten(state: dict[str, Any]) -> tuple[bytes, dict[str, Tensor]]:
    """The state as strict JSON bytes, and the tensors it refers to by name."""
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple, str] = {}
    tree = _encode(state, (), tensors, seen)
    return json.dumps(tree, allow_nan=False).encode(), tensors


def _encode(value: Any, where: tuple, tensors: dict[str, Tensor], seen: dict[tuple, str]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Tensor):
        return _encode_tensor(value, where, tensors, seen)
    if isinstance(value, numbers.Integral):
        # hexadecimal: Python refuses to convert decimals of more than 4300 digits
        return int(value) if abs(int(value)) < 2**63 else {"$int": hex(value)}
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, (list, tuple)):
        return [_encode(v, (*where, i), tensors, seen) for i, v in enumerate(value)]
    if isinstance(value, dict):
        return _encode_dict(value, where, tensors, seen)
    raise TypeError(
        f"state{_place(where)} is a {type(value).__name__}; "
        "a checkpoint holds tensors, numbers, strings, bools, None, lists and dicts"
    )


def _encode_dict(value: dict, where: tuple, tensors: dict[str, Tensor], seen: dict[tuple, str]) -> dict[str, Any]:
    for key in value:
        if not (key is None or isinstance(key, (bool, int, float, str))):
            raise TypeError(f"state{_place(where)} has the key {key!r}; keys are strings, numbers, bools or None")
    items = [(key, _encode(v, (*where, key), tensors, seen)) for key, v in value.items()]
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return dict(items)
    return {"$dict": [[_encode(key, where, tensors, seen), v] for key, v in items]}


def _encode_tensor(tensor: Tensor, where: tuple, tensors: dict[str, Tensor], seen: dict[tuple, str]) -> dict[str, Any]:
    tensor = tensor.detach()
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise TypeError(f"state{_place(where)} is a {type(tensor).__name__} that cannot be stored: {tensor.layout}")
    identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    identity += (tensor.is_conj(), tensor.is_neg())
    if tensor.numel() == 0 or identity not in seen:
        base = name = "/".join(map(str, where)) or "state"
        while name in tensors:
            name = f"{base}#{len(tensors)}"
        tensors[name] = tensor
        seen[identity] = name
    else:
        name = seen[identity]
    if tensor.dtype in _NATIVE:
        return {"$tensor": name}
    return {"$tensor": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        tensor = tensors[value["$tensor"]]
        return tensor.view(getattr(torch, value["dtype"])).reshape(value["shape"]) if "dtype" in value else tensor
    if "$int" in value:
        return int(value["$int"], 16)
    if "$float" in value:
        return float(value["$float"])
    if "$dict" in value:
        return {_decode(key, tensors): _decode(v, tensors) for key, v in value["$dict"]}
    return {key: _decode(v, tensors) for key, v in value.items()}


def _place(where: tuple) -> str:
    return "".join(f"[{key!r}]" for key in where)


# -------------------------------------------------------------------------------------------------------- random numbers


def rng_state() -> dict[str, Any]:
    """The state of every random number generator of this process: Python, NumPy, torch on the CPU and on each GPU."""
    import numpy as np

    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` gave. GPUs that are not here, or were not there, are left alone with a warning."""
    import numpy as np

    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) not in (0, devices):
        log.warning("random state of %d GPUs was saved and %d are here", len(state["cuda"]), devices)
    for device, device_state in zip(range(devices), state["cuda"]):
        torch.cuda.set_rng_state(device_state.cpu(), device)
