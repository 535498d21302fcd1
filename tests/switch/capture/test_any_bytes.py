"""Any file content gives frames or a CaptureError of one line."""

from __future__ import annotations

import gzip
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvm.switch.capture import CaptureError, encode_capture, read_capture, split_capture
from tests.rigs.switch.capture_files import A, B, block, enhanced, interface, packet, pcap, section

pytestmark = pytest.mark.unit

ONE = B + A + bytes(50)
NUMBERS = st.integers(0, 0xFFFF_FFFF)

RECORDS = st.lists(
    st.one_of(
        st.binary(max_size=100).map(packet),
        st.builds(packet, st.binary(max_size=100), original=NUMBERS),
        st.builds(packet, st.binary(max_size=100), original=NUMBERS, captured=NUMBERS),
        st.binary(max_size=40),
    ),
    max_size=4,
).map(b"".join)
BLOCKS = st.lists(
    st.one_of(
        st.builds(interface, st.integers(0, 0xFFFF), st.binary(max_size=40), snapshot=NUMBERS),
        st.just(interface()),
        st.builds(enhanced, st.binary(max_size=100), st.binary(max_size=40)),
        st.builds(
            enhanced,
            st.binary(max_size=100),
            index=st.integers(0, 2),
            time=st.integers(0, (1 << 64) - 1),
            original=NUMBERS,
            captured=NUMBERS,
        ),
        st.builds(block, st.integers(0, 8), st.binary(max_size=60)),
        st.sampled_from([section("<"), section(">")]),
        st.binary(max_size=40),
    ),
    max_size=6,
).map(b"".join)
FILES = st.one_of(
    st.binary(max_size=200),
    st.builds(pcap, RECORDS, link=NUMBERS),
    RECORDS.map(pcap),
    BLOCKS.map(lambda blocks: section() + interface() + blocks),
    st.binary(max_size=60).map(lambda data: b"\x1f\x8b" + data),
)


def changed(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    result = bytearray(data)
    for at, value in changes:
        result[at % len(result)] = value
    return bytes(result)


DAMAGED = st.builds(
    changed,
    st.sampled_from(
        [
            pcap(packet(ONE) * 2),
            section() + interface() + enhanced(ONE) * 2,
            gzip.compress(pcap(packet(ONE))),
        ]
    ),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
)


@settings(max_examples=500)
@given(st.one_of(FILES, DAMAGED))
def test_no_file_breaks_the_reader(content: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".pcap") as file:
        file.write(content)
        file.flush()
        refusal = None
        try:
            capture = read_capture(file.name)
            assert all(14 <= len(frame.data) <= 1514 + 8 * 4 for frame in capture.frames)
            assert encode_capture(capture.frames)
            split_capture(capture)
        except CaptureError as error:
            refusal = error
    if refusal is not None:
        assert refusal.problem
        assert refusal.next_step
        assert str(refusal).isprintable()
