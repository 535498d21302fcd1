"""All targets, by name."""

from typing import Final

from tests.rigs.fuzz.native import NativeTarget
from tests.rigs.fuzz.target import Target
from tests.rigs.switch.fuzz.fuzzer import SwitchTarget

__all__ = ["TARGETS"]

_ALL: Final[list[Target]] = [
    SwitchTarget(),
    NativeTarget("serial", ["devices/serial.c"], include=["kvm/native"]),
]

TARGETS: Final = {target.name: target for target in _ALL}
