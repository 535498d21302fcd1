"""Say what this host can do, and the exact next step for whatever is missing."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from pykvm.doctor import EMULATED, HOST, Check, emulated_host_usable, host_usable, run_checks
from pykvm.host.commands import program
from pykvm.measure.fingerprint import fingerprint

__all__ = ["add_parser", "run"]

_EPILOG = "Exit status: 0 if this host runs ELISA itself, 1 otherwise."


def add_parser(subparsers: Any) -> None:
    """Add `pykvm doctor` to the command line."""
    parser = subparsers.add_parser("doctor", description=__doc__, epilog=_EPILOG)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print every check and the verdict; return the exit status."""
    checks = run_checks()
    here, emulated = host_usable(checks), emulated_host_usable(checks)
    if args.json:
        findings = {
            "elisa_here": here,
            "emulated_host": emulated,
            "checks": [_finding(check) for check in checks],
            "fingerprint": fingerprint(),
        }
        print(json.dumps(findings, indent=2))
    else:
        for group, title in ((HOST, "This host"), (EMULATED, "The emulated Intel host")):
            _print_group(title, [check for check in checks if check.group == group])
        print(_verdict(here, emulated))
    return 0 if here else 1


def _finding(check: Check) -> dict[str, Any]:
    return asdict(check) | {"next_step": "" if check.ok else check.next_step}


def _print_group(title: str, checks: list[Check]) -> None:
    if not checks:
        return
    print(title)
    width = max(len(check.name) for check in checks)
    for check in checks:
        mark = "ok     " if check.ok else "missing" if check.needed else "without"
        print(f"  {mark}  {check.name:{width}}  {check.found}")
        if not check.ok:
            print(f"  {'':7}  {'':{width}}  -> {check.next_step}")
    print()


def _verdict(here: bool, emulated: bool) -> str:
    if here:
        return "This host runs ELISA itself."
    if emulated:
        return (
            "This host cannot run ELISA itself, but its emulated host can: "
            f"{program()} testbed -- COMMAND"
        )
    return "This host can run ELISA neither itself nor emulated; the steps above (->) lead there."
