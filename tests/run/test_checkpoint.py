"""Checkpoints: bit-exact, atomic, and damage is noticed."""

import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.errors import UserError
from rlhf_fast.run import checkpoint
from rlhf_fast.run.checkpoint import (
    find_checkpoint,
    find_fault,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)

ROOT = Path(__file__).resolve().parents[2]


def same(a, b):
    """Equal bit for bit, tuples as lists, NaN equal to NaN, 1 different from 1.0 and from True."""
    if isinstance(a, torch.Tensor):
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, (list, tuple)):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    # repr tells 0.0 from -0.0 and calls NaN equal; huge integers have none
    return type(a) is type(b) and (a == b if isinstance(a, int) else repr(a) == repr(b))


def roundtrip(tmp_path, state):
    return load_checkpoint(save_checkpoint(tmp_path, 1, state, keep=1))


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64, torch.complex128),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7)], ids=str)
def test_tensors_of_every_dtype_come_back_bit_for_bit(tmp_path, dtype, shape):
    # random bytes: NaN payloads, denormals and negative zeros among them
    size = dtype.itemsize * int(np.prod(shape))
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8)
    tensor = data.view(dtype).reshape(shape)
    assert same(tensor, roundtrip(tmp_path, {"t": tensor})["t"])


def test_views_shared_storage_and_conjugates_come_back_as_their_values(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    wave = torch.complex(base, base + 1)
    state = {
        "whole": base,
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": base[:1].expand(3, 6),
        "overlapping": [base[0:3], base[1:4]],
        "again": base,
        "complex": wave,
        "conjugate": wave.conj(),
        "imaginary": wave.imag,
        "negated": wave.conj().imag,
        "parameter": torch.nn.Parameter(base.clone()),
    }
    back = roundtrip(tmp_path, state)
    for key, value in state.items():
        expected = (
            [v.clone() for v in value] if isinstance(value, list) else value.detach().resolve_conj().resolve_neg()
        )
        assert same(expected, back[key]), key
    back["strided"].zero_()
    assert torch.equal(back["whole"], base), "views must not share memory after loading"
    assert not back["parameter"].requires_grad


def test_the_same_tensor_is_stored_once(tmp_path):
    big = torch.randn(1 << 16)
    path = save_checkpoint(tmp_path, 1, {"a": big, "b": {"tied": big}}, keep=1)
    assert (path / "tensors-00001.safetensors").stat().st_size < 1.1 * big.nbytes
    assert same(load_checkpoint(path), {"a": big, "b": {"tied": big}})


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text()
    | st.sampled_from(["$tensor", "a/b", "\ud800"])
)
keys = (
    st.text(max_size=4) | st.integers(-(2**70), 2**70) | st.sampled_from(["$dict", "$int", "a/b", "a", None, True, 0.5])
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(trees)
def test_every_nested_state_comes_back(tree):
    """Through the two functions between a state and its JSON, without the disk."""
    text, tensors = checkpoint._flatten({"state": tree})
    assert same(tree, checkpoint._decode(json.loads(text), tensors)["state"])


def test_a_state_with_names_that_collide_and_huge_integers(tmp_path):
    """``a/b`` is both a key and a path; 10**5000 has more digits than Python converts to decimal."""
    state = {"a/b": torch.zeros(2), "a": {"b": torch.ones(2)}, "big": -(10**5000), "nan": [float("nan"), -0.0]}
    assert same(state, roundtrip(tmp_path, state))


def test_numpy_numbers_become_plain_ones(tmp_path):
    back = roundtrip(tmp_path, {"i": np.int64(3), "f": np.float32(0.5)})
    assert same(back, {"i": 3, "f": 0.5})


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, b"x", np.zeros(2), torch.zeros(2).to_sparse()], ids=lambda value: type(value).__name__
)
def test_what_cannot_be_stored_is_named_with_its_place(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\['optimizer'\]\[0\]"):
        save_checkpoint(tmp_path, 1, {"optimizer": [value]}, keep=1)
    assert list_checkpoints(tmp_path) == []


def test_an_optimizer_continues_bit_for_bit(tmp_path):
    """Its state has integer keys, tuples (betas), scalar step tensors; ten more steps must give the same weights."""

    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def run(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            model(torch.full((2, 8), float(step))).square().sum().backward()
            optimizer.step()

    straight, optimizer = fresh()
    run(straight, optimizer, range(5))
    path = save_checkpoint(tmp_path, 5, {"m": straight.state_dict(), "o": optimizer.state_dict()}, keep=1)
    run(straight, optimizer, range(5, 15))

    resumed, optimizer = fresh()
    state = load_checkpoint(path)
    resumed.load_state_dict(state["m"])
    optimizer.load_state_dict(state["o"])
    run(resumed, optimizer, range(5, 15))
    assert torch.equal(straight.weight, resumed.weight)


def test_large_states_are_split_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1000)
    state = {"list": [torch.randn(100) for _ in range(7)]}
    path = save_checkpoint(tmp_path, 1, state, keep=1)
    # 400 bytes each, so two fit in a shard
    assert len(list(path.glob("tensors-*.safetensors"))) == 4
    assert same(state, load_checkpoint(path))


def test_nothing_is_pickled(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"t": torch.zeros(3), "rng": rng_state()}, keep=1)
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "state.json", "tensors-00001.safetensors"]
    json.loads((path / "state.json").read_text(), parse_constant=pytest.fail)


