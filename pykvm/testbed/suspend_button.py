"""Press the SUSPEND button of a Bochs on RFB display 0 of the current network namespace.

Run as a program (`python3 suspend_button.py FOLDER`), inside the emulator's namespace; it needs
nothing but the standard library. The protocol is RFC 6143, version 3.3.
"""

import fcntl
import socket
import struct
import sys
import time

_PORT = 5900
_BUTTON_WIDTH = 32
_SUSPEND_FROM_RIGHT = 2  # second from the right edge, after POWER

_KEY_RETURN = 0xFF0D

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionError("the emulator closed its display")
        data += piece
    return data


def suspend(folder: str) -> None:
    """Press the button and answer the two questions that Bochs then asks on its display.

    Returns when the emulator has ended, with its state in `folder`, which exists already and is
    relative to the emulator's directory.

    Raises:
        OSError: no display answers, or it breaks off early.
    """
    _loopback_up()
    with socket.create_connection(("127.0.0.1", _PORT), timeout=20) as connection:
        _receive(connection, 12)  # protocol version
        connection.sendall(b"RFB 003.003\n")
        (security,) = struct.unpack(">I", _receive(connection, 4))
        if security != 1:
            raise ConnectionError("the emulator's display asks for a password")
        connection.sendall(b"\1")  # shared
        width, _ = struct.unpack(">HH", _receive(connection, 4))
        _receive(connection, 16)  # pixel format
        (length,) = struct.unpack(">I", _receive(connection, 4))
        _receive(connection, length)  # name
        x = width - _BUTTON_WIDTH * _SUSPEND_FROM_RIGHT + _BUTTON_WIDTH // 2
        for buttons in (0, 1, 0):
            connection.sendall(struct.pack(">BBHH", 5, buttons, x, _BUTTON_WIDTH // 2))
            time.sleep(0.2)
        _type(connection, folder + "\n")
        # Then it saves, and asks whether to continue. When that is cannot be seen from here.
        connection.settimeout(1)
        while True:
            try:
                if not connection.recv(65536):
                    return
            except TimeoutError:
                pass
            try:
                _type(connection, "n\n")
            except (BrokenPipeError, ConnectionResetError):
                return


def _type(connection: socket.socket, text: str) -> None:
    for character in text:
        code = _KEY_RETURN if character == "\n" else ord(character)
        for down in (1, 0):
            connection.sendall(struct.pack(">BBHI", 4, down, 0, code))
            time.sleep(0.02)


if __name__ == "__main__":
    try:
        suspend(sys.argv[1])
    except ConnectionResetError:
        pass
    except OSError as error:
        sys.exit(f"cannot press the suspend button: {error}")
