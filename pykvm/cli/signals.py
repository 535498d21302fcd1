"""Signals that end a command which holds emulated hosts or locks."""

import signal
from types import FrameType

__all__ = ["exit_on_signals"]


def exit_on_signals() -> None:
    """Let SIGTERM and SIGHUP raise SystemExit, so that context managers are closed."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)
