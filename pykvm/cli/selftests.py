"""Compare KVM's own selftests on the emulated host, with unpatched and with patched modules."""

import argparse
import time
from collections import Counter
from typing import Any

from pykvm.cli.signals import exit_on_signals
from pykvm.kernel.series import SERIES
from pykvm.testbed import selftest_comparison

__all__ = ["add_action", "run"]

_DESCRIPTION = """\
Run KVM's own selftests (tools/testing/selftests/kvm of the kernel's source) on the emulated Intel
host, once with the unpatched and once with the patched modules, and print a line for each: its
name, how it ended on both sides, whether that is the same, and what it said if it did not pass.
The unpatched modules are built from the same source by the same recipe, so that the patch is the
only difference. The same means: the same end, output and kernel warnings, numbers aside. Tests
that end by chance on the emulated host are left out and listed with the reason; a difference is
never tried again until it goes away. The exit status is 1 if anything differs, or if nothing
could be compared.
"""


def add_action(actions: Any) -> None:
    """Add `pykvm kernel selftests` to the actions of `pykvm kernel`."""
    parser = actions.add_parser(
        "selftests",
        help="run KVM's selftests unpatched and patched, and compare",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "--series", choices=SERIES, help="of the kernel (default: as for pykvm testbed)"
    )
    parser.add_argument("--all", action="store_true", help="run the slow ones too")
    parser.add_argument(
        "--limit",
        type=float,
        default=selftest_comparison.LIMIT,
        metavar="S",
        help="seconds of the emulated clock for each, 45 million instructions in one "
        f"(default: {selftest_comparison.LIMIT:g})",
    )
    parser.add_argument(
        "--distribution",
        action="store_true",
        help="compare with the distribution's own modules instead of unpatched ones",
    )
    parser.add_argument(
        "--list", action="store_true", help="name the selftests and say which are left out"
    )
    parser.add_argument(
        "tests",
        nargs="*",
        metavar="TEST",
        help="name or shell pattern (default: all but those that --list says are left out)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run `pykvm kernel selftests`; return the exit status."""
    exit_on_signals()
    start = time.monotonic()
    suite = selftest_comparison.Selftests(options.series)
    if options.list:
        for name in suite.names:
            print(f"{name:50} {_why_left_out(name, slow=False)}".rstrip())
        return 0
    names = selftest_comparison.choose(suite.names, options.tests, slow=options.all)
    left_out = [] if options.tests else [name for name in suite.names if name not in names]
    print(
        f"KVM selftests of Linux {suite.release}, {len(names)} of {len(suite.names)}; "
        f"stock: {'the distribution' if options.distribution else 'the same source unpatched'}\n"
        f"{'':42} {'stock':9} {'patched':9}",
        flush=True,
    )
    done = suite.compare(
        names, limit=options.limit, distribution=options.distribution, report=_print_one
    )
    for name in left_out:
        print(f"{name:42} left out: {_why_left_out(name, options.all)}")
    different = [each.name for each in done if not each.same]
    open_ = [each.name for each in done if each.same and not each.conclusive]
    counts = Counter(each.patched.verdict for each in done if each.same and each.conclusive)
    print(
        f"{len(done) - len(different) - len(open_)} the same "
        f"({', '.join(f'{number} {verdict}' for verdict, number in sorted(counts.items()))}), "
        f"{len(open_)} ended early on both sides, {len(left_out)} left out, "
        f"{len(different)} DIFFERENT; {time.monotonic() - start:.0f} s"
    )
    # It is a failure if no selftest could be compared.
    return 1 if different or len(open_) == len(done) else 0


def _why_left_out(name: str, slow: bool) -> str:
    if name in selftest_comparison.EXCLUDED:
        return selftest_comparison.EXCLUDED[name]
    return "" if slow else selftest_comparison.SLOW.get(name, "")


def _print_one(each: selftest_comparison.Comparison) -> None:
    outcome = "DIFFERENT" if not each.same else "same" if each.conclusive else "not compared"
    reason = f": {each.stock.reason}" if each.same and each.stock.reason else ""
    print(
        f"{each.name:42} {each.stock.verdict:9} {each.patched.verdict:9} {outcome}{reason}",
        flush=True,
    )
    if not each.same:
        for line in each.differences():
            print(f"    {line}")
