"""One client of the stub: its packets, and the answers.

Source: "Debugging with GDB", appendix E.2 (Packets), E.3 (Stop Reply Packets), E.4 (General Query
Packets).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from pykvm.errors import PykvmError
from pykvm.inspection.address_space import AddressSpace
from pykvm.inspection.gdb import state_packets
from pykvm.inspection.gdb.arguments import (
    ALL_THREADS,
    ArgumentError,
    number,
    numbers,
    octets,
    thread,
)
from pykvm.inspection.gdb.breakpoints import Kind, Point
from pykvm.inspection.gdb.execution import Execution, Stop
from pykvm.inspection.gdb.monitor import run_command
from pykvm.inspection.gdb.packets import PACKET_SIZE, Packet, PacketReader, Sign, encode
from pykvm.inspection.gdb.state_packets import OK
from pykvm.inspection.gdb.target_description import TARGET_XML
from pykvm.inspection.gdb.threads import Threads
from pykvm.inspection.machine import Inspectable

__all__ = ["Session", "SessionOverError"]

_UNSUPPORTED: Final = b""
_BAD_ARGUMENTS: Final = b"E16"  # EINVAL
_RUNNING: Final = b"E.the machine runs"
_ENDED: Final = b"W00"
_FEATURES: Final = (
    f"PacketSize={PACKET_SIZE:x};QStartNoAckMode+;qXfer:features:read+;qXfer:threads:read+;"
    "swbreak+;hwbreak+;vContSupported+"
).encode()

_KINDS: Final = {str(kind.value): kind for kind in Kind}
_WATCH: Final = (Kind.WRITE, Kind.ACCESS)
_STOP_REASONS: Final = {
    Kind.SOFTWARE: "swbreak",
    Kind.HARDWARE: "hwbreak",
    Kind.WRITE: "watch",
    Kind.ACCESS: "awatch",
}


class SessionOverError(PykvmError):
    """The client has detached or killed the machine, or the machine has ended."""


class Session:
    """A client's view of the machine, which stands until the client lets it run.

    Args:
        machine: the machine.
        send: sends bytes to the client.
        wake: see `Execution`; the stub's thread then calls `tell`.

    Raises:
        PauseError: see `Execution.attach`.
    """

    def __init__(
        self, machine: Inspectable, send: Callable[[bytes], object], wake: Callable[[], object]
    ) -> None:
        self._machine = machine
        self._send_bytes = send
        self._reader = PacketReader()
        self._acknowledge = True
        self._last = b""
        self._features: frozenset[str] = frozenset()
        self._threads = Threads(machine)
        self._packets = self._answers_by_letter()
        self._queries = self._answers_by_name()
        self._execution = Execution(machine, wake)
        self._execution.attach()

    def close(self) -> None:
        """Let the machine go, without breakpoints."""
        self._execution.detach()

    # ---- the stream -------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Answer what the client has sent.

        Raises:
            SessionOverError: the client wants no more.
            PacketTooLongError: it is no debugger.
            PauseError: a vCPU does not stop.
            OSError: it cannot be sent to.
        """
        for found in self._reader.feed(data):
            if isinstance(found, Packet):
                if self._acknowledge:
                    self._send_bytes(b"+")
                self._answer(found.data.decode("latin-1"))
            elif found is Sign.INTERRUPT:
                self._execution.interrupt()
            elif self._acknowledge and found is Sign.REPEAT and self._last:
                self._send_bytes(self._last)
            elif self._acknowledge and found is Sign.DAMAGED:
                self._send_bytes(b"-")

    def tell(self) -> None:
        """Tell the client if the machine has stopped or ended.

        Raises:
            SessionOverError: it has ended.
            PauseError: a vCPU does not stop.
            OSError: the client cannot be sent to.
        """
        if (stop := self._execution.stopped()) is not None:
            self._threads.selected = self._threads.of(stop.vcpu)
            self._send(self._stop_reply(stop))
        elif self._execution.running and self._execution.ended:
            self._send(_ENDED)
            raise SessionOverError("the machine has ended")

    def _send(self, data: bytes) -> None:
        self._last = encode(data)
        self._send_bytes(self._last)

    def _answer(self, packet: str) -> None:
        if self._execution.running:
            self._send(_RUNNING)  # only Ctrl-C makes sense now
            return
        try:
            answer = self._dispatch(packet)
        except ArgumentError:
            answer = _BAD_ARGUMENTS
        except SessionOverError:
            raise
        except PykvmError as error:
            answer = f"E.{error}".encode()
        if answer is not None:
            self._send(answer)

    # ---- packets ----------------------------------------------------------------------------

    def _dispatch(self, packet: str) -> bytes | None:
        """Return the answer; None if it has been sent, or comes when the machine stops."""
        if packet[:1] in ("q", "Q", "v"):
            name = re.split(r"[:,;]", packet, maxsplit=1)[0]
            query = self._queries.get(name)
            return query(packet[len(name) + 1 :]) if query else _UNSUPPORTED
        answer = self._packets.get(packet[:1])
        return answer(packet[1:]) if answer else _UNSUPPORTED

    def _answers_by_letter(self) -> dict[str, Callable[[str], bytes | None]]:
        threads = self._threads
        return {
            "?": lambda _: self._stop_reply(self._execution.last_stop),
            "g": lambda _: state_packets.read_registers(threads.vcpu),
            "G": lambda rest: state_packets.write_registers(threads.vcpu, rest),
            "p": lambda rest: state_packets.read_register(threads.vcpu, rest),
            "P": lambda rest: state_packets.write_register(threads.vcpu, rest),
            "m": lambda rest: state_packets.read_memory(self._space(), rest),
            "M": lambda rest: state_packets.write_memory(self._space(), rest, binary=False),
            "X": lambda rest: state_packets.write_memory(self._space(), rest, binary=True),
            "Z": lambda rest: self._point(rest, insert=True),
            "z": lambda rest: self._point(rest, insert=False),
            "H": self._select,
            "T": self._is_alive,
            "c": lambda rest: self._continue(rest, step=False),
            "s": lambda rest: self._continue(rest, step=True),
            # The signal means nothing to a processor.
            "C": lambda rest: self._continue(rest.partition(";")[2], step=False),
            "S": lambda rest: self._continue(rest.partition(";")[2], step=True),
            "D": lambda _: self._end("the client has detached"),
            "k": lambda _: self._kill(),
        }

    def _answers_by_name(self) -> dict[str, Callable[[str], bytes | None]]:
        threads = self._threads
        return {
            "qSupported": self._supported,
            "QStartNoAckMode": lambda _: self._stop_acknowledging(),
            "qXfer": self._transfer,
            "qAttached": lambda _: b"1",  # to a machine that goes on when the client quits
            "qC": lambda _: f"QC{threads.selected:x}".encode(),
            "qfThreadInfo": lambda _: b"m" + ",".join(f"{n:x}" for n in threads.vcpus).encode(),
            "qsThreadInfo": lambda _: b"l",
            "qThreadExtraInfo": lambda rest: threads.state(thread(rest)).encode().hex().encode(),
            "qRcmd": self._monitor,
            "vCont?": lambda _: b"vCont;c;C;s;S",
            "vCont": self._continue_threads,
            "vKill": lambda _: self._kill(OK),
        }

    def _supported(self, features: str) -> bytes:
        self._features = frozenset(features.split(";"))
        return _FEATURES

    def _stop_acknowledging(self) -> None:
        self._send(OK)
        self._acknowledge = False

    def _end(self, why: str) -> None:
        self._send(OK)
        raise SessionOverError(why)

    def _kill(self, answer: bytes = b"") -> None:
        if answer:
            self._send(answer)
        self._machine.stop()
        raise SessionOverError("the client has killed the machine")

    def _monitor(self, digits: str) -> bytes:
        command = octets(digits).decode("utf-8", "replace")
        text = run_command(command, self._machine, self._threads.vcpu)
        data, most = f"{text}\n".encode(), PACKET_SIZE // 2 - 1
        for start in range(0, len(data), most):
            self._send(b"O" + data[start : start + most].hex().encode())
        return OK

    def _transfer(self, rest: str) -> bytes:
        match rest.split(":"):
            case ["features", "read", "target.xml", part]:
                whole = TARGET_XML
            case ["threads", "read", "", part]:
                whole = self._threads.xml()
            case _:
                return _UNSUPPORTED
        offset, size = numbers(part, 2)
        end = min(offset + min(size, PACKET_SIZE // 2), len(whole))
        return (b"m" if end < len(whole) else b"l") + whole[offset:end]

    def _select(self, rest: str) -> bytes:
        which, found = rest[:1], self._threads.require(thread(rest[1:]))
        if which == "g":
            if found > 0:  # otherwise any will do
                self._threads.selected = found
        elif which == "c":
            self._threads.to_run = found
        else:
            raise ArgumentError
        return OK

    def _is_alive(self, rest: str) -> bytes:
        self._threads.require(thread(rest))
        return OK

    def _space(self) -> AddressSpace:
        return AddressSpace(self._threads.vcpu, self._machine.memory)

    def _point(self, rest: str, *, insert: bool) -> bytes:
        digit, _, place = rest.partition(",")
        address, size = numbers(place.partition(";")[0], 2)
        kind = _KINDS.get(digit)
        if kind is None:
            return _UNSUPPORTED  # no read watchpoints: gdb takes access ones instead
        point = Point(kind, address, size if kind in _WATCH else 1)
        if insert:
            self._execution.breakpoints.insert(point, self._space())
        else:
            self._execution.breakpoints.remove(point)
        return OK

    # ---- running ----------------------------------------------------------------------------

    def _continue(self, address: str, *, step: bool) -> None:
        """Run all threads, or the one that Hc has selected; a step is of one thread."""
        chosen = self._threads.to_run if self._threads.to_run > 0 else self._threads.selected
        if address:
            self._threads.vcpus[chosen].set_regs(rip=number(address))
        alone = step or self._threads.to_run > 0
        self._resume({n: step for n in self._threads.vcpus if n == chosen or not alone})

    def _continue_threads(self, actions: str) -> None:
        """Run each thread by the first action that names it; it stands if none does."""
        steps: dict[int, bool] = {}
        for action in actions.split(";"):
            what, colon, name = action.partition(":")
            if not re.fullmatch(r"[cs]|[CS][0-9a-fA-F]{2}", what):
                raise ArgumentError
            wanted = self._threads.require(thread(name) if colon else ALL_THREADS)
            for each in self._threads.vcpus:
                if wanted in (each, 0, ALL_THREADS):
                    steps.setdefault(each, what[0] in "sS")
        self._resume(steps)

    def _resume(self, steps: dict[int, bool]) -> None:
        vcpus = self._threads.vcpus
        self._execution.resume({vcpus[each].id: step for each, step in steps.items()})
        self.tell()  # the machine may have ended while it stood

    def _stop_reply(self, stop: Stop) -> bytes:
        parts = [f"thread:{self._threads.of(stop.vcpu):x}"]
        if (point := stop.point) is not None:
            name = _STOP_REASONS[point.kind]
            if point.kind in _WATCH:
                parts.append(f"{name}:{point.address:x}")
            elif f"{name}+" in self._features:
                parts.append(f"{name}:")
        return f"T{stop.signal:02x}{';'.join(parts)};".encode()
