"""The system calls that tested code may make: those of a Python that computes, reads, writes and waits.

Everything else is refused, among it sockets, new processes, namespaces, ptrace, io_uring, bpf, mounts, and prctl, with which a
process could ask to outlive its parent. Threads are allowed, processes are not.
"""

from __future__ import annotations

import struct

# number on x86_64, number on aarch64 (None: it does not exist there)
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "ioctl": (16, 29),
    "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "access": (21, None),
    "pipe": (22, None), "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216), "mincore": (27, 232),
    "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None), "nanosleep": (35, 101), "getitimer": (36, 102),
    "alarm": (37, None), "setitimer": (38, 103), "getpid": (39, 172), "execve": (59, 221), "exit": (60, 93),
    "uname": (63, 160), "fcntl": (72, 25), "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83),
    "truncate": (76, 45), "ftruncate": (77, 46), "getdents": (78, None), "getcwd": (79, 17), "chdir": (80, 49),
    "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None), "unlink": (87, None), "readlink": (89, None),
    "umask": (95, 166), "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "getgroups": (115, 158), "sigaltstack": (131, 132), "statfs": (137, 43), "fstatfs": (138, 44),
    "arch_prctl": (158, None), "setrlimit": (160, 164), "gettid": (186, 178), "time": (201, None), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "set_tid_address": (218, 96), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94), "tgkill": (234, 131),
    "openat": (257, 56), "mkdirat": (258, 34), "newfstatat": (262, 79), "unlinkat": (263, 35), "renameat": (264, 38),
    "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99),
    "dup3": (292, 24), "pipe2": (293, 59), "prlimit64": (302, 261), "renameat2": (316, 276), "getrandom": (318, 278),
    "statx": (332, 291), "rseq": (334, 293), "faccessat2": (439, 439),
}  # fmt: skip
MACHINES = {  # machine -> column above, its name in the kernel (linux/audit.h), number of clone
    "x86_64": (0, 0xC000003E, 56),
    "aarch64": (1, 0xC00000B7, 220),
}
CLONE3 = 435  # has its flags in memory, where a filter cannot look: "not known here", and the C library takes clone
CLONE_THREAD = 0x00010000
X32 = 0x40000000  # x86_64 calls under other numbers
EPERM, ENOSYS = 1, 38

LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # linux/bpf_common.h
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000  # linux/seccomp.h
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


def program(machine: str) -> bytes:
    """The filter for ``machine`` as bwrap's ``--seccomp`` reads it: an array of struct sock_filter.

    Raises:
        KeyError: no table for this machine.
    """
    column, architecture, clone = MACHINES[machine]
    allowed = [numbers[column] for numbers in ALLOWED.values() if numbers[column] is not None]
    code = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (JUMP_AT_LEAST, 0, 1, X32),
        (RETURN, 0, 0, ERRNO | ENOSYS),
        (JUMP_EQUAL, 0, 1, CLONE3),
        (RETURN, 0, 0, ERRNO | ENOSYS),
        (JUMP_EQUAL, 0, 4, clone),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (JUMP_ANY_BIT, 0, 1, CLONE_THREAD),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, ERRNO | EPERM),
    ]
    # each jumps to the last line when it matches
    code += [(JUMP_EQUAL, len(allowed) - i, 0, number) for i, number in enumerate(allowed)]
    code += [(RETURN, 0, 0, ERRNO | EPERM), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *line) for line in code)
