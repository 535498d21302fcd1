"""Show the serial console of a running machine, and type into it."""

import argparse
import os
import socket
import sys
from typing import Any

from pykvm.cli.named import add_named_parser

__all__ = ["add_parser", "run"]

_CHUNK = 65536


def add_parser(subparsers: Any) -> None:
    """Add `pykvm console` to the command line."""
    parser = add_named_parser(
        subparsers,
        "console",
        __doc__,
        description=f"{__doc__} Ctrl-] leaves it; the machine runs on.",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Copy in both directions until the escape, the end of input, or of the machine.

    Raises:
        MachineNameError: no machine has the name.
        ControlError: the machine refuses.
    """
    from pykvm.control.client import MachineClient  # noqa: PLC0415
    from pykvm.machine.linux.console import Console  # noqa: PLC0415

    with MachineClient(options.name) as client:
        connection, first = client.stream("console")
        sys.stdout.flush()
        with Console(connection.send, lambda: connection.shutdown(socket.SHUT_RDWR)):
            data = first
            while data or (data := connection.recv(_CHUNK)):
                while data:
                    data = data[os.write(1, data) :]
    return 0