# ---- keeping, replacing, rewinding


def test_the_newest_are_kept(tmp_path):
    for step in (10, 20, 30, 40):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000030", "step-00000040"]
    assert load_checkpoint(latest_checkpoint(tmp_path)) == {"step": 40}


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, {"step": step}, keep=5)
    assert load_checkpoint(latest_checkpoint(tmp_path)) == {"step": 100_000_000}


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 10, {"run": 1}, keep=2)
    save_checkpoint(tmp_path, 10, {"run": 2}, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]
    assert load_checkpoint(latest_checkpoint(tmp_path)) == {"run": 2}


def test_a_rewound_run_sets_later_checkpoints_aside(tmp_path, caplog):
    """Resumed from 10 although 30 exists: the new 20 must win over 30, and 30 must not be destroyed."""
    for step in (10, 30):
        save_checkpoint(tmp_path, step, {"step": step}, keep=3)
    save_checkpoint(tmp_path, 20, {"step": 20}, keep=1)
    assert load_checkpoint(latest_checkpoint(tmp_path)) == {"step": 20}
    assert load_checkpoint(tmp_path / "step-00000030.abandoned") == {"step": 30}
    assert "step-00000030.abandoned" in caplog.text


# ---- damage


@pytest.fixture
def two(tmp_path):
    """Checkpoints at steps 1 and 2; a test damages the second."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "w": torch.arange(50.0) + step}, keep=2)
    return tmp_path


def damaged(two, caplog, said):
    """The second is skipped with a line that names it and says why; loading it by name refuses with the same reason."""
    with caplog.at_level(logging.WARNING):
        latest = latest_checkpoint(two)
    assert latest is not None
    assert latest.name == "step-00000001"
    assert "step-00000002" in caplog.text
    assert said in caplog.text
    for load in (load_checkpoint, lambda path: find_checkpoint(two, path)):
        with pytest.raises(UserError, match="step-00000002") as error:
            load(two / "step-00000002")
        assert said in str(error.value)


FILES = ["state.json", "tensors-00001.safetensors", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_noticed(two, caplog, file):
    (two / "step-00000002" / file).unlink()
    damaged(two, caplog, f"{file} is missing")


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_file_is_noticed(two, caplog, file):
    path = two / "step-00000002" / file
    path.write_bytes(path.read_bytes()[:-7])
    damaged(two, caplog, "manifest.json cannot be read" if file == "manifest.json" else f"{file} has")


@pytest.mark.parametrize("file", FILES[:2])
def test_a_flipped_bit_is_noticed(two, caplog, file):
    path = two / "step-00000002" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    damaged(two, caplog, f"{file} was altered")


def test_a_manifest_that_forgets_a_file_is_noticed(two, caplog):
    """Well-formed JSON, so only its own digest can tell."""
    path = two / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["tensors-00001.safetensors"]
    path.write_text(json.dumps(manifest))
    damaged(two, caplog, "manifest.json was altered")


def test_no_flipped_bit_of_any_file_changes_what_is_loaded(two):
    """200 random single-bit flips: each is noticed, or (white space of the manifest) changes nothing."""
    folder, draw = two / "step-00000002", random.Random(0)
    whole = load_checkpoint(folder)
    noticed = 0
    for _ in range(200):
        path = folder / draw.choice(FILES)
        original = path.read_bytes()
        data = bytearray(original)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        if find_fault(folder) is None:
            assert same(whole, load_checkpoint(folder))
        else:
            noticed += 1
        path.write_bytes(original)
    assert noticed >= 190


@pytest.mark.parametrize("asked", [True, "step-00000002"])
def test_files_of_another_version_are_no_damage_to_fall_back_from(two, monkeypatch, asked):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save_checkpoint(two, 2, {"step": 2}, keep=2)
    monkeypatch.undo()
    with pytest.raises(
        UserError, match="step-00000002: another version of rlhf_fast wrote it .its files have format 2, this"
    ):
        find_checkpoint(two, asked if asked is True else two / asked)


def test_resuming_says_when_there_is_nothing_good(two, tmp_path):
    assert find_checkpoint(two, True).name == "step-00000002"
    for path in list_checkpoints(two):
        (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="all 2 checkpoints .* are damaged"):
        find_checkpoint(two, True)
    with pytest.raises(UserError, match="there is no checkpoint in .*nowhere"):
        find_checkpoint(tmp_path / "nowhere", True)


def test_a_full_disk_is_said_before_writing(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"w": torch.zeros(10)}, keep=1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 2\.0 MB and .* has 1\.0 MB free"):
        save_checkpoint(tmp_path, 2, {"w": torch.zeros(250_000)}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_disk_that_fills_while_writing_leaves_the_previous_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=1)

    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", full)
        with pytest.raises(UserError, match="could not be written to .*: No space left on device"):
            save_checkpoint(tmp_path, 2, {"step": 2}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(latest_checkpoint(tmp_path)) == {"step": 1}


def test_a_kill_between_replacing_and_renaming_loses_nothing(tmp_path):
    """What `_move_into_place` leaves when it dies after its first rename: only ``step-N.old``."""
    path = save_checkpoint(tmp_path, 5, {"step": 5}, keep=1)
    path.rename(path.with_name(path.name + ".old"))
    (tmp_path / ".tmp-step-00000005-123").mkdir()
    assert load_checkpoint(latest_checkpoint(tmp_path)) == {"step": 5}
    save_checkpoint(tmp_path, 5, {"step": "again"}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


KILLED = textwrap.dedent("""
    import os, signal, sys
    import torch
    from rlhf_fast.run import checkpoint
    from rlhf_fast.run.checkpoint import save_checkpoint

    def save(root, step, content):
        save_checkpoint(root, step, {"content": content, "w": torch.full((1000,), float(content))}, keep=1)

    def dying(original):
        def wrapped(*args, **kwargs):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        return wrapped

    for second in (2, 1):
        point = 0
        while True:  # a forked child per point, until one survives
            point += 1
            root = f"{sys.argv[1]}/{second}/{point}"
            child = os.fork()
            if child == 0:
                save(root, 1, 1)
                left = point
                # everything that touches the disk may be the last
                for owner, name in (
                    (checkpoint, "_sync"), (checkpoint, "save_file"), (checkpoint.shutil, "rmtree"),
                    (checkpoint.Path, "rename"), (checkpoint.Path, "write_bytes"), (checkpoint.Path, "write_text"),
                ):
                    setattr(owner, name, dying(getattr(owner, name)))
                save(root, second, 2)
                os._exit(0)
            if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
                break
        print(point - 1)
