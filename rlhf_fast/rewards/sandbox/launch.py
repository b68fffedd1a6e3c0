"""How a guest is started: in a bubblewrap sandbox on this machine, or in a Docker container."""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import uuid
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rlhf_fast.errors import UserError
from rlhf_fast.rewards.sandbox import seccomp
from rlhf_fast.rewards.sandbox.process import Guest, Limits

logger = logging.getLogger(__name__)

NOBODY = "65534"
OLDEST_BWRAP = (0, 8, 0)  # the first with --disable-userns
SCRATCH_FILES = (
    4096  # in a sandbox's /tmp: an empty one takes nothing of its size, but a kilobyte of the kernel's memory
)
# bwrap cannot limit their number, so a /tmp that does is mounted before it, where bwrap alone sees it: over /sys, which no one inside has
MOUNT = 'mount -t tmpfs -o "$0" tmpfs /sys && exec "$@"'
ELSEWHERE = (
    "There are the sandboxes `bwrap`, `docker` and `http://HOST:PORT`, a machine that runs `rlhf-fast code-runner`"
)


class Sandbox(Protocol):
    """Starts guests."""

    filtered: bool  # whether code inside meets our own filter of system calls, and no /proc
    counts_files: bool  # whether code inside can make so many files only
    hint: str  # what to try where it does not start

    def start(self, job: dict[str, Any], limits: Limits) -> Guest: ...


