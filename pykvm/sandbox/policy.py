"""Answers to each system call of a confined process, for a given confinement."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pykvm.sandbox._sandbox import lib
from pykvm.sandbox.confinement import Confinement
from pykvm.sandbox.filter_program import Match
from pykvm.sandbox.system_calls import (
    ABSENT,
    ALLOWED,
    CHANGES_FILES,
    IO_URING,
    KILLED,
    SOCKETS,
)

__all__ = ["ABSENT_ANSWER", "REFUSED_ANSWER", "Policy", "number_of", "policy_for"]

REFUSED_ANSWER: Final[int] = lib.SECCOMP_RET_ERRNO | lib.EPERM
ABSENT_ANSWER: Final[int] = lib.SECCOMP_RET_ERRNO | lib.ENOSYS

_Rules = tuple[tuple[Match, ...], ...]

_64_BITS: Final = (1 << 64) - 1
_TYPE: Final = 0xFF00  # of an ioctl: asm-generic/ioctl.h

# Terminals have requests that write into their input (TIOCSTI, TIOCLINUX) next to these. Of TAPs,
# TUNSETIFF would take another one.
_REQUESTS: Final = (
    *("TCGETS", "TCSETS", "TCSETSW", "TCSETSF", "TCGETS2", "TCSETS2", "TCSETSW2", "TCSETSF2"),
    *("TIOCGWINSZ", "TIOCOUTQ", "FIONBIO", "FIONREAD", "FIOCLEX", "FIONCLEX"),
    *("BLKDISCARD", "BLKZEROOUT", "BLKGETSIZE64", "BLKSSZGET"),
    *("TUNGETFEATURES", "TUNGETIFF", "TUNSETOFFLOAD", "TUNGETVNETHDRSZ", "TUNSETVNETHDRSZ"),
    *("TUNSETVNETLE", "TUNSETVNETBE", "TUNSETQUEUE"),
)

# Without F_SETOWN, F_SETSIG and F_NOTIFY, which send signals, and without leases.
_FCNTL: Final = (
    *("F_DUPFD", "F_DUPFD_CLOEXEC", "F_GETFD", "F_SETFD", "F_GETFL", "F_SETFL"),
    *("F_GETLK", "F_SETLK", "F_SETLKW", "F_OFD_GETLK", "F_OFD_SETLK", "F_OFD_SETLKW"),
    *("F_ADD_SEALS", "F_GET_SEALS", "F_GETPIPE_SZ", "F_SETPIPE_SZ"),
)

_NAMESPACES: Final[int] = (
    lib.CLONE_NEWCGROUP
    | lib.CLONE_NEWIPC
    | lib.CLONE_NEWNET
    | lib.CLONE_NEWNS
    | lib.CLONE_NEWPID
    | lib.CLONE_NEWUSER
    | lib.CLONE_NEWUTS
)
_THREAD: Final[int] = (
    lib.CLONE_THREAD | lib.CLONE_VM | lib.CLONE_SIGHAND | lib.CLONE_FS | lib.CLONE_FILES
)


@dataclass(frozen=True)
class Policy:
    """Answers to system calls.

    Attributes:
        checked: calls by number that are allowed if all conditions of one list hold.
        actions: what seccomp does with calls of these numbers, whatever their arguments are.
    """

    checked: dict[int, _Rules]
    actions: dict[int, int]


def number_of(call: str) -> int:
    """Return the number of a system call; -1 where this processor or its headers lack it."""
    return int(getattr(lib, f"__NR_{call}"))


def policy_for(confinement: Confinement) -> Policy:
    """Return the answers for a confinement of this process."""
    rules = {
        "ioctl": _ioctl(),  # first: vCPUs are run by it
        # Code comes from files only, as modules do: also from those that were just written.
        "mmap": (
            (Match(2, 0, lib.PROT_EXEC),),
            (Match(2, 0, lib.PROT_WRITE), Match(3, 0, lib.MAP_ANONYMOUS)),
        ),
        "mprotect": ((Match(2, 0, lib.PROT_EXEC),),),
        "fcntl": tuple((Match(1, getattr(lib, name)),) for name in _FCNTL),
        "openat": _openat(confinement),
        "clone": ((Match(0, _THREAD, _THREAD | _NAMESPACES),),),
        "kill": tuple((Match(0, pid),) for pid in (os.getpid(), *confinement.children)),
        "tgkill": ((Match(0, os.getpid()),),),
        # 0 is the thread itself, also below: other processes are none of its business.
        "sched_setaffinity": ((Match(0, 0),),),
        "prlimit64": ((Match(0, 0), Match(2, 0, _64_BITS)),),  # without new limits
        "prctl": tuple(
            (Match(0, option),) for option in (lib.PR_SET_NAME, lib.PR_GET_NAME, lib.PR_SET_VMA)
        ),
        # A socket that is not connected could send anywhere. sendmsg() cannot be looked into.
        "sendto": ((Match(4, 0, _64_BITS),),),
    }
    allowed = [*ALLOWED]
    if confinement.changes_files:
        allowed += CHANGES_FILES
    if confinement.io_uring:
        allowed += IO_URING
    if confinement.families:
        allowed += [*SOCKETS, "sendto"]
        del rules["sendto"]
        made = tuple((Match(0, family),) for family in confinement.families)
        rules |= {"socket": made, "socketpair": made}
    return Policy(
        {number: rule for call, rule in rules.items() if (number := number_of(call)) >= 0},
        _numbered(KILLED, lib.SECCOMP_RET_KILL_PROCESS)
        | _numbered(ABSENT, ABSENT_ANSWER)
        | _numbered(allowed, lib.SECCOMP_RET_ALLOW),
    )


def _numbered(calls: Iterable[str], action: int) -> dict[int, int]:
    return {number: action for call in calls if (number := number_of(call)) >= 0}


def _ioctl() -> _Rules:
    types = (lib.KVMIO, lib.VHOST_VIRTIO)
    return (
        *((Match(1, number << 8, _TYPE),) for number in types),
        *((Match(1, getattr(lib, name)),) for name in _REQUESTS),
    )


def _openat(confinement: Confinement) -> _Rules:
    if not confinement.changes_files:
        return ((Match(2, 0, lib.O_ACCMODE | lib.O_CREAT | lib.O_TRUNC),),)
    # Landlock knows where. Before ABI 3 it did not see a truncation without writing, and before
    # ABI 5 not the fourth mode, which is for ioctls alone: open(2), "access mode 3".
    return (
        (Match(2, lib.O_RDONLY, lib.O_ACCMODE | lib.O_TRUNC),),
        (Match(2, lib.O_WRONLY, lib.O_ACCMODE),),
        (Match(2, lib.O_RDWR, lib.O_ACCMODE),),
    )
