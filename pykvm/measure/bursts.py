"""Cost of a packet through the switch, by frame size, burst length, number of guests and path."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from pykvm.errors import PykvmError
from pykvm.host.emulation import is_emulated
from pykvm.kvm import Kvm
from pykvm.machine.bare.guest import BareGuest
from pykvm.measure.connect import SWITCH_SEED, connect
from pykvm.measure.exit_counter import ExitCounter, Exits
from pykvm.measure.programs import BurstProgram, Phase, SendSample, SwitchPath, send_samples
from pykvm.measure.records import Samples
from pykvm.switch.geometry import SwitchConfig
from pykvm.switch.hosted import HostedSwitch
from pykvm.switch.native_port import NativePort

__all__ = ["BURSTS", "SIZES", "BurstPoint", "BurstStuckError", "measure_bursts"]

SIZES: Final = (64, 128, 256, 512, 1024, 1514)
BURSTS: Final = (1, 8, 32, 128, 256)
TIMEOUT: Final = 900.0
"""Seconds for one run of all phases."""

_LANE_SLOTS: Final = 512
# First use of code and data, which is not measured.
_WARM_UP: Final = Phase(64, 1, 8)


class BurstStuckError(PykvmError):
    """A guest that gave up because its peer took no frames."""


@dataclass(frozen=True)
class BurstPoint:
    """Cost for guest 0 with one frame size, burst length, number of guests and path.

    Attributes:
        path: path to the switch.
        guests: number of guests.
        size: bytes of a frame.
        burst: frames in a burst.
        samples: ticks of each call that sent a whole burst at once.
        exits: VM exits while all bursts were sent.
        frames: frames in all bursts.
    """

    path: SwitchPath
    guests: int
    size: int
    burst: int
    samples: Samples
    exits: Exits
    frames: int

    def as_dict(self) -> dict[str, Any]:
        """Return the cost for a record."""
        return {
            "path": self.path.name.lower(),
            "guests": self.guests,
            "size": self.size,
            "burst": self.burst,
            "cost_per_packet": self.samples.cost / self.burst,
            "vm_exits_per_packet": self.exits.own / self.frames,
            **self.samples.as_dict(),
            "exits": self.exits.as_dict(),
        }


def phases_of(sizes: Sequence[int], bursts: Sequence[int], repeats: int) -> list[Phase]:
    """Return a warm-up, then one phase of `repeats` bursts for each size and burst length.

    Args:
        sizes: bytes of a frame.
        bursts: frames in a burst.
        repeats: number of bursts in a phase.
    """
    return [_WARM_UP, *(Phase(size, burst, repeats) for size in sizes for burst in bursts)]


def measure_bursts(
    kvm: Kvm,
    path: SwitchPath,
    guests: int,
    scale: float,
    *,
    sizes: Sequence[int] = SIZES,
    bursts: Sequence[int] = BURSTS,
    repeats: int = 16,
) -> list[BurstPoint]:
    """Let each guest send to the next one in a ring, all phases in one run.

    Args:
        kvm: an open ``/dev/kvm``.
        path: path to the switch.
        guests: number of guests.
        scale: one tick of the time-stamp counter in the record's unit.
        sizes: bytes of a frame.
        bursts: frames in a burst.
        repeats: number of bursts of each size and length.

    Raises:
        BurstStuckError: a guest gave up, or no burst went through at once.
        PykvmError: see `BareGuest.run` and `ObjectInstance.attach`.
    """
    phases = phases_of(sizes, bursts, repeats)
    total = sum(phase.frames for phase in phases)
    config = SwitchConfig(ports=guests, lane_slots=_LANE_SLOTS)
    with ExitStack() as stack:
        hosted = stack.enter_context(HostedSwitch(config, hash_seed=SWITCH_SEED, epoch=None))
        running: list[BareGuest] = []
        counters: list[ExitCounter] = []
        for port in range(guests):
            program = BurstProgram(
                path, _station(port), _station((port + 1) % guests), phases, expected=total
            )
            guest = stack.enter_context(BareGuest(kvm, program, name=f"guest {port}"))
            guest.set_input(program.input())
            connect(guest, hosted, port, path)
            running.append(guest)
            counters.append(ExitCounter(guest.vcpu))
        _introduce(hosted, guests)
        for guest, counter in zip(running, counters, strict=True):
            guest.start(counter.mark)
        statuses = [guest.wait(TIMEOUT) for guest in running]
        if any(statuses):
            raise BurstStuckError("a guest gave up", "run it again on a host with less load")
        results = running[0].results()
        samples = send_samples(running[0].samples(), results[2])
    return _points(path, guests, scale, phases, samples, counters[0].parts)


def _station(port: int) -> bytes:
    return bytes([2, 0, 0, 0, 0, port + 1])


def _introduce(hosted: HostedSwitch, guests: int) -> None:
    """Let the switch learn all stations.

    A guest may finish before its peer sends anything, and frames to an unknown station cost more,
    because the switch floods them. Therefore each port sends a frame to its own station. The switch
    learns the station and delivers the frame to no port.
    """
    for port in range(guests):
        NativePort(hosted.switch, port).send([_station(port) * 2 + bytes(48)])


def _points(
    path: SwitchPath,
    guests: int,
    scale: float,
    phases: Sequence[Phase],
    samples: Sequence[SendSample],
    exits: dict[int, Exits],
) -> list[BurstPoint]:
    """Assign samples to phases by counting their frames from the start."""
    points = []
    calls = iter(samples)
    for number, phase in enumerate(phases):
        whole: list[int] = []
        left = phase.frames
        while left:
            call = next(calls)
            left -= call.sent
            if call.sent == phase.burst:
                whole.append(call.cycles)
        if phase is _WARM_UP:
            continue
        if not whole:
            raise BurstStuckError(
                f"no burst of {phase.burst} frames went through at once", "use shorter bursts"
            )
        points.append(
            BurstPoint(
                path,
                guests,
                phase.frame_bytes,
                phase.burst,
                Samples(whole, scale, counted=is_emulated()),
                exits[number],
                phase.frames,
            )
        )
    return points
