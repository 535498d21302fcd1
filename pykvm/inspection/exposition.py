"""Prometheus's text format: families of samples with their help and type.

Source: prometheus.io, "Exposition formats", version 0.0.4.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Final

__all__ = ["Family", "render"]

_NOT_IN_NAMES: Final = re.compile(r"[^a-zA-Z0-9_:]")
_ESCAPES: Final = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


class Family:
    """Samples of one name.

    Args:
        name: the name; what a name cannot have becomes an underscore.
        kind: "counter", "gauge" or "histogram".
        text: one line for a reader.
    """

    def __init__(self, name: str, kind: str, text: str) -> None:
        self.name = _NOT_IN_NAMES.sub("_", name)
        self.kind = kind
        self.text = text
        self._lines: list[str] = []

    def add(self, labels: Mapping[str, str], value: float, suffix: str = "") -> None:
        """Add a sample."""
        pairs = ",".join(f'{name}="{text.translate(_ESCAPES)}"' for name, text in labels.items())
        inside = f"{{{pairs}}}" if pairs else ""
        self._lines.append(f"{self.name}{suffix}{inside} {value!r}")

    def add_histogram(
        self, labels: Mapping[str, str], bounds: Sequence[float], buckets: Sequence[int]
    ) -> None:
        """Add a histogram whose sum is not known.

        Args:
            labels: the labels.
            bounds: greatest value of each bucket but the last.
            buckets: how many values fell into each.
        """
        ends = [*(f"{bound!r}" for bound in bounds), "+Inf"]
        for end, count in zip(ends, accumulate(buckets), strict=True):
            self.add({**labels, "le": end}, count, "_bucket")
        self.add(labels, sum(buckets), "_count")

    def lines(self) -> list[str]:
        """Return the family's lines; none if it has no samples."""
        if not self._lines:
            return []
        text = self.text.replace("\\", "\\\\").replace("\n", "\\n")
        return [f"# HELP {self.name} {text}", f"# TYPE {self.name} {self.kind}", *self._lines]


def render(families: Iterable[Family]) -> str:
    """Return the text of families, which ends with a newline."""
    lines = [line for family in families for line in family.lines()]
    return "".join(f"{line}\n" for line in lines)
