"""Native functions executed one instruction at a time, without an emulator.

A forked child makes the call under ptrace. Counts are exact and repeatable. As on the emulated
host, every iteration of a repeated string move counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Generator

__all__ = ["count_instructions", "killed_after", "single_steps"]

_TRACEME, _PEEKDATA, _PEEKUSER, _POKEDATA, _POKEUSER, _CONT, _SINGLESTEP = 0, 2, 3, 5, 6, 7, 9
_BREAKPOINT = 0xCC
_RIP, _RSP = 16 * 8, 19 * 8  # offsets in struct user, <sys/user.h>
_SEARCH_LIMIT = 500_000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _peek(request: int, pid: int, address: int) -> int:
    return int(_libc.ptrace(request, pid, address, None)) & (1 << 64) - 1


def _step(pid: int) -> int:
    """Execute one instruction; return the child's RIP afterwards."""
    if _libc.ptrace(_SINGLESTEP, pid, None, None) != 0:
        raise OSError(ctypes.get_errno(), "PTRACE_SINGLESTEP")
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status) or os.WSTOPSIG(status) != signal.SIGTRAP:
        raise RuntimeError(f"the traced child ended or got a signal: status {status:#x}")
    return _peek(_PEEKUSER, pid, _RIP)


@contextlib.contextmanager
def _traced(call: Callable[[], object]) -> Generator[int, None, None]:
    """Yield the PID of a forked child that stopped before `call`.

    The child is killed at the end, at any point of its execution. Only its writes to shared
    mappings remain.
    """
    pid = os.fork()
    if pid == 0:
        try:
            _libc.ptrace(_TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            call()
        finally:
            os._exit(0)
    try:
        os.waitpid(pid, 0)
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # already waited for
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def single_steps(address: int, call: Callable[[], object]) -> Generator[int, None, None]:
    """Stop before every instruction of the first execution of the function at `address`.

    `call` runs in a forked child, of which only the writes to shared mappings remain. The child is
    killed at its current instruction when the generator ends or is closed.
    """
    with _traced(call) as pid:
        for _ in range(_SEARCH_LIMIT):
            if _step(pid) == address:
                break
        else:
            raise RuntimeError(f"the child never came to {address:#x}")
        stack = _peek(_PEEKUSER, pid, _RSP)
        caller = _peek(_PEEKDATA, pid, stack)
        position = address
        while position != caller or _peek(_PEEKUSER, pid, _RSP) <= stack:
            yield position
            position = _step(pid)


def count_instructions(address: int, call: Callable[[], object]) -> int:
    """Count the instructions of the first execution of the function at `address` in `call`."""
    return sum(1 for _ in single_steps(address, call))


def _run_to(pid: int, address: int) -> None:
    """Run the child up to `address`, with a breakpoint that is removed afterwards."""
    word = _peek(_PEEKDATA, pid, address)
    _libc.ptrace(_POKEDATA, pid, address, word & ~0xFF | _BREAKPOINT)
    _libc.ptrace(_CONT, pid, None, None)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status) or os.WSTOPSIG(status) != signal.SIGTRAP:
        raise RuntimeError(f"the child never came to {address:#x}: status {status:#x}")
    _libc.ptrace(_POKEDATA, pid, address, word)
    _libc.ptrace(_POKEUSER, pid, _RIP, address)


def killed_after(steps: int, address: int, call: Callable[[], object]) -> bool:
    """Kill a child after `steps` instructions of the function at `address`.

    As with `single_steps`, only the child's writes to shared mappings remain.

    Returns:
        Whether the function had returned by then.
    """
    with _traced(call) as pid:
        _run_to(pid, address)
        stack = _peek(_PEEKUSER, pid, _RSP)
        caller = _peek(_PEEKDATA, pid, stack)
        for _ in range(steps):
            if _step(pid) == caller and _peek(_PEEKUSER, pid, _RSP) > stack:
                return True
        return False
