"""Base classes of objects that have to be closed, also in a forked process.

A child of fork() has a copy of every descriptor and mapping, but none of the threads. It can only
release its copies of inherited objects: the virtual machine, its locks and its shared memory still
belong to the parent.
"""

import os
from types import TracebackType
from typing import Any, Self

from pykvm.errors import PykvmError

__all__ = ["Closeable", "ForkAware", "ForkedProcessError"]

_generation = 0
"""Number of forks between the first process and this one.

A PID would not do: in a PID namespace of its own a child can have the same PID as its parent.
"""


def _count_fork() -> None:
    global _generation  # noqa: PLW0603
    _generation += 1


os.register_at_fork(after_in_child=_count_fork)


class ForkedProcessError(PykvmError):
    """Use of an object in a process that was forked after the object was made."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: it was made before this process was forked, and stays its parent's",
            "make it in the process that uses it (multiprocessing: the start method 'spawn')",
        )


class ForkAware:
    """Base class for objects that know whether this process inherited them by fork()."""

    _made_in: int

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        made = super().__new__(cls)
        made._made_in = _generation
        return made

    @property
    def inherited(self) -> bool:
        """True if this process was forked after the object was made."""
        return self._made_in != _generation

    def require_own(self, what: str) -> None:
        """Check that this process has not inherited the object.

        Args:
            what: the refused operation, for the message.

        Raises:
            ForkedProcessError: this process was forked after the object was made.
        """
        if self.inherited:
            raise ForkedProcessError(what)


class Closeable(ForkAware):
    """Base class for context managers with an idempotent close()."""

    def close(self) -> None:
        """Release everything that the object owns. Harmless twice.

        If the object is `inherited`, release only this process's descriptors and mappings.
        """
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
