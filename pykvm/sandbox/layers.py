"""Layers of a confinement, and how they are reported."""

from dataclasses import dataclass

__all__ = ["Applied", "Layer"]


@dataclass(frozen=True)
class Layer:
    """One of the means by which a process is confined.

    Attributes:
        name: its name.
        in_force: whether it is, or could be, in force.
        text: what it does, or why it is missing.
        next_step: what to type or do if it is missing.
    """

    name: str
    in_force: bool
    text: str
    next_step: str = ""

    def __str__(self) -> str:
        missing = "" if self.in_force else "MISSING: "
        step = f" ({self.next_step})" if self.next_step else ""
        return f"{self.name:<13} {missing}{self.text}{step}"


@dataclass(frozen=True)
class Applied:
    """A confinement that this process is in.

    Attributes:
        layers: all layers, also those that are missing.
        threads: number of threads that there were.
        open_ways: what is not confined, a line each.
    """

    layers: tuple[Layer, ...]
    threads: int
    open_ways: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every layer is in force."""
        return all(layer.in_force for layer in self.layers)

    def lines(self) -> list[str]:
        """Return which layers are in force and what is not confined, a line each."""
        return [
            *(str(layer) for layer in self.layers),
            *(f"{'not confined':<13} {way}" for way in self.open_ways),
        ]
