"""The switch as a shared object: its memory, its trusted code, and its ports' guests."""

import threading
from typing import Final

from pykvm.closeable import Closeable
from pykvm.elisa.objects import ObjectInstance, SharedObject
from pykvm.resources import GUEST_SOURCES
from pykvm.switch.geometry import SwitchConfig
from pykvm.switch.switch import Switch

__all__ = ["HostedSwitch"]

EPOCH: Final = 10.0
"""Seconds of an epoch: with the default `SwitchConfig.max_age`, addresses are kept for 5 minutes,
the default of IEEE 802.1Q."""


class HostedSwitch(Closeable):
    """A switch that guests reach with VMFUNC, with VMCALL, or in their own memory.

    instance: the shared object; guest number and port number are the same. A lane has one writer,
    the port's vCPU, so guests with several are refused. switch: its host's side, with counters that
    can be read while guests send. hash_seed: see `Switch`.

    epoch: seconds after which time passes by one epoch for the address table; None, and it stands
    still, as a measurement wants it.

    Raises what `SharedObject.open` and `Switch` raise.
    """

    def __init__(
        self, config: SwitchConfig, *, hash_seed: int | None = None, epoch: float | None = EPOCH
    ) -> None:
        self.config = config
        declaration = SharedObject(
            "switch",
            GUEST_SOURCES / "switch" / "switch.c",
            shared=config.shared_size,
            window=config.window_size,
            guests=config.ports,
        )
        self.instance: ObjectInstance = declaration.open()
        try:
            self.switch = Switch(
                config, self.instance.memory.view(), declaration.windows_offset, hash_seed=hash_seed
            )
        except BaseException:
            self.instance.close()
            raise
        self._closing = threading.Event()
        self._clock: threading.Thread | None = None
        if epoch is not None:
            self._clock = threading.Thread(
                target=self._let_time_pass, args=(epoch,), name="switch clock", daemon=True
            )
            self._clock.start()

    def _let_time_pass(self, epoch: float) -> None:
        while not self._closing.wait(epoch):
            self.switch.tick()

    def close(self) -> None:
        """Detach every guest and give up the memory. Harmless twice.

        In a forked process, which has no clock, nobody is detached.
        """
        if self._clock is not None and not self.inherited:
            self._closing.set()
            self._clock.join()  # it writes into the memory
        self.instance.close()
