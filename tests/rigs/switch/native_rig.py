"""A switch in anonymous shared memory, its ports used natively, and frames for it."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

from pykvm.switch import NativePort, Switch, SwitchConfig

__all__ = ["BROADCAST", "Rig", "frame", "mac", "make_rig", "tagged"]

BROADCAST = b"\xff" * 6


def mac(number: int) -> bytes:
    """Return the address of station `number`."""
    return b"\x02" + number.to_bytes(5, "big")


def frame(destination: bytes | int, source: bytes | int, size: int = 64, mark: int = 0) -> bytes:
    """Return a frame of `size` bytes; those after the two addresses depend on `mark`."""
    addresses = b"".join(
        mac(address) if isinstance(address, int) else address for address in (destination, source)
    )
    payload = b"\x88\xb5" + mark.to_bytes(4, "little")
    payload += bytes((mark * 31 + position * 7) & 0xFF for position in range(size))
    return (addresses + payload)[:size]


def tagged(untagged: bytes, *vlans: int, tpid: int = 0x8100, priority: int = 0) -> bytes:
    """Return the frame with a tag for each of `vlans`, the outermost first; each adds 4 bytes."""
    tags = b"".join(
        tpid.to_bytes(2, "big") + (priority << 13 | vlan).to_bytes(2, "big") for vlan in vlans
    )
    return untagged[:12] + tags + untagged[12:]


@dataclass
class Rig:
    """One switch with every port enabled and used by this process."""

    switch: Switch
    ports: list[NativePort]
    memory: mmap.mmap

    def teach(self) -> None:
        """Let the switch learn station p behind each port p, and empty all lanes."""
        for port in self.ports:
            port.send([frame(mac(0xFFFF), port.number)])
        for port in self.ports:
            port.receive_all()


def make_rig(config: SwitchConfig | None = None, *, enabled: bool = True) -> Rig:
    """Create a switch; forked children share its memory, which is freed with the rig."""
    config = config or SwitchConfig(lane_slots=32, tx_slots=32)
    memory = mmap.mmap(-1, config.total_size)
    switch = Switch(config, memory, hash_seed=0x9E3779B97F4A7C15)
    ports = [NativePort(switch, number) for number in range(config.ports)]
    if enabled:
        for port in ports:
            switch.enable(port.number)
    return Rig(switch, ports, memory)
