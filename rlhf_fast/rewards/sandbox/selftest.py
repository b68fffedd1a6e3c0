"""Attacks that a sandbox must withstand before anything else runs in it."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace

from rlhf_fast.errors import UserError
from rlhf_fast.rewards.sandbox import wire
from rlhf_fast.rewards.sandbox.launch import ELSEWHERE, SCRATCH_FILES, Sandbox
from rlhf_fast.rewards.sandbox.process import Failed, Limits, SandboxFault

# Runs inside, with HOST_FILE, a path of this machine, FILTERED and MOST_FILES defined before it. An attack that is contained raises;
# escapes() returns the names of the others.
PROBES = r"""
import ctypes, os

libc = ctypes.CDLL(None, use_errno=True)
EPERM, ENOSYS = 1, 38

def system_call(on_x86_64, on_aarch64, *arguments):
    "Get through to a system call, whatever it then says about its arguments."
    number = on_aarch64 if os.uname().machine == "aarch64" else on_x86_64
    if libc.syscall(number, *arguments) == -1 and ctypes.get_errno() in (EPERM, ENOSYS):
        raise PermissionError

def connect():
    import _socket
    s = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    s.settimeout(0.5)
    s.connect(("1.1.1.1", 53))

def read_environment():
    known = ("PWD", "LC_CTYPE", "PATH", "HOSTNAME", "HOME", "LANG", "GPG_KEY")
    if all(name in known or name.startswith("PYTHON") for name in os.environ):
        raise KeyError

def fill_the_disk():
    for name, megabytes in (("one", SCRATCH_MB - 1), ("two", 2)):  # one file alone meets another limit
        with open("/tmp/" + name, "wb") as file:
            for _ in range(megabytes):
                file.write(bytes(1 << 20))

def make_files():
    for i in range(MOST_FILES + 1):
        os.close(os.open("/tmp/empty" + str(i), os.O_CREAT))

def become_root():
    os.setuid(0)
    if os.getuid():
        raise PermissionError

ATTACKS = {
    "open a network connection": connect,
    "read a file of this machine": lambda: os.stat(HOST_FILE),
    "read the environment": read_environment,
    "write to /usr": lambda: open("/usr/escaped", "w"),
    "write to the root folder": lambda: open("/escaped", "w"),
    "write more than its share": fill_the_disk,
    "allocate more than its share": lambda: bytearray(1 << 34),
    "become root": become_root,
    "signal another process": lambda: os.kill(os.getppid() or 2, 0),
    "make a namespace": lambda: system_call(272, 97, 0x10000000),
    "mount a file system": lambda: system_call(165, 40, b"none", b"/tmp", b"tmpfs", 0, 0),
    "load a bpf program": lambda: system_call(321, 280, 0, 0, 0),
}
if FILTERED:
    ATTACKS |= {
        "start a process": lambda: os.fork() or os._exit(0),
        "trace a process": lambda: system_call(101, 117, 0, 0, 0, 0),
        "set up io_uring": lambda: system_call(425, 425, 1, 0),
        "outlive its parent": lambda: system_call(157, 167, 1, 0, 0, 0, 0),
        "read /proc": lambda: os.stat("/proc/self"),
    }

if MOST_FILES:
    ATTACKS |= {"make more files than its share": make_files}

def escapes():
    found = []
    for name, attack in ATTACKS.items():
        try:
            attack()
        except (OSError, MemoryError, KeyError):
            continue
        found.append(name)
    return found

def loop():
    while True:
        pass

def flood():
    return "x" * 10**7
"""


def check_sandbox(sandbox: Sandbox, limits: Limits) -> None:
    """Attack a sandbox from inside.

    Raises:
        UserError: it does not start, or does not contain an attack: which, and what to do.
    """
    try:
        escapes = _escapes(sandbox, limits)
    except SandboxFault as fault:
        raise UserError(f"{sandbox!r} cannot run here: {fault}. {sandbox.hint} {ELSEWHERE}.") from None
    except Failed as failure:
        raise UserError(f"{sandbox!r} does not run even its own test ({failure}). {ELSEWHERE}.") from None
    if escapes:
        raise UserError(f"{sandbox!r} is not safe here: code inside could {', '.join(escapes)}. {ELSEWHERE}.")


def _escapes(sandbox: Sandbox, limits: Limits) -> list[str]:
    with tempfile.NamedTemporaryFile() as file:
        known = {"HOST_FILE": file.name, "FILTERED": sandbox.filtered, "SCRATCH_MB": limits.scratch_mb}
        known["MOST_FILES"] = SCRATCH_FILES if sandbox.counts_files else 0
        source = "".join(f"{name} = {value!r}\n" for name, value in known.items()) + PROBES
        with sandbox.start({"role": "call", "source": source}, replace(limits, timeout=10.0)) as guest:
            guest.send(("escapes", (), {}))
            kind, found = wire.message(guest.line(time.monotonic() + 10.0))[:2]
        if kind != "value":
            raise Failed(found)
        for name, attack in (("loop", "run for ever"), ("flood", "say more than its share")):
            with sandbox.start({"role": "call", "source": source}, limits) as guest:
                guest.send((name, (), {}))
                try:
                    guest.line(time.monotonic() + 0.2 if name == "loop" else time.monotonic() + 10.0)
                except Failed:
                    continue
                found.append(attack)
    return found
