"""The switch as a shared object: its memory, its trusted code, and its ports' guests."""

from types import TracebackType
from typing import Self

from pykvm.boot.compiler import GUEST_SOURCES
from pykvm.elisa.objects import ObjectInstance, SharedObject
from pykvm.switch.geometry import SwitchConfig
from pykvm.switch.switch import Switch

__all__ = ["HostedSwitch"]


class HostedSwitch:
    """A switch that guests reach with VMFUNC, with VMCALL, or in their own memory.

    instance: the shared object; guest number and port number are the same. switch: its host's
    side, with counters that can be read while guests send. hash_seed: see `Switch`.

    Raises what `SharedObject.open` and `Switch` raise.
    """

    def __init__(self, config: SwitchConfig, *, hash_seed: int | None = None) -> None:
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

    def close(self) -> None:
        """Detach every guest and give up the memory. Harmless twice."""
        self.instance.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
