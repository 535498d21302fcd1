"""A process for each boot of a machine.

A confined process cannot undo its confinement, and so could not make the machine anew after a
reset.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from pykvm.errors import PykvmError

__all__ = ["BootProcessError", "in_own_process"]

Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class BootProcessError(PykvmError):
    """A process of a machine that ended without a result."""


def in_own_process(body: Callable[[], Result]) -> Result:
    """Call a function in a forked process; return what it returns, or raise what it raises.

    SIGTERM and SIGHUP are passed on, and a terminal sends Ctrl-C to both processes. The forked one
    ends with this one. Call it before this process has threads.

    Raises:
        BootProcessError: the process was killed.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if not child:
        _child(body, writer)
    os.close(writer)
    handlers = _pass_on(child)
    try:
        with open(reader, "rb") as pipe:
            told = pipe.read()
        _, status = os.waitpid(child, 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if not told:
        raise BootProcessError(
            f"the machine's process has ended with status {os.waitstatus_to_exitcode(status)}"
        )
    succeeded, result = pickle.loads(told)
    if succeeded:
        found: Result = result
        return found
    raise result


def _child(body: Callable[[], Any], writer: int) -> None:
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        told = pickle.dumps((True, body()))
    except BaseException as error:
        told = pickle.dumps((False, error))
    try:
        with open(writer, "wb") as pipe:
            pipe.write(told)
    finally:
        os._exit(0)


def _pass_on(child: int) -> dict[int, Any]:
    def forward(number: int, frame: FrameType | None) -> None:
        os.kill(child, number)

    handlers: dict[int, Any] = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        handlers[number] = signal.signal(number, forward)
    handlers[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    return handlers
