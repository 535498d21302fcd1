"""An input is what a vhost-user back end sends: replies to requests, and requests of its own.

A reply is taken exactly if it is the one that was asked for, as the specification has it, and no
byte more than it has; any other is an error in one line, and the last one. A request of the back
end's is answered if it wants that, and one that cannot be ends the watch.
"""

from __future__ import annotations

import socket
import struct

from pykvm.devices.virtio import vhost_user_messages as messages
from pykvm.devices.virtio.vhost_user_connection import BackendError, VhostUserConnection
from pykvm.devices.virtio.vhost_user_messages import MalformedMessageError, Request
from pykvm.devices.virtio.vhost_user_watch import VhostUserWatch
from pykvm.errors import PykvmError
from tests.rigs.fuzz.inputs import Input
from tests.rigs.messages import one_line

_HEADER = struct.Struct("<III")
_CONFIG = struct.Struct("<III")

NUMBERS = (Request.GET_FEATURES, Request.GET_QUEUE_NUM)
REFUSED = "refused"


class Model:
    """What has been sent, read as the specification has it."""

    def __init__(self, sent: bytes) -> None:
        self.sent = sent
        self.at = 0

    def message(self) -> tuple[int, int, bytes] | None:
        """Return the next message: code, flags, payload; None if there is no whole one."""
        if self.at + _HEADER.size > len(self.sent):
            return None
        code, flags, size = _HEADER.unpack_from(self.sent, self.at)
        start = self.at + _HEADER.size
        if flags & 3 != 1 or flags & ~0xF or size > 12 + 256 or start + size > len(self.sent):
            return None
        self.at = start + size
        return code, flags, self.sent[start : self.at]

    def reply(self, code: int) -> bytes | None:
        """Return the payload of a reply; None if the next message is none."""
        message = self.message()
        return message[2] if message and message[0] == code and message[1] & 4 else None


def try_input(data: bytes) -> None:
    given = Input(data)
    if given.number() & 1:
        _watch(given.rest())
    else:
        steps = [given.number() for _ in range(given.number() % 6)]
        _ask(steps, given.rest())


def _ask(steps: list[int], sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    model = Model(sent)
    theirs.sendall(sent)
    theirs.shutdown(socket.SHUT_WR)
    with VhostUserConnection(ours, "the back end", 30) as connection, theirs:
        broken = ""
        for step in steps:
            good = _good_answer(model, step)
            try:
                found = _request(connection, step)
            except (BackendError, MalformedMessageError) as error:
                said = one_line(error)
                if not broken and good not in (None, REFUSED):
                    raise AssertionError("the reply is good") from error
                if broken and said != broken:
                    raise AssertionError(f"not the first error: {broken}") from error
                if connection._broken is not None:
                    broken = said
                elif good is None:
                    return  # a payload that is wrong, in a message that is whole
            else:
                assert not broken, "it goes on after an error"
                assert found == good


def _good_answer(model: Model, step: int) -> object:
    """Return what a request is to give; None if the next message is no answer to it."""
    kind, more = step % 6, step // 6
    if kind == 0:
        return 0
    code, head, size = (
        (Request.SET_FEATURES, b"", 8),
        (NUMBERS[0], b"", 8),
        (NUMBERS[1], b"", 8),
        (Request.GET_VRING_BASE, struct.pack("<I", more % 3), 8),
        (Request.GET_CONFIG, struct.pack("<II", 4, more * 6), 12 + more * 6),
    )[kind - 1]
    reply = model.reply(code)
    if not reply or len(reply) != size or not reply.startswith(head):
        return None
    if kind == 1:
        return REFUSED if any(reply) else 0
    return reply[12:] if kind == 5 else int.from_bytes(reply[len(head) :], "little")


def _request(connection: VhostUserConnection, step: int) -> object:
    connection.acknowledges = step % 6 == 1
    match step % 6:
        case 0:
            connection.request(Request.SET_OWNER)
            return 0
        case 1:
            connection.request(Request.SET_FEATURES, messages.number(3))
            return 0
        case 2 | 3:
            return messages.parse_number(connection.ask(NUMBERS[step % 2]))
        case 4:
            index = step // 6 % 3
            payload = connection.ask(Request.GET_VRING_BASE, messages.ring_state(index, 0))
            return messages.parse_ring_state(payload, index)
        case _:
            size = step // 6 * 6
            payload = connection.ask(Request.GET_CONFIG, messages.config(4, bytes(size)))
            return messages.parse_config(payload, 4, size)


def _watch(sent: bytes) -> None:
    changes = 0

    def changed() -> None:
        nonlocal changes
        changes += 1

    ours, theirs = socket.socketpair()
    watch = VhostUserWatch(ours.fileno(), "the back end", print, changed)
    with ours, theirs, watch, watch.open_channel() as channel:
        channel.sendall(sent)
        channel.shutdown(socket.SHUT_WR)
        model = Model(sent)
        failed = False
        expected, wanted, answers = 0, b"", b""
        while model.at < len(sent):
            message = model.message()
            try:
                watch._serve()
            except (PykvmError, OSError):
                failed = True
                assert message is None or message[1] & 4, "it fails at a good request"
                break
            assert message is not None, "it takes what is no request"
            code, flags, _ = message
            assert not flags & 4, "it takes a reply"
            expected += code == 2
            if flags & 8:
                wanted += _HEADER.pack(code, 5, 8) + (code != 2).to_bytes(8, "little")
            # A back end that reads no answers is given up, after a while.
            answers += _received(channel)
        if not failed:
            watch._serve()  # the end of it
        assert changes == expected
        assert answers + _received(channel) == wanted


def _received(channel: socket.socket) -> bytes:
    """Return what has arrived."""
    data = b""
    try:
        while part := channel.recv(1 << 16, socket.MSG_DONTWAIT):
            data += part
    except BlockingIOError:
        pass
    return data
