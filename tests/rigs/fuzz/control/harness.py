"""An input is what a client sends on the control socket of a machine.

Each line gets one answer, in JSON, that says either a result or a problem in one line. A request
that is too long ends the connection, and so does a stream. Nothing else happens.
"""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pykvm.control.server import LONGEST_LINE, ControlServer, Session, Stream
from pykvm.errors import PykvmError


def echo(request: Mapping[str, Any]) -> Any:
    assert "command" not in request
    return {"seen": sorted(request)}


def count(request: Mapping[str, Any]) -> Any:
    return int(request["n"]) + len(request["text"])


def name(request: Mapping[str, Any]) -> Any:
    return request["name"].strip().upper()


def refuse(request: Mapping[str, Any]) -> Any:
    raise PykvmError("nothing doing", "try another")


def stream(request: Mapping[str, Any]) -> Any:
    return Stream(_serve)


def _serve(session: Session) -> None:
    session.socket.sendall(b"stream\n")


HANDLERS = {one.__name__: one for one in (echo, count, name, refuse, stream)}
with tempfile.TemporaryDirectory(prefix="pykvm-fuzz-") as _folder:
    # It serves connections that this module gives it, and listens no more.
    _SERVER = ControlServer(Path(_folder) / "control", HANDLERS)
    _SERVER.close()


def try_input(data: bytes) -> None:
    # The last byte says how often the rest is sent, to exceed the longest line, and if that ends.
    last = data[-1] if data else 0
    sent = data[:-1] * (1 + (last >> 6) * 8) + b"\n" * (last & 1)
    answers = _talk(sent)
    whole, _, cut = sent.rpartition(b"\n")
    lines = whole.split(b"\n") if sent.count(b"\n") else []
    assert answers.endswith(b"\n") or not answers
    found = answers.split(b"\n")[:-1]
    for number, line in enumerate(found):
        if line == b"stream":
            assert json.loads(found[number - 1]) == {"result": "stream"}
            assert number == len(found) - 1
            return
        assert number <= len(lines), "more answers than requests"
        answer = json.loads(line)
        _check(answer)
        if number < len(lines) and len(lines[number]) > LONGEST_LINE:
            assert answer["problem"] == "a request of more than 64 KiB"
            assert number == len(found) - 1
    assert len(found) >= len(lines) or max(map(len, lines), default=0) > LONGEST_LINE - 4096
    assert len(found) <= len(lines) or len(cut) > LONGEST_LINE - 4096


def _check(answer: Any) -> None:
    assert isinstance(answer, dict)
    if "result" in answer:
        assert set(answer) == {"result"}
        return
    assert set(answer) == {"problem", "next_step"}
    for text in answer.values():
        assert "\n" not in text
        assert len(text) < 5000
    assert answer["problem"]


def _talk(sent: bytes) -> bytes:
    """Send bytes to the server, which serves in this thread; return what it answers."""
    ours, theirs = socket.socketpair()
    received = bytearray()

    def receive() -> None:
        # A server that has not read everything resets the connection.
        with contextlib.suppress(ConnectionResetError):
            while part := ours.recv(1 << 16):
                received.extend(part)

    def send() -> None:
        with contextlib.suppress(OSError):  # the server has seen enough
            ours.sendall(sent)
            ours.shutdown(socket.SHUT_WR)

    threads = [threading.Thread(target=one) for one in (receive, send)]
    with _SERVER._lock:
        _SERVER._clients.add(theirs)
    for thread in threads:
        thread.start()
    _SERVER._serve(theirs)
    if theirs.fileno() >= 0:
        theirs.close()  # or the threads would wait for ever
        raise AssertionError("the connection is left open")
    for thread in threads:
        thread.join()
    ours.close()
    return bytes(received)
