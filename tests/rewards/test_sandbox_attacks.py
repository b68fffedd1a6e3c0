"""Code that wants out, or wants to pass without being right. Each attack must end contained, for root and for others."""

from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_fast.rewards.grading import LocalGrader, task_from
from rlhf_fast.rewards.sandbox import Bwrap, Failed, Limits, check_sandbox, wire
from rlhf_fast.rewards.sandbox.launch import SCRATCH_FILES

LIMITS = Limits(timeout=0.5, memory_mb=128, scratch_mb=4, output_kb=64)


# name -> number on x86_64, on aarch64, arguments. One that is refused says EPERM or ENOSYS whatever the arguments.
REFUSED = {
    "unshare": (272, 97, 0x10000000),
    "clone into a namespace": (56, 220, 0x10000000, 0, 0, 0, 0),
    "setns": (308, 268, 0, 0),
    "mount": (165, 40, 0, 0, 0, 0, 0),
    "pivot_root": (155, 41, 0, 0),
    "chroot": (161, 51, b"/tmp"),
    "ptrace": (101, 117, 0, 0, 0, 0),
    "process_vm_readv": (310, 270, 1, 0, 0, 0, 0, 0),
    "pidfd_open": (434, 434, 1, 0),
    "io_uring": (425, 425, 1, 0),
    "bpf": (321, 280, 0, 0, 0),
    "perf_event_open": (298, 241, 0, 0, 0, 0, 0),
    "userfaultfd": (323, 282, 0),
    "keyctl": (250, 219, 0, 0, 0, 0, 0),
    "memfd_create": (319, 279, b"x", 0),
    "open_by_handle_at": (304, 265, 0, 0, 0),
    "prctl, to outlive its parent": (157, 167, 1, 0, 0, 0, 0),
    "seccomp": (317, 277, 0, 0, 0),
    "sched_setscheduler": (144, 119, 0, 0, 0),
    "shared memory": (29, 194, 0, 4096, 0o1600),
    "32-bit system calls": (0x40000000 + 41, 198, 2, 1, 0),
}  # fmt: skip
SYSTEM_CALLS = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def reached(x86_64, aarch64, *arguments):
    number = aarch64 if os.uname().machine == "aarch64" else x86_64
    return libc.syscall(number, *arguments) != -1 or ctypes.get_errno() not in (1, 38)
def attack():
    return [name for name, call in {REFUSED}.items() if reached(*call)]
