"""pykvm.inspection.gdb.packets: framing, checksums, escapes, and rubbish."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pykvm.inspection.gdb.packets import (
    PACKET_SIZE,
    Packet,
    PacketReader,
    PacketTooLongError,
    Sign,
    encode,
)
from tests.rigs.messages import one_line

pytestmark = pytest.mark.unit

PIECES = st.one_of(
    st.binary(max_size=20),
    st.sampled_from([b"+", b"-", b"\x03", b"$", b"#", b"}", b"$#00", b"$OK#9a", b"$OK#9b", b"##"]),
    st.binary(max_size=40).map(encode),
)


def test_packets_on_the_wire() -> None:
    assert encode(b"OK") == b"$OK#9a"
    assert encode(b"") == b"$#00"
    assert encode(b"a#b$c}d*e") == b"$a}\x03b}\x04c}]d}\x0ae#51"


def test_a_stream_is_taken_apart() -> None:
    reader = PacketReader()
    assert reader.feed(b"+$g#67\x03-$m0,") == [
        Sign.ACKNOWLEDGED,
        Packet(b"g"),
        Sign.INTERRUPT,
        Sign.REPEAT,
    ]
    assert reader.feed(b"4#fd") == [Packet(b"m0,4")]


@pytest.mark.parametrize("digits", [b"9b", b"zz", b"9 ", b"+9", b"\xff\xff"])
def test_a_wrong_checksum(digits: bytes) -> None:
    reader = PacketReader()
    assert reader.feed(b"$OK#" + digits) == [Sign.DAMAGED]
    assert reader.feed(b"$OK#9A") == [Packet(b"OK")]


def test_a_packet_whose_end_was_lost_gives_way_to_the_next() -> None:
    assert PacketReader().feed(b"$vCont;c$?#3f") == [Packet(b"?")]
    assert PacketReader().feed(b"$OK#9$?#3f") == [Packet(b"?")]


def test_bytes_between_packets_are_ignored() -> None:
    assert PacketReader().feed(b"GET / HTTP/1.1\r\n\0\xff#ab") == []


def test_an_escape_at_the_end_escapes_nothing() -> None:
    assert PacketReader().feed(b"$a}#" + b"%02x" % (0x61 + 0x7D)) == [Packet(b"a")]


def test_a_packet_without_an_end() -> None:
    reader = PacketReader()
    assert reader.feed(b"$" + bytes(PACKET_SIZE)) == []
    with pytest.raises(PacketTooLongError) as caught:
        reader.feed(b"\0")
    one_line(caught.value)


@given(st.binary(max_size=300))
def test_what_is_encoded_is_read_again(data: bytes) -> None:
    wire = encode(data)
    assert not set(b"$#*") & set(wire[1:-3])
    assert PacketReader().feed(wire) == [Packet(data)]


@given(st.lists(PIECES, max_size=20), st.data())
def test_rubbish_in_any_parts_means_the_same(pieces: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(pieces)
    whole = PacketReader().feed(stream)
    reader, parts, rest = PacketReader(), [], stream
    while rest:
        length = data.draw(st.integers(1, len(rest)))
        parts += reader.feed(rest[:length])
        rest = rest[length:]
    assert parts == whole


@given(st.lists(PIECES, max_size=20))
def test_a_packet_after_rubbish_is_read(pieces: list[bytes]) -> None:
    reader = PacketReader()
    reader.feed(b"".join(pieces))
    # A '$' inside a checksum begins a packet too, so one is enough.
    assert reader.feed(encode(b"qC"))[-1] == Packet(b"qC")
