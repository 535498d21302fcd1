"""Build the patched KVM modules, load them, compare them; print the patch."""

import argparse
from pathlib import Path
from typing import Any

from pykvm.cli import selftests
from pykvm.cli.testbed import add_also
from pykvm.kernel import build as kernel
from pykvm.kernel import modules, weaknesses
from pykvm.kernel.patch import complete, find_patch
from pykvm.kernel.series import SERIES, default_series, newest_kernel

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Add `pykvm kernel` and its actions to the command line."""
    parser = subparsers.add_parser("kernel", description=__doc__)
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    build = actions.add_parser("build", help="build the modules and print where they are")
    which = build.add_mutually_exclusive_group()
    which.add_argument(
        "--kernel", metavar="RELEASE", help="as uname -r says it; default: the running kernel"
    )
    which.add_argument(
        "--series", choices=SERIES, help="the kernel that pykvm testbed runs for this series"
    )
    build.add_argument(
        "--unpatched", action="store_true", help="build the distribution's modules, to compare"
    )
    add_also(build)
    build.set_defaults(run=run, action=_build)

    patch = actions.add_parser(
        "patch", help="print the whole patch of a series: the files of its own and the hooks"
    )
    patch.add_argument("--series", choices=SERIES, help="default: the one that pykvm testbed runs")
    patch.set_defaults(run=run, action=_patch)

    load = actions.add_parser("load", help="put the patched modules in place of the loaded ones")
    load.add_argument(
        "--modules",
        type=Path,
        metavar="DIR",
        help="holds kvm.ko and kvm-intel.ko; default: $PYKVM_MODULES, else what build makes",
    )
    load.add_argument(
        "--accept",
        metavar="NAMES",
        help="weaknesses of this processor in spite of which there may be contexts, as "
        "`pykvm doctor` names them; for guests and hosts that may read all objects anyway",
    )
    load.set_defaults(run=run, action=_load)

    status = actions.add_parser("status", help="say which modules are loaded and who uses them")
    status.set_defaults(run=run, action=_status)

    restore = actions.add_parser("restore", help="put the distribution's modules back")
    restore.set_defaults(run=run, action=_restore)

    selftests.add_action(actions)


def run(args: argparse.Namespace) -> int:
    """Run the chosen action; return the exit status."""
    args.action(args)
    return 0


def _build(args: argparse.Namespace) -> None:
    release = newest_kernel(args.series).release if args.series else args.kernel
    print(kernel.build(release, patched=not args.unpatched, also=args.also))


def _patch(args: argparse.Namespace) -> None:
    print(complete(find_patch(args.series or default_series())), end="")


def _load(args: argparse.Namespace) -> None:
    accept = None if args.accept is None else weaknesses.parse(args.accept)
    _say_lost(modules.load(args.modules, accept=accept))
    _status(args)


def _restore(args: argparse.Namespace) -> None:
    _say_lost(modules.restore())
    _status(args)


def _status(_: argparse.Namespace) -> None:
    status = modules.status()
    print(f"KVM: {status.state}")
    if status.test_build:
        print(f"built with further patches, for tests only: {status.test_build}")
    if status.elisa:
        print(f"ELISA interface: version {status.elisa}")
        for title, weak in (
            ("weaknesses of this processor", weaknesses.present()),
            ("accepted weaknesses", weaknesses.accepted()),
        ):
            print(f"{title}: {', '.join(weaknesses.names_of(weak)) or 'none'}")
    for name, version in status.srcversion.items():
        print(f"module {name}: {version or 'no source version recorded'}")
    print(f"in use by: {', '.join(status.users) or 'nobody'}")


def _say_lost(parameters: list[str]) -> None:
    if parameters:
        print(f"not carried over to the new modules: {', '.join(parameters)}")
