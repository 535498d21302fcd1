"""Base class of everything that has to be closed, also in a process that was forked since.

A child of fork() has a copy of every descriptor and mapping, and none of the threads. What it
inherits it can only give back: the virtual machine, its locks and its shared memory stay the
parent's.
"""

import os
from types import TracebackType
from typing import Any, Self

from pykvm.errors import PykvmError

__all__ = ["Closeable", "ForkAware", "ForkedProcessError"]

_generation = 0
"""Forks between this process and the first one. Not the process id: in a namespace of process ids
a child can have its parent's."""


def _count_fork() -> None:
    global _generation  # noqa: PLW0603
    _generation += 1


os.register_at_fork(after_in_child=_count_fork)


class ForkedProcessError(PykvmError):
    """Use of something in a process that was forked after it was made."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: it was made before this process was forked, and stays its parent's",
            "make it in the process that uses it (multiprocessing: the start method 'spawn')",
        )


class ForkAware:
    """Base class of what knows whether it came into this process by fork()."""

    _made_in: int

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        made = super().__new__(cls)
        made._made_in = _generation
        return made

    @property
    def inherited(self) -> bool:
        """Whether this process was forked after the object was made."""
        return self._made_in != _generation

    def require_own(self, what: str) -> None:
        """Refuse to go on in a process that has inherited the object.

        Args:
            what: what cannot be done, for the message.

        Raises:
            ForkedProcessError: this process was forked after the object was made.
        """
        if self.inherited:
            raise ForkedProcessError(what)


class Closeable(ForkAware):
    """Base class for context managers with an idempotent close()."""

    def close(self) -> None:
        """Give back what this owns.

        Where it is `inherited`: this process's descriptors and mappings, and nothing else.
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
