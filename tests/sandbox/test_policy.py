"""System calls that a confined process may make, and with which arguments.

Numbers and requests are typed in here from the x86-64 ABI: what the compiler gives is checked too.
"""

import itertools
import os
from pathlib import Path

import pytest

from pykvm.sandbox import system_calls
from pykvm.sandbox.confinement import Confinement
from pykvm.sandbox.filter_program import assemble, packed
from pykvm.sandbox.policy import REFUSED_ANSWER, policy_for
from tests.rigs.system_call_filter import ALLOW, ENOSYS, EPERM, KILL, answer

pytestmark = pytest.mark.unit

# arch/x86/entry/syscalls/syscall_64.tbl
OPENAT, MMAP, MPROTECT, IOCTL, FCNTL, CLONE = 257, 9, 10, 16, 72, 56
KILL_CALL, TGKILL, PRCTL, PRLIMIT, AFFINITY = 62, 234, 157, 302, 203
SOCKET, CONNECT, SENDTO, SOCKETPAIR, BIND, LISTEN = 41, 42, 44, 53, 49, 50
UNLINK, MKDIR, CHMOD, FCHMOD, IO_URING_SETUP = 87, 83, 90, 91, 425

PID = os.getpid()
READ, WRITE, EXECUTE = 1, 2, 4  # PROT_
PRIVATE, ANONYMOUS = 0x02, 0x20  # MAP_
HIGH = 1 << 32  # where the kernel looks at the lower half of an argument only
THREAD = 0x3D0F00  # of glibc's pthread_create(): VM, FS, FILES, SYSVSEM, SIGHAND, THREAD, ...


def ask(number: int, *arguments: int, confinement: Confinement | None = None) -> int:
    policy = policy_for(confinement or Confinement())
    program = packed(assemble(policy.checked, policy.actions, REFUSED_ANSWER))
    return answer(program, number, arguments)


def test_no_call_is_in_two_tables() -> None:
    tables = [set(getattr(system_calls, name)) for name in system_calls.__all__]
    for one, other in itertools.combinations(tables, 2):
        assert not one & other
    for name in system_calls.__all__:
        table = getattr(system_calls, name)
        assert len(set(table)) == len(table), name


