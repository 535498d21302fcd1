"""Send real packets between two guests: VMFUNC beside VMCALL and directly mapped memory."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final

from pykvm.cli.hosts import on_suitable_host, ticks_scale
from pykvm.cli.kept import keep_charts
from pykvm.errors import PykvmError
from pykvm.host.emulation import host_kind, is_emulated
from pykvm.measure.charts import draw_demo
from pykvm.measure.fingerprint import fingerprint
from pykvm.measure.records import extra_protections, unit_of_host
from pykvm.resources import CAPTURE
from pykvm.switch.capture import Sides, encode_capture, read_capture, split_capture
from pykvm.switch.capture.sides import REASONS

__all__ = ["DemoFailedError", "add_parser"]

RESULTS: Final = Path("build/demo/results.json")
PATHS: Final = ("vmfunc", "vmcall", "direct")

# The empty call that is shown beside each path to the switch.
_CALL_OF_PATH: Final = {"vmfunc": "vmfunc", "vmcall": "vmcall_user", "direct": "direct"}


class DemoFailedError(PykvmError):
    """A frame was lost, changed or dropped on the way."""


def add_parser(subparsers: Any) -> None:
    """Add `pykvm demo` to the command line."""
    parser = subparsers.add_parser("demo", help=__doc__.splitlines()[0].rstrip("."))
    parser.add_argument(
        "--capture",
        default=str(CAPTURE),
        metavar="FILE",
        help="the packets to send: pcap or pcapng of an Ethernet, plain or gzip, - for standard "
        "input (default: memcached and HTTP)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=RESULTS,
        metavar="FILE",
        help=f"where to keep the results (default {RESULTS}); charts go beside it",
    )
    parser.add_argument(
        "--calls", type=int, default=1000, metavar="N", help="empty calls to time (default 1000)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="times to send the capture (default 5)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure here or on the emulated host, then print the table and draw the chart.

    Returns:
        The exit status.

    Raises:
        DemoFailedError: a frame was lost, changed or dropped.
        PykvmError: an option is out of range, the capture cannot be sent, or a measurement failed.
    """
    from pykvm.measure.exchange import check_room  # noqa: PLC0415

    for name, most in (("calls", 100_000), ("rounds", 1000)):
        if not 1 <= getattr(options, name) <= most:
            raise PykvmError(f"--{name} {getattr(options, name)}", f"use 1 to {most}")
    # Refuse a capture that cannot be sent before anything is started.
    capture = read_capture(options.capture)
    sides = split_capture(capture)
    sent = [[frame.data for frame in side] for side in sides.sent]
    check_room(sent, options.rounds)
    if not is_emulated():  # otherwise the command that started this one has printed it
        print(_summary(sides), flush=True)

    def measure() -> dict[str, Any]:
        return _measure(options, sent)

    record = on_suitable_host(
        measure,
        ["demo", "--calls", str(options.calls), "--rounds", str(options.rounds)],
        files={"--capture": encode_capture(capture.frames, nanoseconds=True)},
        out=options.json,
    )
    if is_emulated():
        return 0  # the command that started this one shows the results
    print(table(record), flush=True)
    keep_charts(options.json, partial(draw_demo, record))
    bad = [p for p in record["paths"] if p["delivered"] != p["sent"] or p["corrupted"]]
    if bad:
        raise DemoFailedError(
            f"frames were lost or changed on the way ({', '.join(p['name'] for p in bad)})",
            f"see the drop reasons in {options.json}",
        )
    return 0


def _summary(sides: Sides) -> str:
    sent = [frame for side in sides.sent for frame in side]
    lines = [f"capture: {len(sent)} frames, {sum(len(frame.data) for frame in sent)} bytes"]
    lines += [
        f"left out: {len(frames)} frames {REASONS[reason]}, which a switch does not forward"
        for reason, frames in sides.left_out.items()
    ]
    return "\n".join(lines)


def _measure(options: argparse.Namespace, sides: list[list[bytes]]) -> dict[str, Any]:
    from pykvm.kvm import Kvm  # noqa: PLC0415
    from pykvm.measure.crossing_cost import measure_crossing  # noqa: PLC0415
    from pykvm.measure.exchange import exchange  # noqa: PLC0415
    from pykvm.measure.programs import SwitchPath  # noqa: PLC0415

    with Kvm() as kvm:
        scale = ticks_scale(kvm)
        print(f"calling nothing, {options.calls} times by each path", file=sys.stderr, flush=True)
        crossing = measure_crossing(kvm, options.calls, scale)
        paths = []
        for name in PATHS:
            print(f"exchanging the capture over {name}", file=sys.stderr, flush=True)
            done = exchange(kvm, SwitchPath[name.upper()], sides, rounds=options.rounds)
            call = crossing.ways[_CALL_OF_PATH[name]]
            paths.append(
                {
                    "name": name,
                    "vm_exits_per_call": call.vm_exits,
                    "cost_per_call": call.samples.cost,
                    "cost_per_packet": done.ticks_per_packet * scale,
                    **done.as_dict(),
                }
            )
    return {
        "host": host_kind(),
        "unit": unit_of_host(host_kind()),
        "fingerprint": fingerprint(),
        "calls": options.calls,
        "rounds": options.rounds,
        "frames": sum(len(side) for side in sides),
        "paths": paths,
        "crossing": crossing.as_dict(),
    }


def table(record: dict[str, Any]) -> str:
    """Return the results as a table of text."""
    unit = record["unit"]
    heads = [
        "path",
        "VM exits/call",
        f"{unit}/call",
        "VM exits/packet",
        f"{unit}/packet",
        "sent",
        "delivered",
        "dropped",
        "corrupted",
    ]
    rows = [
        [
            path["name"],
            f"{path['vm_exits_per_call']:.3f}",
            f"{path['cost_per_call']:.0f}",
            f"{path['vm_exits_per_packet']:.4f}",
            f"{path['cost_per_packet']:.1f}",
            *(str(path[name]) for name in ("sent", "delivered", "dropped", "corrupted")),
        ]
        for path in record["paths"]
    ]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [heads, *rows]
    ]
    where = (
        "emulated Intel host: instructions are counted, which says nothing about time"
        if record["host"] == "emulated"
        else record["fingerprint"]["cpu"]
    )
    notes = [f"({where})", f"({extra_protections(record['crossing'])})"]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *notes])
