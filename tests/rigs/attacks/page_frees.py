"""Order of INVEPT and page frees in the kernel, seen through dynamic tracepoints.

Source: Documentation/trace/kprobetrace.rst. A function's first argument is in RDI.
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
    """A hit of one of the tracepoints.

    Attributes:
        value: an EPTP, or the address of a struct page.
    """

    cpu: int
    what: str
    value: int


@contextmanager
def traced_frees() -> Iterator[list[Event]]:
    """Yield a list that holds the events, in order, after the end of the context."""
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
    """Return the address of the kernel's array of struct page.

    It is the only one with which every table of the contexts, whose HPAs are known, has been freed.
    """
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
    """Return the processors that flushed the context's translations in time.

    In time means before the first of the context's tables, and of `pages` (HPAs), was given back.
    Every table must occur in `events`, and the first page: registered memory goes back in batches,
    and the tracepoint shows the first page of each.
    """
    tables = {_page(base, table) for table in context.levels}
    pinned = {_page(base, page & ADDRESS_MASK) for page in pages[:1]}
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
