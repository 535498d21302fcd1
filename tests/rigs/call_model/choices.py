"""Strategies for test_call_sequences.py, with good and bad arguments."""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from pykvm.kernel import uapi
from tests.rigs.context_requests import PAGE, Request
from tests.rigs.tiny_guest import Kind

NOWHERE = 9999
"""A descriptor that is not open."""

indices = st.integers(0, 5)
"""Index of one of the existing items, counted from the last."""

setups = st.sampled_from(["ready", "ready", "ready", "small", "enabled", "plain"])
slots = st.sampled_from([2, 3, 511, 2, 3, 0, 1, 512])
vcpu_ids = st.sampled_from([0, 1, 1 << 20])
_CONTEXTS, _HYPERCALLS = uapi.lib.KVM_ELISA_CONTEXTS, uapi.lib.KVM_ELISA_USER_HYPERCALLS
enables = st.tuples(
    st.sampled_from([_CONTEXTS, _HYPERCALLS, _CONTEXTS | _HYPERCALLS, 4, 1 << 63, 0]),
    st.sampled_from([(0, 0, 0), (1, 0, 0), (0, 9, 0), (2**63, 2**63, 0), (1, 1, 1)]),
)
bad_calls = st.tuples(
    st.sampled_from(
        [
            "KVM_ELISA_CREATE_CONTEXT",
            "KVM_ELISA_SET_SLOT",
            "KVM_ELISA_REVOKE",
            "KVM_ELISA_REGISTER_MEMORY",
        ]
    ),
    st.sampled_from([0, 1, 1 << 47, 1 << 63]),
)
registrations = st.sampled_from(
    ["good", "good", "good", "empty", "unaligned", "wraps", "reserved", "too large", "a vm's call"]
)
kinds = st.sampled_from([Kind.OBJECT, Kind.GATE, Kind.SUB, Kind.BARE, Kind.OBJECT, Kind.GATE])

field_mutations = st.sampled_from(
    [
        ("flags", 2),
        ("flags", 1 << 31),
        ("reserved", 1 << 63),
        ("parts", 1),
        ("nr_parts", 65),
        ("gva", 8),
        ("gva", 2**64 - PAGE),
        ("size", 0),
        ("size", PAGE + 1),
        ("size", 2**64 - PAGE),
        ("nr_tables", 0),
        ("nr_tables", 3),
        ("nr_tables", 4097),
        ("nr_tables", 2**32 - 1),
        ("nr_pages", 0),
        ("nr_pages", 1),
        ("nr_pages", 262145),
        ("tables", 0),
        ("tables", 1 << 63),
        ("pages", 1 << 47),
    ]
)
page_mutations = st.tuples(
    st.integers(0, 5),
    st.sampled_from(
        [
            (0, None, None),
            (1 << 62, None, None),
            (0xFFFF_8880_0000_0000, None, None),
            (None, 3, None),
            (None, 0, None),
            (None, 1, None),
            (None, 2, None),
            (None, None, 1),
            (None, None, -1),
            (None, None, NOWHERE),
            (0, 1, 0),
            (0, 1, 1),
            (0, 1, 7),
        ]
    ),
)
entry_mutations = st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(0, 63))


def mutated(request: Request, mutation: tuple[Any, ...]) -> Request:
    """Return the request with one field of it, of a page or of a table changed."""
    if isinstance(mutation[0], str):
        return replace(request, fields={**request.fields, mutation[0]: mutation[1]})
    if len(mutation) == 2:
        number, new = mutation
        number %= len(request.pages)
        page = tuple(
            old if value is None else value
            for old, value in zip(request.pages[number], new, strict=True)
        )
        pages = [*request.pages]
        pages[number] = page
        return replace(request, pages=pages)
    table, entry, bit = mutation
    content = bytearray(request.tables[table])
    content[entry * 8 + bit // 8] ^= 1 << bit % 8
    tables = [*request.tables]
    tables[table] = bytes(content)
    return replace(request, tables=tables)
