"""What the kernel does before it gives the pages of a context back, by dynamic tracepoints.

Documentation/trace/kprobetrace.rst. A function's first argument is in RDI.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from pykvm.paging.entries import ADDRESS_MASK
from pykvm.sizes import PAGE_SIZE
from tests.rigs.attacks.host_tables import HostTables
from tests.rigs.tracefs import kprobes

_PAGE_STRUCT: Final = 64  # bytes of struct page on x86-64
_PROBES: Final = (
    "p:pykvm/flush kvm_intel:elisa_invept value=+0(%di):x64",  # the EPTP
    "p:pykvm/free __free_pages value=%di:x64",  # the struct page, as in the next one
    "p:pykvm/unpin unpin_user_pages_dirty_lock value=+0(%di):x64",
)
_EVENT: Final = re.compile(r"\[(\d+)\] .*: (flush|free|unpin): .*value=(0x[0-9a-f]+)")


@dataclass(frozen=True)
class Event:
    """In the order in which they came. value: an EPTP, or the address of a struct page."""

    cpu: int
    what: str
    value: int


@contextmanager
def traced_frees() -> Iterator[list[Event]]:
    """Filled at the end."""
    events: list[Event] = []
    with kprobes(*_PROBES) as lines:
        yield events
    events += [
        Event(int(found[1]), found[2], int(found[3], 16))
        for found in map(_EVENT.search, lines)
        if found
    ]


def _page(base: int, hpa: int) -> int:
    return base + hpa // PAGE_SIZE * _PAGE_STRUCT


def base_of_pages(events: list[Event], contexts: list[HostTables]) -> int:
    """Where the kernel's array of struct page begins: where every table of the contexts, whose
    addresses are known, has been freed."""
    freed = {event.value for event in events if event.what == "free"}
    tables = [table for context in contexts for table in context.levels]
    bases = [
        base
        for base in {_page(value, -tables[0]) for value in freed}
        if all(_page(base, table) in freed for table in tables)
    ]
    assert len(bases) == 1, f"{len(bases)} places explain what was freed"
    return bases[0]


def flushed_before(
    events: list[Event], base: int, context: HostTables, pages: list[int]
) -> set[int]:
    """The processors that flushed the context's translations before the first of its tables, and
    of `pages` (HPAs, each of which has to be there), went back."""
    tables = {_page(base, table) for table in context.levels}
    pinned = {_page(base, page & ADDRESS_MASK) for page in pages}
    assert tables <= {event.value for event in events if event.what == "free"}
    assert pinned <= {event.value for event in events if event.what == "unpin"}
    first = min(
        number
        for number, event in enumerate(events)
        if (event.what == "free" and event.value in tables)
        or (event.what == "unpin" and event.value in pinned)
    )
    return {
        event.cpu
        for event in events[:first]
        if event.what == "flush" and event.value == context.eptp
    }
