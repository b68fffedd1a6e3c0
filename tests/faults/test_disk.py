"""A disk that is full, read-only, failing, or that gives back other bytes: the last good checkpoint is there, and used."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from rlhf_fast.errors import UserError
from rlhf_fast.run.checkpoint import find_fault, latest_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SAID = {
    "ENOSPC": "No space left on device; free some space",
    "EIO": "Input/output error; the disk is failing",
    "EROFS": "Read-only file system; give an output_dir that can be written to",
}


@pytest.mark.parametrize("what", SAID)
def test_a_disk_that_refuses_ends_the_run_in_one_sentence_and_resume_goes_on(what, server, whole, tmp_path):
    """In the middle of the third save: step 2 is there, and the end is that of a run that nobody touched."""
    out, number = tmp_path / "run", 2 * 17 + {"ENOSPC": 5, "EIO": 7, "EROFS": 3}[what]
    reference, _ = whole("grpo", use_peft=False)
    ended = server.run("grpo", out, fault=("save.op", number, what), use_peft=False)
    assert ended["code"] == 2
    told = server.log(out)
    assert f"the checkpoint could not be written to {out}/checkpoints: {SAID[what]}" in told
    assert "Traceback" not in told
    assert latest_checkpoint(out / "checkpoints").name == "step-00000002"
    assert not list((out / "checkpoints").glob(".tmp*"))
    assert server.run("grpo", out, "--resume", use_peft=False)["code"] == 0
    assert server.digest(out) == server.digest(reference)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("honest", [True, False], ids=["said before", "met while writing"])
def test_a_full_disk(honest, small_disk, monkeypatch):
    """Two of 1 MB fit; some disks (quotas, thin volumes) promise more room than they have."""
    root = small_disk / "checkpoints"
    for step in (1, 2):
        save_checkpoint(root, step, {"step": step, "w": torch.randn(1 << 18)}, keep=9)
    if not honest:
        usage = shutil.disk_usage(root)._replace(free=1 << 40)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="free" if honest else "No space left.*free some space.*go on with --resume"):
        save_checkpoint(root, 3, {"step": 3, "w": torch.randn(1 << 20)}, keep=9)
    assert load_checkpoint(latest_checkpoint(root))["step"] == 2
    assert sorted(p.name for p in root.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_limit_on_the_size_of_files(tmp_path):
    """The kernel stops the write in the middle of a file, which no check of free space foresees."""
    save_checkpoint(tmp_path, 1, {"step": 1, "w": torch.randn(1 << 16)}, keep=9)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(UserError, match="the checkpoint could not be written to .*go on with --resume"):
            save_checkpoint(tmp_path, 2, {"step": 2, "w": torch.randn(1 << 16)}, keep=9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(latest_checkpoint(tmp_path))["step"] == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=9)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="Permission denied; give an output_dir that can be written to"):
            save_checkpoint(tmp_path, 2, {"step": 2}, keep=9)
    finally:
        tmp_path.chmod(0o700)
    assert load_checkpoint(latest_checkpoint(tmp_path))["step"] == 1


def damage(path, how, draw):
    """Change a file, in one of the ways that disks and people do; returns a word for it."""
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: draw.randrange(len(data))])
    elif how == "flipped":
        changed = bytearray(data)
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
    else:  # a block of zeros, as a file system leaves it that lost power
        start = draw.randrange(len(data))
        size = min(draw.choice([1, 512, 4096]), len(data) - start)
        zeroed = data[:start] + bytes(size) + data[start + size :]
        path.write_bytes(zeroed if zeroed != data else data + b"\0")
    return data


def test_600_damaged_files_are_all_noticed_and_the_last_good_checkpoint_is_used(server, whole, tmp_path):
    """Every file of a trainer's own checkpoint, 150 times each: missing, truncated, one bit flipped, a block of zeros."""
    reference, _ = whole("ppo", use_peft=True)
    root = tmp_path / "checkpoints"
    shutil.copytree(reference / "checkpoints", root)
    earlier, newest = list_checkpoints(root)
    draw, files = random.Random(0), sorted(newest.iterdir())
    noticed = 0
    for number in range(600):
        path = files[number % len(files)]
        data = damage(path, ("missing", "truncated", "flipped", "zeroed")[number % 4], draw)
        fault = find_fault(newest)
        noticed += fault is not None
        assert latest_checkpoint(root) == earlier, (path.name, number)
        path.write_bytes(data)
    assert noticed == 600
    assert find_fault(newest) is None


def test_a_run_resumes_from_the_last_good_one_and_ends_the_same(server, whole, tmp_path):
    reference, _ = whole("ppo", use_peft=True)
    out = tmp_path / "run"
    server.run("ppo", out, fault=("save.end", 3, "SIGKILL"), use_peft=True)
    path = out / "checkpoints/step-00000003/state.json"
    path.write_bytes(path.read_bytes()[:-1])
    assert server.run("ppo", out, "--resume", use_peft=True)["code"] == 0
    assert "step-00000003: state.json has" in server.log(out)
    assert server.digest(out) == server.digest(reference)
