"""The vault: a shared object with a secret, and checks whether an attack has reached it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from pykvm.elisa import crossing
from pykvm.elisa.attachment import Attachment
from pykvm.elisa.exits import ElisaExit
from pykvm.elisa.objects import ObjectInstance, SharedObject
from pykvm.elisa.protections import Protection
from pykvm.elisa.trusted_images import SubImage
from pykvm.kernel import uapi
from pykvm.kvm import Exit, Kvm
from pykvm.machine.bare.guest import BareGuest
from pykvm.sizes import PAGE_SIZE
from tests.rigs.probe import Probe, calls, give, prepare, results, run
from tests.rigs.processor_features import host_levels
from tests.rigs.sources import OBJECTS

VAULT: Final = OBJECTS / "vault.c"

SECRET: Final = 0x5EC7_E75E_C7E7_0001
WORD: Final = 0x09E4_5E5A_3E00_0002  # opens the vault; no guest knows it
KNOCK, OPEN, NOTE, POST = range(4)
# Offsets in struct vault.
KNOCKS_AT: Final = 8
WORD_AT: Final = 48

SHARED_PAGES: Final = 16
WINDOW_PAGES: Final = 8
C: Final = crossing.CROSSING_GVA
SHARED: Final = C + crossing.SHARED_OFFSET  # shared memory in the sub context
WINDOW: Final = SHARED + SHARED_PAGES * PAGE_SIZE  # window 0

DECLARATION: Final = SharedObject(
    "vault",
    VAULT,
    shared=SHARED_PAGES * PAGE_SIZE,
    window=WINDOW_PAGES * PAGE_SIZE,
    guests=2,
)


@contextmanager
def vault(
    image: SubImage | None = None, *, without: Iterable[Protection] = ()
) -> Iterator[ObjectInstance]:
    """Open a vault with its secret in place.

    Args:
        image: another build of the vault.
        without: protections that its crossing lacks.
    """
    declaration = replace(DECLARATION, without=frozenset(without))
    with ObjectInstance(declaration, image) if image else declaration.open() as instance:
        put(instance.shared, 0, SECRET)
        put(instance.shared, WORD_AT, WORD)
        yield instance


def put(memory: memoryview, at: int, value: int) -> None:
    memory[at : at + 8] = value.to_bytes(8, "little")


def word(memory: memoryview, at: int = 0) -> int:
    return int.from_bytes(memory[at : at + 8], "little")


def stolen(instance: ObjectInstance) -> bool:
    """Return whether the secret is in guest 0's window."""
    return SECRET.to_bytes(8, "little") in bytes(instance.window(0))


def untouched(instance: ObjectInstance) -> bool:
    """Return whether the vault is as trusted code leaves it.

    Only the count of calls may have changed, and the secret is in no window.
    """
    expected = bytearray(len(instance.shared))
    put(memoryview(expected), 0, SECRET)
    put(memoryview(expected), WORD_AT, WORD)
    put(memoryview(expected), KNOCKS_AT, knocks(instance))
    windows = bytes(instance.window(0)) + bytes(instance.window(1))
    return bytes(instance.shared) == expected and SECRET.to_bytes(8, "little") not in windows


def knocks(instance: ObjectInstance) -> int:
    return word(instance.shared, KNOCKS_AT)


def still_serves(kvm: Kvm, instance: ObjectInstance) -> bool:
    """Return whether the vault serves a second guest, in a VM of its own."""
    before = knocks(instance)
    with BareGuest(kvm, Probe(), paging_levels=host_levels()) as other:
        prepare(other)
        attachment = instance.attach(other, 1)
        give(other, *(calls(attachment.slot, KNOCK) for _ in range(3)))
        served = run(other) == [] and results(other) == [before + n for n in (1, 2, 3)]
        attachment.detach()
    return served


def join(guest: BareGuest, instance: ObjectInstance, crossing_gva: int = C) -> Attachment:
    """Attach as guest 0, with the guest's own pages of the crossing and its window in place."""
    guest.crossing_gva = crossing_gva
    return instance.attach(guest, 0)


def stop_at(exits: list[Exit], at: int) -> ElisaExit:
    """Return the last exit, which stopped the guest in the context `at`."""
    exit = exits[-1]
    assert isinstance(exit, ElisaExit), exit
    assert exit.at == at, exit
    return exit


AT_GATE: Final[int] = uapi.lib.KVM_ELISA_AT_GATE
AT_SUB: Final[int] = uapi.lib.KVM_ELISA_AT_SUB
AT_DEFAULT: Final[int] = uapi.lib.KVM_ELISA_AT_DEFAULT
