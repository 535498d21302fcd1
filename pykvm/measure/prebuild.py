"""Compilation of everything that measurements need, ahead of time."""

from pykvm.elisa.trusted_images import build_object, crossing_images
from pykvm.measure.programs import (
    BurstProgram,
    CrossingProgram,
    ExchangeProgram,
    InterruptProgram,
    SwitchPath,
)
from pykvm.measure.protection_cost import MEASURED
from pykvm.measure.user_mode import UserProgram
from pykvm.resources import GUEST_SOURCES

__all__ = ["build_images"]


def build_images() -> None:
    """Compile guests, objects and the crossing, or find them in the cache.

    Raises:
        PykvmError: see `pykvm.elisa.trusted_images.build_object`.
    """
    crossing_images()
    for source in ("objects/nop.c", "objects/counter.c", "objects/work.c", "switch/switch.c"):
        build_object([GUEST_SOURCES / source])
    nop = [GUEST_SOURCES / "objects" / "nop.c"]
    build_object(nop, user=True)
    for one in MEASURED:
        if one.added:
            build_object(nop, extra=frozenset({one.protection}))
            continue
        without = frozenset({one.protection})
        crossing_images(without)
        # Builds that are measured from user mode are made for kernel mode as well.
        for user in {False, one.user}:
            build_object(nop, user=user, without=without)
    for program in (
        CrossingProgram(1, []),
        InterruptProgram(1, [], 0),
        ExchangeProgram(SwitchPath.VMFUNC, 0),
        BurstProgram(SwitchPath.VMFUNC, b"", b"", []),
        UserProgram(),
    ):
        program.image()
