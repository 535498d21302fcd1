"""What owns something that has to be given back: `close` does it, and so does the end of a with."""

from types import TracebackType
from typing import Self

__all__ = ["Closeable"]


class Closeable:
    """A context manager whose end is `close()`, which has to be harmless when called again."""

    def close(self) -> None:
        """Give back what this owns."""
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
