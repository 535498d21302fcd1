"""The base class of everything that has to be closed."""

import pytest

from pykvm.closeable import Closeable, ForkedProcessError
from pykvm.elisa.attachment import Attachment
from pykvm.elisa.objects import ObjectInstance
from pykvm.elisa.vcpu_attachment import VcpuAttachment
from pykvm.kvm import Handle, Vcpu, Vm
from pykvm.machine.bare.guest import BareGuest
from pykvm.memory.guest_memory import GuestMemory
from pykvm.memory.regions import MemoryFile, Region
from pykvm.switch.hosted import HostedSwitch
from pykvm.testbed.bochs import Emulator
from tests.rigs.forks import in_fork

pytestmark = pytest.mark.unit


class Door(Closeable):
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_with() -> None:
    with Door() as door:
        assert isinstance(door, Door)
        assert door.closed == 0
    assert door.closed == 1


def test_an_exception_passes() -> None:
    door = Door()
    with pytest.raises(KeyError, match="through"), door:
        raise KeyError("through")
    assert door.closed == 1


def test_who_must_define_close() -> None:
    with pytest.raises(NotImplementedError), Closeable():
        pass


def test_a_forked_process_knows_what_it_has_inherited() -> None:
    door = Door()
    assert not door.inherited
    door.require_own("opening")

    def child() -> None:
        assert door.inherited
        with pytest.raises(ForkedProcessError, match="opening: it was made before") as caught:
            door.require_own("opening")
        assert "spawn" in caught.value.next_step
        mine = Door()
        assert not mine.inherited
        in_fork(grandchild)

    def grandchild() -> None:
        assert door.inherited
        assert not Door().inherited

    in_fork(child)
    assert not door.inherited


OWNERS = (
    Attachment,
    *(BareGuest, Emulator, GuestMemory, Handle, HostedSwitch),
    *(MemoryFile, ObjectInstance, Region, Vcpu, VcpuAttachment, Vm),
)


@pytest.mark.parametrize("owner", OWNERS)
def test_who_is_one(owner: type[Closeable]) -> None:
    assert issubclass(owner, Closeable)
    assert owner.close is not Closeable.close
    assert owner.__exit__ is Closeable.__exit__
