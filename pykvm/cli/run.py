"""Run a command in a Linux guest, or a shell, or launch a machine with its console here."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pykvm.cli.confined import add_confinement, confinement_of
from pykvm.cli.signals import exit_on_signals
from pykvm.errors import PykvmError
from pykvm.sizes import MIB

if TYPE_CHECKING:
    from pykvm.machine.linux.config import MachineConfig

__all__ = ["add_parser", "run"]

_CONSOLE: Final = "console=ttyS0"
_STDOUT: Final = 1
_SHELL: Final = ("/bin/sh", "-i")

_EPILOG = """\
Without --initrd, a guest sees this host's root file system, or that of --root, and runs COMMAND in
it, or a shell. What it writes stays in its memory and is gone afterwards. Streams and exit status
are the command's.
With --initrd, with a Multiboot image as the kernel, or from a file of TOML whose keys are these
options, the guest is what they make of it, and its console is this terminal.
Ctrl-] on a terminal ends the guest. Exit status: the command's; 0 after the guest has powered off,
or reset itself with --no-reboot; 70 after a panic of its kernel; 1 after an error.
examples:
  pykvm run -- uname -r
  pykvm run --memory 1G -- make test
  pykvm run                                          (a shell)
  pykvm run --initrd rootfs.cpio.gz
  pykvm run --kernel vmlinuz --initrd rootfs.cpio.gz --append "quiet" --cpus 2 --memory 1G
  pykvm run --kernel vmlinuz --dry-run
  pykvm run vm.toml
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
    parser.add_argument(
        "--initrd",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="initial RAM disk (may be given several times)",
    )
    parser.add_argument("--append", default="", metavar="LINE", help="end of the command line")
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="1 to 64 (default 1)")
    parser.add_argument(
        "--memory",
        type=_size,
        default=512 * MIB,
        metavar="SIZE",
        help="as 512M or 2G (default 512M)",
    )
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="directory that is the command's root file system (default: /)",
    )
    parser.add_argument(
        "--disk",
        action="append",
        default=[],
        metavar="FILE[,ro]",
        help="file or block device that is a disk, raw or qcow2 (may be given several times)",
    )
    parser.add_argument(
        "--net",
        action="append",
        default=[],
        metavar="KIND[,...]",
        help="network interface: user (no privileges; user,tcp=8080:80 forwards a port), or tap "
        "(tap,bridge=br0)",
    )
    parser.add_argument("--name", default="", help="the machine's name")
    parser.add_argument(
        "--share",
        action="append",
        default=[],
        metavar="TAG=DIR[,rw]",
        help="directory that the guest can mount: mount -t virtiofs TAG /mnt",
    )
    parser.add_argument(
        "--no-reboot",
        action="store_true",
        help="end when the guest resets itself, as it would boot again",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="the kernel's messages, on standard error"
    )
    add_confinement(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be started")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="FILE.toml | -- COMMAND")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the machine until it ends; return the exit status.

    Raises:
        PykvmError: see `pykvm.machine.linux.machine.LinuxMachine` and its `run`.
    """
    from pykvm.machine.linux.config import Disk, MachineConfig, Share  # noqa: PLC0415

    first, *words = options.command or ["--"]
    if first != "--":
        if words or not first.endswith(".toml"):
            raise PykvmError(
                f"{first!r} is no file of a machine", "write -- before a command, or name a .toml"
            )
        return _run_machine(MachineConfig.from_file(Path(first)), options)
    config = MachineConfig(
        kernel=options.kernel,
        unpack=options.unpack,
        initrds=tuple(options.initrd),
        command_line=options.append,
        memory=options.memory,
        cpus=options.cpus,
        name=options.name,
        disks=tuple(map(Disk.parse, options.disk)),
        networks=tuple(options.net),
        shares=tuple(map(Share.parse, options.share)),
    )
    alone = not words and _is_whole_system(options.kernel)
    if options.initrd or alone:
        if words or options.root:
            raise PykvmError(
                "--initrd goes with neither a command nor --root",
                "leave out --initrd, or the others",
            )
        return _run_machine(config, options)
    return _run_command(config, words, options)


def _is_whole_system(kernel: Path) -> bool:
    from pykvm.machine.linux.kernel_file import is_whole_system  # noqa: PLC0415

    return kernel.is_file() and is_whole_system(kernel)


def _run_machine(config: MachineConfig, options: argparse.Namespace) -> int:
    if not _is_whole_system(config.kernel):
        config = replace(config, command_line=f"{_CONSOLE} {config.command_line}".strip())
    if options.dry_run:
        print(config.described())
        return 0
    from pykvm.machine.linux.boot_process import in_own_process  # noqa: PLC0415

    exit_on_signals()
    sys.stdout.flush()
    while True:
        status, goes_on = in_own_process(partial(_boot, config, options))
        if not goes_on:
            return status


def _boot(config: MachineConfig, options: argparse.Namespace) -> tuple[int, bool]:
    """Run a machine until it ends; return the exit status, and whether it is to boot again."""
    from pykvm.kvm import Kvm  # noqa: PLC0415
    from pykvm.machine.linux.devices import configured_networks  # noqa: PLC0415
    from pykvm.machine.linux.foreground import run_in_foreground, status_of  # noqa: PLC0415
    from pykvm.machine.linux.machine import End, LinuxMachine  # noqa: PLC0415

    with ExitStack() as stack:
        kvm = stack.enter_context(Kvm())
        networks = []
        for network in configured_networks(config):
            networks.append(stack.enter_context(network))
        machine = stack.enter_context(LinuxMachine(kvm, config, _STDOUT, networks=networks))
        end = run_in_foreground(machine, config.name, confinement_of(options))
        return status_of(end, machine), end is End.RESET and not options.no_reboot


def _run_command(config: MachineConfig, words: list[str], options: argparse.Namespace) -> int:
    from pykvm.machine.linux.command import Command  # noqa: PLC0415
    from pykvm.machine.linux.command_run import ROOT_TAG, is_terminal, run_command  # noqa: PLC0415

    root = options.root or Path("/")
    command = Command(
        words or _SHELL,
        f"virtiofs:{ROOT_TAG}",
        directory=str(Path.cwd()) if options.root is None else "/",
        terminal=is_terminal(),
    )
    if options.dry_run:
        print(config.described())
        print(f"root      {root} (what is written is gone afterwards)")
        print(f"command   {shlex.join(command.words)}")
        return 0
    from pykvm.kvm import Kvm, UnexpectedExitError  # noqa: PLC0415
    from pykvm.machine.linux.machine import MachineCrashedError  # noqa: PLC0415

    exit_on_signals()
    sys.stdout.flush()
    with Kvm() as kvm:
        try:
            return run_command(
                kvm,
                config,
                command,
                root,
                verbose=options.verbose,
                confinement=confinement_of(options),
            )
        except (MachineCrashedError, UnexpectedExitError) as error:
            print(error.report, file=sys.stderr)
            raise


def _size(text: str) -> int:
    from pykvm.machine.linux.config import MachineConfigError, parse_size  # noqa: PLC0415

    try:
        return parse_size(text)
    except MachineConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
