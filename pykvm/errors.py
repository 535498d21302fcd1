"""The root of every error that pykvm raises on purpose.

Each cause has a class of its own, next to the code that finds it.
"""

import copyreg
from typing import Any

__all__ = ["PykvmError"]


class PykvmError(Exception):
    """Root of the errors that a user can act on; the command line prints them in one line.

    ``str()`` joins problem and next step with a colon. Errors can be pickled, so that they come
    back whole from a process pool, whatever arguments their classes take.

    Args:
        problem: what is wrong, in lower case.
        next_step: what to type or change, in lower case; empty where nothing can be done.
    """

    def __init__(self, problem: str, next_step: str = "") -> None:
        super().__init__(problem, next_step)
        self.problem = problem
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.problem}: {self.next_step}" if self.next_step else self.problem

    def __reduce__(self) -> tuple[Any, ...]:
        state = {**vars(self), "args": self.args}
        return copyreg.__newobj__, (type(self),), state  # type: ignore[attr-defined]
