"""Common part of the commands that ask a running machine: its name, and the request."""

import argparse
from typing import Any

__all__ = ["add_named_parser", "ask"]


def add_named_parser(
    subparsers: Any, command: str, text: str | None, **options: Any
) -> argparse.ArgumentParser:
    """Add a subcommand with a machine's name to the command line; return its parser.

    Args:
        subparsers: where it is added.
        command: its name.
        text: the docstring of its module: its help, and its description where `options` has none.
        options: further options of the parser.
    """
    text = (text or "").strip()
    options = {"description": text, **options}
    parser: argparse.ArgumentParser = subparsers.add_parser(
        command, help=text.rstrip("."), **options
    )
    parser.add_argument("name", metavar="NAME", help="the machine's name, see pykvm ps")
    return parser


def ask(
    options: argparse.Namespace, command: str, *, patience: float = 60.0, **arguments: Any
) -> Any:
    """Send a request to the machine that the options name; return the result.

    Args:
        options: those of the parser.
        command: the request.
        patience: seconds to wait for the answer.
        arguments: of the request.

    Raises:
        MachineNameError: no machine has the name.
        ControlError: the machine refuses.
    """
    from pykvm.control.client import MachineClient  # noqa: PLC0415  (--help needs none of it)

    with MachineClient(options.name, patience=patience) as client:
        return client.request(command, **arguments)