""")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folders that kills leave, by the second save's step."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    points = map(int, done.stdout.split())
    return {step: [folder / str(step) / str(i + 1) for i in range(n)] for step, n in zip((2, 1), points)}


@pytest.mark.parametrize("second", [2, 1], ids=["another step", "the same step again"])
def test_kill_9_at_every_point_of_a_save_leaves_a_good_checkpoint(killed, second):
    """The second of two saves, with keep=1, is killed at its n-th disk operation, for every n."""
    assert len(killed[second]) >= 10
    found = []
    for root in killed[second]:
        state = load_checkpoint(latest_checkpoint(root))
        assert torch.equal(state["w"], torch.full((1000,), float(state["content"])))
        found.append(state["content"])
        # and the next save cleans up
        save_checkpoint(root, 3, {"step": 3}, keep=1)
        assert [p.name for p in root.iterdir()] == ["step-00000003"]
    # early kills leave the first, late ones the second; never back and forth
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_kill_9_at_a_random_moment_leaves_a_good_checkpoint(tmp_path):
    """A process that saves without pause, killed from outside while it writes."""
    code = textwrap.dedent("""
        import sys, torch
        from rlhf_fast.run.checkpoint import save_checkpoint
        for step in range(1, 10**6):
            save_checkpoint(sys.argv[1], step, {"step": step, "w": torch.full((1 << 18,), float(step))}, keep=2)
            print(step, flush=True)
    """)
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    seen = [int(process.stdout.readline()) for _ in range(3)]
    while not list(tmp_path.glob(".tmp-*")):  # until one is being written
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    state = load_checkpoint(latest_checkpoint(tmp_path))
    assert state["step"] >= seen[-1]
    assert torch.equal(state["w"], torch.full((1 << 18,), float(state["step"])))


# ---- random numbers


def test_every_generator_continues_where_it_was(tmp_path):
    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.rand(3).tolist(),
            np.random.randn(),
            torch.rand(3).tolist(),
        )

    draw()  # an odd number of normals: the cached second one belongs to the state
    path = save_checkpoint(tmp_path, 1, {"rng": rng_state()}, keep=1)
    expected = draw(), draw()
    set_rng_state(load_checkpoint(path)["rng"])
    assert (draw(), draw()) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs here the states are restored")
def test_states_of_gpus_that_are_gone_are_left_alone(caplog):
    state = rng_state() | {"cuda": [torch.zeros(16, dtype=torch.uint8)] * 2}
    expected = torch.rand(3).tolist()
    set_rng_state(state)
    assert torch.rand(3).tolist() == expected
    assert "random state of 2 GPUs was saved and 0 are here" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_and_generators_of_the_gpu_come_back(tmp_path):
    weights = torch.randn(100, device="cuda")
    path = save_checkpoint(tmp_path, 1, {"rng": rng_state(), "w": weights.t(), "half": weights.bfloat16()}, keep=1)
    expected = [torch.rand(3, device=f"cuda:{i}") for i in range(torch.cuda.device_count())]
    state = load_checkpoint(path, device="cuda")
    assert torch.equal(state["w"], weights)
    assert torch.equal(state["half"], weights.bfloat16())
    set_rng_state(state["rng"])
    for i, numbers in enumerate(expected):
        assert torch.equal(torch.rand(3, device=f"cuda:{i}"), numbers)
