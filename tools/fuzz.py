"""``python -m tools.fuzz``: fuzz the switch for some time and print the coverage it reached.

At the first finding, it prints the input and the failure, and exits with status 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pykvm.errors import PykvmError
from tests.rigs.switch.fuzz.fuzzer import CORPUS, Fuzzer, read_corpus, write_corpus


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="how long to search (default 60)")
    parser.add_argument(
        "--keep", action="store_true", help="write the minimised corpus back into the repository"
    )
    parser.add_argument("--directory", type=Path, default=Path("build/fuzz"))
    options = parser.parse_args()
    fuzzer = Fuzzer(options.directory)
    seeds = read_corpus()
    corpus = options.directory / "corpus"
    print(f"fuzz: {len(seeds)} inputs to begin with, {options.seconds} s", flush=True)
    outcome = fuzzer.run(options.seconds, corpus=corpus, inputs=seeds)
    if outcome.finding:
        print(outcome.output[-6000:], file=sys.stderr)
        print(f"fuzz: found after {outcome.executions} executions: {outcome.finding}")
        print(f"fuzz: the input, for tests/rigs/switch/fuzz/findings.txt: {outcome.input.hex()}")
        return 1
    best = fuzzer.minimised(corpus)
    reached = fuzzer.coverage(best)
    print(
        f"fuzz: {outcome.executions} executions, nothing found; switch.c: "
        f"{reached.lines:g} % of its lines, {reached.branches:g} % of its branches, "
        f"{outcome.edges} edges of the sanitized build"
    )
    if options.keep:
        write_corpus(CORPUS, best, "inputs that together reach all of switch.c, found by fuzzing")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PykvmError as error:
        sys.exit(f"fuzz: {error}")
