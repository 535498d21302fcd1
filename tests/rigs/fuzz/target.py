"""What every target of the fuzzers has, in whatever language it is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pykvm.errors import PykvmError
from tests.rigs.fuzz.inputs import read_corpus
from tests.rigs.fuzz.libfuzzer import Outcome

__all__ = ["Coverage", "Fuzzer", "Plant", "PlantError", "Target", "planted"]

HERE = Path(__file__).parent


class PlantError(PykvmError):
    """A planted fault that no longer fits the source."""


@dataclass(frozen=True)
class Plant:
    """A fault for a fuzzer to find.

    Attributes:
        file: path of a source in the package ``pykvm``.
        old: text that is once in it.
        new: the text in its place.
    """

    file: str
    old: str
    new: str


def planted(source: str, plant: Plant) -> str:
    """Return a source with a fault.

    Raises:
        PlantError: the text is not once in it.
    """
    if source.count(plant.old) != 1:
        raise PlantError(f"{plant.old!r} is not once in {plant.file}: adapt the fault")
    return source.replace(plant.old, plant.new)


@dataclass(frozen=True)
class Coverage:
    """How much of the sources under test the inputs reach, in percent."""

    lines: float
    branches: float


class Fuzzer(Protocol):
    """A target that has been built; see `LibFuzzer`."""

    def run(
        self, seconds: int, *, corpus: Path | None = None, inputs: Iterable[bytes] = ()
    ) -> Outcome: ...

    def minimised(self, corpus: Path) -> list[bytes]: ...


class Target(ABC):
    """Something to be fuzzed.

    Attributes:
        name: its name on the command line, and that of its folder.
        subject: the sources under test, in few words.
        folder: where its corpus and findings are.
    """

    def __init__(self, name: str, subject: str, folder: Path | None = None) -> None:
        self.name = name
        self.subject = subject
        self.folder = folder or HERE / name.replace("-", "_")

    @property
    def corpus(self) -> Path:
        """The file with the inputs to begin with."""
        return self.folder / "corpus.txt"

    @property
    def findings(self) -> Path:
        """The file with the inputs by which something was found."""
        return self.folder / "findings.txt"

    def inputs(self) -> list[bytes]:
        """Return all stored inputs."""
        return [*read_corpus(self.corpus), *read_corpus(self.findings)]

    @abstractmethod
    def missing(self) -> str:
        """Return why it cannot be fuzzed here; empty if it can."""

    @abstractmethod
    def fuzzer(self, directory: Path, plant: Plant | None = None) -> Fuzzer:
        """Build it in a directory, with a fault if one is given.

        Raises:
            NoToolError: a tool is missing.
            PlantError: the fault does not fit.
        """

    @abstractmethod
    def coverage(self, directory: Path, inputs: Iterable[bytes]) -> Coverage:
        """Return what the inputs reach."""
