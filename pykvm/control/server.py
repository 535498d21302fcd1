"""The control socket of a running machine: one thread for each client, a line for each request."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from pykvm.closeable import Closeable
from pykvm.errors import PykvmError

__all__ = ["LONGEST_LINE", "MOST_CLIENTS", "ControlServer", "Session", "Stream", "listening_socket"]

LONGEST_LINE: Final = 64 * 1024
MOST_CLIENTS: Final = 16
_PATIENCE: Final = 30.0  # seconds that a client may take for a line

Handler = Callable[[Mapping[str, Any]], Any]
"""Answer to a request, from its other members; JSON, or a `Stream`."""


class Session:
    """A connection whose client has asked for a stream: bytes in both directions.

    Attributes:
        socket: the connection.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection


class Stream:
    """A result that takes over the connection, once the client knows that it begins.

    Args:
        serve: called with the connection; it ends with the call.
    """

    def __init__(self, serve: Callable[[Session], None]) -> None:
        self.serve = serve


def listening_socket(path: Path) -> socket.socket:
    """Return a new socket at a path, to which only this user may connect."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Before bind(), so that there is no moment in which others may connect: Linux gives the file
    # the mode of the socket (net/unix/af_unix.c, unix_bind_bsd()).
    os.fchmod(listener.fileno(), 0o600)
    listener.bind(str(path))
    listener.listen(MOST_CLIENTS)
    return listener


class ControlServer(Closeable):
    """Serve requests on a socket until it is closed.

    Nothing that a client sends or fails to send harms the machine or another client.

    Args:
        path: where the socket is made; only this user may connect.
        handlers: what answers each command, called from a thread of the client's.
    """

    def __init__(self, path: Path, handlers: Mapping[str, Handler]) -> None:
        self._handlers = dict(handlers)
        self._clients: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._listener = listening_socket(path)
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more requests, and end the connections. Harmless twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            clients = list(self._clients)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                refused = self._closed or len(self._clients) >= MOST_CLIENTS
                if not refused:
                    self._clients.add(client)
            if refused or _user_of(client) not in (0, os.getuid()):
                self._drop(client)
                continue
            threading.Thread(
                target=self._serve, args=(client,), name="control client", daemon=True
            ).start()

    def _drop(self, client: socket.socket) -> None:
        with self._lock:
            self._clients.discard(client)
        client.close()

    def _serve(self, client: socket.socket) -> None:
        try:
            buffered = b""
            while True:
                deadline = time.monotonic() + _PATIENCE
                while b"\n" not in buffered:
                    if (left := deadline - time.monotonic()) <= 0:
                        return
                    client.settimeout(left)
                    data = client.recv(4096)
                    if not data:
                        return
                    buffered += data
                    if len(buffered) > LONGEST_LINE:
                        _send(client, _refusal("a request of more than 64 KiB"))
                        return
                client.settimeout(_PATIENCE)
                line, _, buffered = buffered.partition(b"\n")
                answer = self._answer(line)
                if isinstance(answer, Stream):
                    _send(client, {"result": "stream"})
                    client.settimeout(None)
                    answer.serve(Session(client))
                    return
                _send(client, answer)
        except (OSError, TimeoutError):
            pass  # the client has gone, or says nothing
        finally:
            self._drop(client)

    def _answer(self, line: bytes) -> dict[str, Any] | Stream:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            return _refusal("a request that is no JSON")
        if not isinstance(request, dict) or not isinstance(request.get("command"), str):
            return _refusal("a request without a command")
        command = request.pop("command")
        handler = self._handlers.get(command)
        if handler is None:
            return _refusal(f"no command {command[:40]!r}", f"use {', '.join(self._handlers)}")
        try:
            result = handler(request)
        except PykvmError as error:
            return _refusal(error.problem, error.next_step)
        except Exception as error:  # whatever an argument of a wrong kind leads to
            what = " ".join(f"{type(error).__name__} {error}".split())
            return _refusal(f"{command}: an argument is missing or wrong ({what[:200]})")
        return result if isinstance(result, Stream) else {"result": result}


def _refusal(problem: str, next_step: str = "") -> dict[str, Any]:
    return {"problem": problem, "next_step": next_step}


def _send(client: socket.socket, answer: Mapping[str, Any]) -> None:
    client.sendall(json.dumps(answer).encode() + b"\n")


def _user_of(client: socket.socket) -> int:
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    uid: int = struct.unpack("iII", credentials)[1]
    return uid