"""

# Each defines attack(), which returns its loot. Contained: it raises, returns nothing, or the run fails.
ATTACKS = {
    "fork bomb": "import os\ndef attack():\n    while True: os.fork()",
    "subprocess": "import subprocess\ndef attack(): return subprocess.run(['/bin/echo', 'x'])",
    "shell": "import os\ndef attack(): return os.system('true') == 0",
    "another program in its place": "import os\ndef attack(): os.execv('/bin/echo', ['echo', 'loot'])",
    "thread bomb": (
        "import threading, time\nthreading.stack_size(32768)\ndef attack():\n"
        "    n = 0\n    try:\n        while n < 1000:\n            threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); n += 1\n"
        "    except RuntimeError: pass\n    return n >= 64"
    ),
    "memory at once": "def attack(): return len(bytearray(1 << 30))",
    "memory bit by bit": "def attack():\n    kept = []\n    while True: kept.append(bytes(1 << 20))",
    "memory mapped": "import mmap\ndef attack(): return len(mmap.mmap(-1, 1 << 30))",
    "disk": "def attack():\n    f = open('/tmp/x', 'wb')\n    for _ in range(5): f.write(bytes(1 << 20)); f.flush()\n    return 'more than 4 MB'",
    "disk in many files": (
        "def attack():\n    for i in range(5):\n        with open(f'/tmp/{i}', 'wb') as f: f.write(bytes(1 << 20))\n    return 'more than 4 MB'"
    ),
    "endless loop": "def attack():\n    while True: pass",
    "endless sleep": "import time\ndef attack(): time.sleep(1000)",
    "deaf to signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "def attack():\n    while True: pass"
    ),
    "endless regular expression": "import re\ndef attack(): return re.match('(a+)+$', 'a' * 60 + 'b')",
    "network": "import socket\ndef attack(): return socket.create_connection(('1.1.1.1', 53), 0.3)",
    "loopback": "import socket\ndef attack(): return socket.socket().bind(('127.0.0.1', 0)) is None",
    "unix socket": "import socket\ndef attack(): return socket.socket(socket.AF_UNIX)",
    "name look-up": "import socket\ndef attack(): return socket.getaddrinfo('example.com', 80)",
    "password file": "def attack(): return open('/etc/passwd').read()",
    "home folders": "import os\ndef attack(): return [p for p in ('/root', '/home', '/work', '/opt', '/etc', '/var') if os.path.exists(p)]",
    "environment": "import os\ndef attack(): return os.environ.get('SECRET_OF_THIS_TEST')",
    "environment of process 1": "def attack(): return open('/proc/1/environ').read()",
    "command line": "def attack(): return open('/proc/self/cmdline').read()",
    "core pattern": "def attack(): return open('/proc/sys/kernel/core_pattern', 'w')",
    "memory of a process": "def attack(): return open('/proc/self/mem', 'rb')",
    "devices": "import os\ndef attack(): return set(os.listdir('/dev')) - {'null'}",
    "symbolic link": "import os\ndef attack():\n    os.symlink('/etc/passwd', '/tmp/l')\n    return open('/tmp/l').read()",
    "hard link": "import os\ndef attack(): os.link('/usr/bin/env', '/tmp/l'); return 'linked'",
    "path upwards": "def attack(): return open('../../../../../etc/passwd').read()",
    "write to /usr": "def attack(): return open('/usr/lib/escaped', 'w')",
    "write to the root folder": "def attack(): return open('/escaped', 'w')",
    "set-user-id program": "import os\ndef attack():\n    open('/tmp/x', 'w').close(); os.chmod('/tmp/x', 0o4755); return 'chmod'",
    "named pipe": "import os\ndef attack(): os.mkfifo('/tmp/p'); return 'made'",
    "become root": "import os\ndef attack(): os.setuid(0); return os.getuid() == 0",
    "kill the parent": "import os, signal\ndef attack(): os.kill(os.getppid() or -1, signal.SIGKILL); return 'sent'",
    "kill everybody": "import os, signal\ndef attack(): os.kill(-1, signal.SIGKILL); return 'sent'",
    "stop the parent": "import os, signal\ndef attack(): os.killpg(0, signal.SIGSTOP); return 'sent'",
    "raise its own limits": "import resource\ndef attack(): resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); return 'raised'",
    "leaked descriptors": (
        "import os\ndef attack():\n    found = []\n    for fd in range(3, 64):\n        try: found.append(os.fstat(fd).st_mode)\n        except OSError: pass\n"
        "    return [oct(m) for m in found if m & 0o170000 not in (0o010000, 0o020000)]"  # but its pipe and /dev/null
    ),
    "type into the terminal": "import fcntl\ndef attack(): fcntl.ioctl(0, 0x5412, b'x'); return 'typed'",
    "stack overflow": "import sys\nsys.setrecursionlimit(10**9)\ndef attack(): return attack()",
    "crash": "import ctypes\ndef attack(): ctypes.string_at(0)",
    "output flood": "def attack(): return 'x' * 10**6",
    "output without end": "import os\ndef attack():\n    while True: os.write(3, b'x' * 4096)",
    "answer that is no message": "import os\ndef attack(): os.write(3, b'\\xff\\x00{}\\n')",
    "answer nested deeply": "import os\ndef attack(): os.write(3, b'[\"value\",' + b'[\"list\",' * 5000 + b'\\n')",
    "system calls": SYSTEM_CALLS,
}  # fmt: skip


def loot(sandbox: Bwrap, source: str, limits: Limits = LIMITS) -> object:
    """What an attack came back with."""
    try:
        with sandbox.start({"role": "call", "source": source}, limits) as guest:
            guest.send(("attack", (), {}))
            kind, *got = wire.message(guest.line(time.monotonic() + limits.timeout))
    except (Failed, wire.Malformed):
        return None
    return got[0] if kind == "value" else None


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_contained(sandbox, name, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THIS_TEST", "loot")
    assert not loot(sandbox, ATTACKS[name])


def test_empty_files_come_to_an_end(sandbox):
    """A million of them would take a gigabyte of the kernel's memory, and nothing of the file system's size."""
    if not sandbox.counts_files:
        pytest.skip("unshare cannot mount a file system here")
    make = "for i in range(10**6): os.close(os.open(f'/tmp/{i}', os.O_CREAT))"
    source = f"import os\ndef attack():\n    try:\n        {make}\n    except OSError: return len(os.listdir('/tmp'))"
    assert SCRATCH_FILES - 8 < loot(sandbox, source, replace(LIMITS, timeout=20.0)) < SCRATCH_FILES


def test_an_attack_that_nobody_stops_is_seen(sandbox):
    """The measure of the test above: what is allowed comes back as loot."""
    assert loot(sandbox, "import os\ndef attack(): return os.getcwd()") == "/tmp"
    assert loot(sandbox, SYSTEM_CALLS.replace(repr(REFUSED), repr({"getpid": (39, 172)}))) == ["getpid"]


@pytest.mark.skipif(os.geteuid() != 0, reason="the tests above run as an ordinary user already")
def test_attacks_are_contained_for_an_ordinary_user(sandbox):
    """Root becomes one in a fork of this process, which need not be able to read the interpreter's files again."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None:
        pytest.skip("no Python in /usr that an ordinary user could run")
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setresgid(65533, 65533, 65533)
            os.setresuid(65533, 65533, 65533)
            ordinary = Bwrap(python)
            check_sandbox(ordinary, LIMITS)
            with ThreadPoolExecutor(2) as pool:
                found = pool.map(lambda source: loot(ordinary, source), ATTACKS.values())
            escaped = [name for name, taken in zip(ATTACKS, found) if taken]
            os.write(writing, json.dumps(escaped).encode())
        except BaseException as error:  # noqa: BLE001 (a fork must not go on with the tests)
            os.write(writing, json.dumps(repr(error)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert json.load(pipe) == []
    os.waitpid(child, 0)


def test_nothing_is_left_running(sandbox):
    """A candidate that ignores every signal dies with its sandbox, and so does bwrap."""
    with sandbox.start({"role": "call", "source": ATTACKS["deaf to signals"]}, LIMITS) as guest:
        guest.send(("attack", (), {}))
        bwrap = guest._process.pid
        inside = [int(pid) for pid in Path(f"/proc/{bwrap}/task/{bwrap}/children").read_text().split()]
        assert inside
    until = time.monotonic() + 5
    while any(_runs(pid) for pid in [bwrap, *inside]) and time.monotonic() < until:
        time.sleep(0.01)
    assert not [pid for pid in [bwrap, *inside] if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------------------------------------------- forged verdicts

LIAR = "class Liar(int):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    __hash__ = int.__hash__\n"
# Programs that should double a number, and do not.
FORGERIES = {
    "equal to everything": LIAR + "def double(x): return Liar(7)",
    "an object that is equal to everything": "class Any:\n    def __eq__(self, other): return True\ndef double(x): return Any()",
    "leaves with success": "import os\ndef double(x): os._exit(0)",
    "exits with success": "import sys\ndef double(x): sys.exit(0)",
    "leaves while it is loaded": "raise SystemExit(0)",
    "says that the test passed": "import os\nos.write(3, b'[\"passed\"]\\n' * 9)\ndef double(x): os.write(3, b'[\"passed\"]\\n'); os._exit(0)",
    "says that it is ready, and more": "import os\nos.write(3, b'ready\\n[\"passed\"]\\n')\ndef double(x): return 7",
    "prints the verdict": "print('[\"passed\"]', flush=True)\ndef double(x): return 7",
    "replaces isinstance and len": "import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.len = lambda x: 0\ndef double(x): return None",
    "replaces the function that encodes": "import sys\nsys.modules['__main__'].encoded = lambda v: '[\"passed\"]'\ndef double(x): return 7",
    "reads the answer from frames": (
        "import sys\ndef double(x):\n    f, seen = sys._getframe(), []\n    while f:\n        seen += [v for v in [*f.f_locals.values(), *f.f_globals.values()] if type(v) is int and v == x + x]\n"
        "        f = f.f_back\n    return seen[0]"
    ),
    "reads the answer from live objects": (
        "import gc\ndef double(x):\n    for o in gc.get_objects():\n        for v in (o.values() if type(o) is dict else o if type(o) in (list, tuple) else ()):\n"
        "            if type(v) is int and v == x + x or type(v) is str and 'double(20021)' in v: return v\n"
    ),
    "reads the answer from its input": "import os\ndef double(x):\n    os.set_blocking(0, False)\n    return int(os.read(0, 9999).decode())",
    "ends loops": "def double(x): raise StopIteration",
    "is not there": "",
    "is no Python": "def double(x) return 2 * x",
    "true for one": "def double(x): return True",
    "the wrong type": "def double(x): return str(2 * x)",
    "a float": "def double(x): return 2.5 * x",
    "endless": "def double(x):\n    while True: pass",
}  # fmt: skip
TESTS = {
    "calls": [{"args": [20021], "expected": 40042}],
    "asserts": "def check(candidate):\n    assert all(map(lambda x: candidate(x) == 2 * x, [20021, 4]))\n    assert all(map(candidate, [1, 2]))\ncheck(double)",
    "one assert": ["assert double(20021) == 40042"],
}


@pytest.mark.parametrize("kind", TESTS)
@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_forged(sandbox, name, kind):
    grade = LocalGrader(sandbox).grade(task_from(FORGERIES[name], TESTS[kind], "double"), LIMITS)
    assert grade.passed == 0 and grade.reason


@pytest.mark.parametrize(
    "program",
    ["", "print(42, end='x')", "import os\nos.write(1, b'ready\\n42')", "print(42)\nraise SystemExit(1)", "print(42)\n1/0",
     "print(42, flush=True)\nwhile True: pass", "print('42' * 10**6)", "import sys\nsys.stderr.write('42')"],
)  # fmt: skip
def test_a_program_has_to_print_just_the_answer_and_end_well(sandbox, program):
    task = task_from(program, [{"input": "21", "output": "42"}])
    assert LocalGrader(sandbox).grade(task, LIMITS).passed == 0


@pytest.mark.parametrize("kind", TESTS)
def test_an_honest_program_passes(sandbox, kind):
    program = "print('loading')\ndef double(x):\n    print(x)\n    return 2 * x"
    task = task_from(program, TESTS[kind], "double")
    grade = LocalGrader(sandbox).grade(task, Limits())
    assert (grade.passed, grade.total, grade.reason) == (1, 1, "")
