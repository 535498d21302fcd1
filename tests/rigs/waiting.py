"""Wait for a change made by another thread, process or guest."""

import time
from collections.abc import Callable
from pathlib import Path


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    """Return as soon as the condition holds; raise AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def is_idle(thread: str, seconds: float = 0.05) -> bool:
    """Return whether a thread of this process, known by its name, gets no processor time."""
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text() == f"{thread}\n":
            before = (task / "schedstat").read_text()
            time.sleep(seconds)
            return (task / "schedstat").read_text() == before
    raise AssertionError(f"there is no thread {thread}")