@pytest.mark.parametrize(
    ("number", "arguments", "wanted"),
    [
        (OPENAT, (0, 0, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY), ALLOW),
        (OPENAT, (0, 0, os.O_RDONLY | HIGH), ALLOW),
        (OPENAT, (0, 0, os.O_WRONLY), EPERM),
        (OPENAT, (0, 0, os.O_RDWR), EPERM),
        (OPENAT, (0, 0, os.O_CREAT), EPERM),
        (OPENAT, (0, 0, os.O_TRUNC), EPERM),
        (OPENAT, (0, 0, os.O_TMPFILE | os.O_WRONLY), EPERM),
        (2, (0, os.O_RDONLY), EPERM),  # open
        (85, (0, 0), EPERM),  # creat
        (MMAP, (0, 4096, READ | WRITE, PRIVATE | ANONYMOUS), ALLOW),
        (MMAP, (0, 4096, READ | EXECUTE, PRIVATE), ALLOW),  # a library
        (MMAP, (0, 4096, READ | WRITE | EXECUTE, PRIVATE), EPERM),
        (MMAP, (0, 4096, READ | EXECUTE, PRIVATE | ANONYMOUS), EPERM),
        (MPROTECT, (0, 4096, READ | WRITE), ALLOW),
        (MPROTECT, (0, 4096, READ | EXECUTE), EPERM),
        (329, (0, 4096, READ | EXECUTE), EPERM),  # pkey_mprotect
        (CLONE, (THREAD,), ALLOW),
        (CLONE, (0x01200011,), EPERM),  # of fork()
        (CLONE, (0x4111,), EPERM),  # of vfork()
        (CLONE, (THREAD & ~0x10000,), EPERM),
        *((CLONE, (THREAD | 1 << bit,), EPERM) for bit in (17, 25, 26, 27, 28, 29, 30)),
        (56, (0x00020000,), EPERM),
        (57, (), EPERM),  # fork
        (58, (), EPERM),  # vfork
        (435, (), ENOSYS),  # clone3
        (437, (), ENOSYS),  # openat2
        (KILL_CALL, (PID, 15), ALLOW),
        (KILL_CALL, (PID | HIGH, 15), ALLOW),
        (KILL_CALL, (PID + 1, 15), EPERM),
        (KILL_CALL, (0, 15), EPERM),
        (KILL_CALL, (0xFFFFFFFF, 9), EPERM),
        (TGKILL, (PID, 77, 9), ALLOW),
        (TGKILL, (PID + 1, 77, 9), EPERM),
        (200, (77, 9), EPERM),  # tkill
        (129, (PID, 9), EPERM),  # rt_sigqueueinfo
        (PRCTL, (15,), ALLOW),  # PR_SET_NAME
        (PRCTL, (4,), EPERM),  # PR_SET_DUMPABLE
        (PRCTL, (22,), EPERM),  # PR_SET_SECCOMP
        (317, (1,), EPERM),  # seccomp
        (PRLIMIT, (0, 7, 0, 4096), ALLOW),
        (PRLIMIT, (0, 7, 4096, 0), EPERM),
        (PRLIMIT, (0, 7, HIGH, 0), EPERM),
        (PRLIMIT, (1, 7, 0, 4096), EPERM),
        (AFFINITY, (0,), ALLOW),
        (AFFINITY, (1,), EPERM),
        (SOCKET, (1, 1), EPERM),
        (SOCKET, (2, 1), EPERM),
        (SOCKETPAIR, (1, 2), EPERM),
        (CONNECT, (5,), EPERM),
        (SENDTO, (5, 0, 9, 0, 0, 0), ALLOW),
        (SENDTO, (5, 0, 9, 0, HIGH, 16), EPERM),
        (UNLINK, (), EPERM),
        (CHMOD, (), EPERM),
        (FCHMOD, (), EPERM),
        (IO_URING_SETUP, (), EPERM),
        (101, (), KILL),  # ptrace
        (59, (), KILL),  # execve
        (322, (), KILL),  # execveat
        (165, (), KILL),  # mount
        (175, (), KILL),  # init_module
        (321, (), KILL),  # bpf
        (105, (), KILL),  # setuid
        (434, (), EPERM),  # pidfd_open
        (424, (), ALLOW),  # pidfd_send_signal
        (999, (), EPERM),
    ],
)
def test_answers(number: int, arguments: tuple[int, ...], wanted: int) -> None:
    assert ask(number, *arguments) == wanted


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        (0xAE80, ALLOW),  # KVM_RUN
        (0x4020AE46, ALLOW),  # KVM_SET_USER_MEMORY_REGION
        (0x4020AEF0, ALLOW),  # KVM_ELISA_CREATE_CONTEXT
        (0xAF01, ALLOW),  # VHOST_SET_OWNER
        (0x5401, ALLOW),  # TCGETS
        (0x5403, ALLOW),  # TCSETSW
        (0x5413, ALLOW),  # TIOCGWINSZ
        (0x5421, ALLOW),  # FIONBIO
        (0x400454D0, ALLOW),  # TUNSETOFFLOAD
        (0x1277, ALLOW),  # BLKDISCARD
        (0x5412, EPERM),  # TIOCSTI
        (0x541C, EPERM),  # TIOCLINUX
        (0x540E, EPERM),  # TIOCSCTTY
        (0x400454CA, EPERM),  # TUNSETIFF
        (0x8933, EPERM),  # SIOCGIFINDEX
        (0x0000AA3F, EPERM),  # of userfaultfd
        (0, EPERM),
    ],
)
def test_ioctls(code: int, wanted: int) -> None:
    assert ask(IOCTL, 3, code) == wanted
    assert ask(IOCTL, 3, code | HIGH) == wanted  # the kernel takes an unsigned int


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        *((command, ALLOW) for command in (0, 1030, 4, 6, 37, 1033)),
        *((command, EPERM) for command in (8, 10, 15, 1024, 1026)),
    ],
)
def test_fcntl(command: int, wanted: int) -> None:
    """F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE and F_NOTIFY are refused."""
    assert ask(FCNTL, 3, command) == wanted


def test_a_directory_to_write_to() -> None:
    """Which files, Landlock knows; what it does not know about is refused as before."""
    writer = Confinement(directory=Path("machine"))
    for flags in (0, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_TMPFILE):
        assert ask(OPENAT, 0, 0, flags, confinement=writer) == ALLOW
    for flags in (os.O_RDONLY | os.O_TRUNC, 3, 3 | os.O_TRUNC):
        assert ask(OPENAT, 0, 0, flags, confinement=writer) == EPERM
    assert ask(UNLINK, confinement=writer) == ask(MKDIR, confinement=writer) == ALLOW
    for number in (CHMOD, FCHMOD, 92, 188, 280, 76, 86, 88, 133):
        assert ask(number, confinement=writer) == EPERM, number


def test_sockets_of_a_family() -> None:
    unix = Confinement(families=(1,))
    assert ask(SOCKET, 1, 2, confinement=unix) == ALLOW
    assert ask(SOCKET, 2, 1, confinement=unix) == EPERM
    assert ask(SOCKETPAIR, 16, 1, confinement=unix) == EPERM
    for number in (CONNECT, BIND, LISTEN, SENDTO):
        assert ask(number, 5, 0, 0, 0, HIGH, confinement=unix) == ALLOW


def test_children_and_rings() -> None:
    assert ask(KILL_CALL, 77, 15, confinement=Confinement(children=(76, 77))) == ALLOW
    assert ask(KILL_CALL, 78, 15, confinement=Confinement(children=(76, 77))) == EPERM
    assert ask(IO_URING_SETUP, confinement=Confinement(io_uring=True)) == ALLOW


@pytest.mark.parametrize("numbers", [(0,), (-1,), (5, -9)])
def test_a_group_of_processes_is_no_child(numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="numbers above 0"):
        Confinement(children=numbers)
    with pytest.raises(ValueError, match="from 0 on"):
        Confinement(families=(-1,))
