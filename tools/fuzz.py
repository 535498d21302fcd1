"""``python -m tools.fuzz``: fuzz what guests, clients and files can say; print what it reached.

At the first finding in a target, it prints the input and the failure, and goes on with the others;
its exit status is then 1.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pykvm.errors import PykvmError
from tests.rigs.fuzz.inputs import write_corpus
from tests.rigs.fuzz.target import Target
from tests.rigs.fuzz.targets import TARGETS

_REMARK = "inputs that together reach all that was reached, found by fuzzing"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)} (default: all)"
    )
    parser.add_argument(
        "--seconds", type=int, default=60, help="how long to search, for all together (default 60)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time (default 1)")
    parser.add_argument(
        "--keep", action="store_true", help="write the minimised corpus back into the repository"
    )
    parser.add_argument("--directory", type=Path, default=Path("build/fuzz"))
    options = parser.parse_args()
    if unknown := [name for name in options.targets if name not in TARGETS]:
        parser.error(f"no target {unknown[0]!r}: use {', '.join(TARGETS)}")
    targets = [TARGETS[name] for name in options.targets or TARGETS]
    seconds = max(options.seconds * options.jobs // len(targets), 1)

    def fuzz(target: Target) -> bool:
        return _fuzz(target, options.directory / target.name, seconds, keep=options.keep)

    with ThreadPoolExecutor(options.jobs) as pool:
        return 0 if all(list(pool.map(fuzz, targets))) else 1


def _fuzz(target: Target, directory: Path, seconds: int, *, keep: bool) -> bool:
    """Fuzz one target; return whether nothing was found."""
    inputs = target.inputs()
    corpus = directory / "corpus"
    print(f"{target.name}: {len(inputs)} inputs to begin with, {seconds} s", flush=True)
    fuzzer = target.fuzzer(directory)
    outcome = fuzzer.run(seconds, corpus=corpus, inputs=inputs)
    if outcome.finding:
        print(outcome.output[-6000:], file=sys.stderr)
        print(f"{target.name}: found after {outcome.executions} executions: {outcome.finding}")
        print(
            f"{target.name}: the input, for {target.folder.name}/findings.txt: "
            f"{outcome.input.hex()}",
            flush=True,
        )
        return False
    best = fuzzer.minimised(corpus)
    reached = target.coverage(directory, best)
    print(
        f"{target.name}: {outcome.executions} executions, nothing found; {target.subject}: "
        f"{reached.lines:.4g} % of the lines, {reached.branches:.4g} % of the branches, "
        f"{outcome.edges} edges",
        flush=True,
    )
    if keep:
        write_corpus(target.corpus, best, _REMARK)
    return True


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PykvmError as error:
        sys.exit(f"fuzz: {error}")
