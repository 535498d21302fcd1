"""Calls in a forked process with a deadline.

An exception of the child is raised in the parent, and the child never outlives the test.
"""

import os
import pickle
import signal
import time
from collections.abc import Callable

__all__ = ["in_fork"]

_SECONDS = 30


def in_fork(body: Callable[[], object]) -> None:
    """Call body() in a child of os.fork(); raise AssertionError if it fails or hangs."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            body()
        except BaseException as error:
            os.write(writer, pickle.dumps(f"{type(error).__name__}: {error}")[:4000])
        finally:
            os._exit(0)
    os.close(writer)
    try:
        _wait(child)
        said = os.read(reader, 4096)
    finally:
        os.close(reader)
    assert not said, f"in the child: {pickle.loads(said)}"


def _wait(child: int) -> None:
    end = time.monotonic() + _SECONDS
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"the child ended with status {status}"
            return
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"the child hung for {_SECONDS} s")
        time.sleep(0.005)
