"""Launch a machine that boots a Linux kernel, with its console here."""

import argparse
import platform
import sys
from pathlib import Path
from typing import Any, Final

from pykvm.cli.signals import exit_on_signals
from pykvm.sizes import GIB, KIB, MIB

__all__ = ["add_parser", "run"]

_UNITS: Final = {"K": KIB, "M": MIB, "G": GIB, "": MIB}
_CONSOLE: Final = "console=ttyS0"
_STDOUT: Final = 1
_PANIC_STATUS: Final = 70

_EPILOG = """\
The guest's console is this terminal; Ctrl-] ends the machine. Exit status: 0 after that, after the
guest has powered off, or has reset itself with --no-reboot; 70 after a panic of its kernel; 1 after
a triple fault.
examples:
  pykvm run --initrd rootfs.cpio.gz
  pykvm run --kernel vmlinuz --initrd rootfs.cpio.gz --append "quiet" --cpus 2 --memory 1G
  pykvm run --kernel vmlinuz --dry-run
"""


def add_parser(subparsers: Any) -> None:
    """Add `pykvm run` to the command line."""
    parser = subparsers.add_parser(
        "run",
        help=(__doc__ or "").strip().rstrip("."),
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kernel",
        type=Path,
        default=Path("/boot") / f"vmlinuz-{platform.release()}",
        metavar="FILE",
        help="a bzImage or an ELF vmlinux (default: this host's own)",
    )
    parser.add_argument(
        "--unpack",
        action="store_true",
        help="unpack a bzImage here, once; booting it again then takes less time",
    )
    parser.add_argument("--initrd", type=Path, metavar="FILE", help="initial RAM disk")
    parser.add_argument(
        "--append", default="", metavar="LINE", help=f"command line, behind {_CONSOLE}"
    )
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="1 to 64 (default 1)")
    parser.add_argument(
        "--memory",
        type=_size,
        default=512 * MIB,
        metavar="SIZE",
        help="as 512M or 2G (default 512M)",
    )
    parser.add_argument(
        "--no-reboot",
        action="store_true",
        help="end when the guest resets itself, as it would boot again",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be started")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the machine until it ends; return the exit status.

    Raises:
        PykvmError: see `pykvm.machine.linux.machine.LinuxMachine` and its `run`.
    """
    from pykvm.kvm import Kvm, UnexpectedExitError  # noqa: PLC0415  (--help needs none of it)
    from pykvm.machine.linux.config import MachineConfig  # noqa: PLC0415
    from pykvm.machine.linux.console import Console  # noqa: PLC0415
    from pykvm.machine.linux.machine import (  # noqa: PLC0415
        End,
        LinuxMachine,
        MachineCrashedError,
    )

    config = MachineConfig(
        kernel=options.kernel,
        unpack=options.unpack,
        initrds=(options.initrd,) if options.initrd else (),
        command_line=f"{_CONSOLE} {options.append}".strip(),
        memory=options.memory,
        cpus=options.cpus,
    )
    if options.dry_run:
        print(config.described())
        return 0
    exit_on_signals()
    sys.stdout.flush()
    with Kvm() as kvm:
        while True:
            with (
                LinuxMachine(kvm, config, _STDOUT) as machine,
                Console(machine.serial, machine.stop),
            ):
                try:
                    end = machine.run()
                except (MachineCrashedError, UnexpectedExitError) as error:
                    print(error.report, file=sys.stderr)
                    raise
            if end is End.PANIC:
                print("pykvm run: the guest's kernel has panicked", file=sys.stderr)
                return _PANIC_STATUS
            if end is not End.RESET or options.no_reboot:
                return 0


def _size(text: str) -> int:
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        return int(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r}: write a size like 512M or 2G") from None