class Bwrap:
    """Namespaces without privileges: no network, no processes, no files but an interpreter's, a filter on system calls.

    The file system is read-only: /usr, the interpreter if it lies elsewhere, /dev/null, and an empty /tmp of bounded size and
    number of files (without the latter, and a warning, where ``unshare`` may not mount what ``bwrap`` may).
    There is no /proc and no /sys, the environment is empty, and the guest is process 1 of its own. Started by root,
    the sandbox is built by an ordinary user all the same (``setpriv`` drops to 65534 first).

    Args:
        python: the interpreter inside; None takes this one or, where only root may read it, the system's python3.
    Raises:
        UserError: something is missing: says what, and how to install it.
    """

    filtered = True
    hint = (
        "Inside a container, user namespaces must be allowed (docker run --security-opt seccomp=unconfined "
        "--security-opt apparmor=unconfined); on Ubuntu 24.04 or newer, sysctl kernel.apparmor_restrict_unprivileged_userns=0."
    )

    def __init__(self, python: str | None = None) -> None:
        self._bwrap = _found("bwrap", "apt-get install bubblewrap (or dnf, pacman, zypper install bubblewrap)")
        version = _bwrap_version(self._bwrap)
        if version < OLDEST_BWRAP:
            raise UserError(
                f"sandbox 'bwrap': bubblewrap {'.'.join(map(str, version))} is too old, 0.8 or newer is needed. {ELSEWHERE}."
            )
        if platform.machine() not in seccomp.MACHINES:
            known = " and ".join(seccomp.MACHINES)
            raise UserError(
                f"sandbox 'bwrap': there is a system call filter for {known} only, this is {platform.machine()}. {ELSEWHERE}."
            )
        self._filter = seccomp.program(platform.machine())
        self._drop: list[str] = []
        if os.geteuid() == 0:
            setpriv = _found("setpriv", "apt-get install util-linux")
            self._drop = [setpriv, "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--no-new-privs", "--"]
        self.python = _interpreter(python)
        self._unshare = shutil.which("unshare")
        self.counts_files = self._unshare is not None and self._mounts()
        if not self.counts_files:
            logger.warning("sandbox 'bwrap': unshare cannot mount a file system here; the number of files has no limit")

    def __repr__(self) -> str:
        return f"bwrap with {self.python}"

    def _mounts(self) -> bool:
        command = [*self._drop, *self._mounted(Limits()), "true"]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    def _mounted(self, limits: Limits) -> list[str]:
        """The command before bwrap's, which puts a /tmp of limited size and number of files where bwrap takes it from."""
        options = f"size={limits.scratch_mb}m,nr_inodes={SCRATCH_FILES},mode=1777,noexec,nosuid,nodev"
        return [str(self._unshare), "--user", "--map-root-user", "--mount", "--", "sh", "-c", MOUNT, options]

    def start(self, job: dict[str, Any], limits: Limits) -> Guest:
        """A guest with this job, ready."""
        fd = os.memfd_create("seccomp")
        try:
            os.write(fd, self._filter)
            os.lseek(fd, 0, os.SEEK_SET)
            before = self._mounted(limits) if self.counts_files else []
            command = [*self._drop, *before, self._bwrap, *self._options(limits, fd), "--", self.python]
            return Guest(command, job, limits, pass_fds=(fd,))
        finally:
            os.close(fd)

    def _options(self, limits: Limits, filter_fd: int) -> list[str]:
        options = ["--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
        options += ["--uid", NOBODY, "--gid", NOBODY, "--hostname", "sandbox", "--clearenv"]
        # --new-session: no way to the terminal; --as-pid-1: no process of bwrap's own inside, whose environment could be read
        options += ["--die-with-parent", "--new-session", "--as-pid-1", "--seccomp", str(filter_fd)]
        options += ["--ro-bind", "/usr", "/usr"]
        for name in ("bin", "lib", "lib64"):
            path = Path("/", name)
            if path.is_symlink():
                options += ["--symlink", os.readlink(path), str(path)]
            elif path.is_dir():
                options += ["--ro-bind", str(path), str(path)]
        prefix = Path(self.python).parents[1]
        if not prefix.is_relative_to("/usr"):
            options += ["--ro-bind", str(prefix), str(prefix)]
        options += ["--dev-bind", "/dev/null", "/dev/null"]
        own = ["--size", str(limits.scratch_mb << 20), "--tmpfs", "/tmp"]
        return [
            *options,
            *(["--bind", "/sys", "/tmp"] if self.counts_files else own),
            "--chdir",
            "/tmp",
            "--remount-ro",
            "/",
        ]


class Docker:
    """A container without network, capabilities or a writable file system, one a run. Slow to start: about half a second.

    Processes, loopback and /proc exist inside, of the container's own; system calls meet Docker's filter, which is wider than ours.

    Args:
        image: has a ``python3``; it must be here already, nothing is pulled in a run.
    Raises:
        UserError: no ``docker``, no daemon that answers, or no such image.
    """

    filtered, counts_files = False, True
    hint = "Does `docker run --rm --network none IMAGE python3 -V` work?"

    def __init__(self, image: str = "python:3.12-slim") -> None:
        self._docker = _found("docker", "see https://docs.docker.com/engine/install")
        self.image = image
        for command, fix in (
            (["version"], "start the Docker daemon, or add yourself to the group `docker`"),
            (["image", "inspect", image], f"docker pull {image}"),
        ):
            done = subprocess.run([self._docker, *command], check=False, capture_output=True, text=True)
            if done.returncode:
                reason = " ".join(done.stderr.split())[-200:]
                raise UserError(f"sandbox 'docker': `docker {' '.join(command)}` fails ({reason}). Fix: {fix}.")

    def __repr__(self) -> str:
        return f"docker with {self.image}"

    def start(self, job: dict[str, Any], limits: Limits) -> Guest:
        """A guest with this job, ready."""
        name = f"rlhf-fast-{uuid.uuid4().hex}"
        options = ["--rm", "--interactive", "--name", name, "--network", "none", "--read-only", "--cap-drop", "ALL"]
        options += ["--security-opt", "no-new-privileges", "--user", f"{NOBODY}:{NOBODY}", "--pids-limit", "64"]
        # the interpreter and its files in /tmp, both in memory
        memory = f"{limits.memory_mb + limits.scratch_mb}m"
        options += ["--memory", memory, "--memory-swap", memory, "--log-driver", "none", "--pull", "never"]
        options += [
            "--tmpfs",
            f"/tmp:size={limits.scratch_mb}m,nr_inodes={SCRATCH_FILES},noexec,nosuid",
            "--workdir",
            "/tmp",
        ]
        command = [self._docker, "run", *options, "--entrypoint", "python3", self.image]
        # the client may need DOCKER_HOST and its like, and passes nothing on; killing it leaves the container
        return Guest(command, job, limits, environment=os.environ, on_close=partial(self._remove, name))

    def _remove(self, name: str) -> None:
        subprocess.run([self._docker, "rm", "--force", name], check=False, capture_output=True)


def _found(program: str, install: str) -> str:
    if path := shutil.which(program):
        return path
    raise UserError(f"sandbox: `{program}` is not installed. Install it: {install}. {ELSEWHERE}.")


def _bwrap_version(bwrap: str) -> tuple[int, ...]:
    text = subprocess.run([bwrap, "--version"], check=False, capture_output=True, text=True).stdout
    match = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else (0, 0, 0)


def _interpreter(python: str | None) -> str:
    """The real path of the interpreter: a virtual environment's would be a link into what is not there inside."""
    if python is not None:
        path = os.path.realpath(shutil.which(python) or python)
        if not os.access(path, os.X_OK):
            raise UserError(f"sandbox: `python: {python}` is no program here.")
        return path
    own = os.path.realpath(sys.executable)
    if os.geteuid() != 0 or _open_to_all(own):
        return own
    system = os.path.realpath(shutil.which("python3", path="/usr/bin:/usr/local/bin") or "/nowhere")
    if _open_to_all(system):
        return system
    raise UserError(
        f"sandbox 'bwrap': only root may read {own}, and the sandbox runs as an ordinary user. Install a Python in /usr "
        "(apt-get install python3) or give `python: /path/to/python3`."
    )


def _open_to_all(path: str) -> bool:
    """Whether every user may reach and read a file."""
    parts = [Path(path), *Path(path).parents]
    return all(p.exists() and p.stat().st_mode & (0o4 if p.is_file() else 0o1) for p in parts)
