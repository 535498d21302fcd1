"""Calls in a process that has entered a sandbox, and what became of each."""

import ctypes
import errno
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from typing import Any

from pykvm.sandbox import Applied, Confinement, enter

__all__ = ["DONE", "end_of", "in_sandbox", "outcomes", "system_call"]

DONE = "done"

_SECONDS = 60
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def system_call(number: int, *arguments: int) -> int:
    """Make a system call; return its result.

    Raises:
        OSError: it failed.
    """
    result = int(_libc.syscall(*(ctypes.c_long(one) for one in (number, *arguments))))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def in_sandbox(
    body: Callable[[Applied], Any],
    confinement: Confinement | None = None,
    *,
    seconds: int = _SECONDS,
) -> Any:
    """Return the result of body() in a child that has entered a sandbox.

    Args:
        body: called with what is in force; its result and its exceptions come back by pickle.
        confinement: what the child may still do.
        seconds: when a child that hangs is ended.

    Raises:
        AssertionError: the child failed, hung, or was ended by a signal, which the error names.
    """
    return in_child(lambda: body(enter(confinement or Confinement())), seconds=seconds)


def in_child(body: Callable[[], Any], *, seconds: int = _SECONDS) -> Any:
    """Return the result of body() in a child; see `in_sandbox`."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(seconds)
        os.close(reader)
        try:
            answer = (True, body())
        except BaseException:
            answer = (False, traceback.format_exc())
        with os.fdopen(writer, "wb") as file:
            pickle.dump(answer, file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise AssertionError(f"ended by {signal.Signals(os.WTERMSIG(status)).name}")
    done, answer = pickle.loads(said)
    assert done, answer
    return answer


def outcomes(
    *calls: Callable[[], object], confinement: Confinement | None = None, sandbox: bool = True
) -> list[str]:
    """Return what became of calls in one child in a sandbox: `DONE` or the name of an errno.

    Args:
        sandbox: False for a control: the child enters none.
    """

    def body(_: object = None) -> list[str]:
        return [_outcome(call) for call in calls]

    found: list[str] = in_sandbox(body, confinement) if sandbox else in_child(body)
    return found


def _outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return DONE


def end_of(call: Callable[[], object], *, sandbox: bool = True) -> str:
    """Return the name of the signal that ends a child that makes a call; "" for none."""
    try:
        outcomes(call, sandbox=sandbox)
    except AssertionError as error:
        return str(error).removeprefix("ended by ")
    return ""
