"""Measure the crossing, its protections, the switch or interrupts; keep raw samples, draw."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final

from pykvm.cli.hosts import on_suitable_host, ticks_scale
from pykvm.cli.kept import keep_charts
from pykvm.errors import PykvmError
from pykvm.host.emulation import host_kind, is_emulated
from pykvm.measure.charts import draw_crossing, draw_interrupts, draw_protections, draw_switch
from pykvm.measure.fingerprint import fingerprint
from pykvm.measure.records import extra_protections, unit_of_host
from pykvm.testbed.bochs import MEMORIES

__all__ = ["add_parser"]

_PATHS: Final = ("vmfunc", "vmcall", "direct")
_STEPS: Final = {"attach first": "attach, 1st", "attach last": "attach, 64th"}


def add_parser(subparsers: Any) -> None:
    """Add `pykvm bench` to the command line."""
    parser = subparsers.add_parser("bench", help=(__doc__ or "").splitlines()[0].rstrip("."))
    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", required=True)

    crossing = kinds.add_parser("crossing", help="one empty call, by each way")
    _add_json(crossing, "crossing")
    crossing.add_argument("--calls", type=int, default=1000, metavar="N", help="default 1000")
    crossing.set_defaults(run=run_crossing)

    protections = kinds.add_parser(
        "protections", help="one empty call with all protections, and without each"
    )
    _add_json(protections, "protections")
    protections.add_argument("--calls", type=int, default=200, metavar="N", help="default 200")
    protections.set_defaults(run=run_protections)

    attach = kinds.add_parser("attach", help="what attach, detach and revoke cost the host")
    attach.add_argument(
        "--json",
        type=Path,
        default=Path("build/bench/attach.json"),
        metavar="FILE",
        help="where to keep the record (default build/bench/attach.json)",
    )
    attach.add_argument("--repeats", type=int, default=4, metavar="N", help="default 4")
    attach.add_argument(
        "--sizes",
        type=_numbers,
        default=[1, 64, 512],
        metavar="MIB,MIB",
        help="memory of the objects (default 1,64,512)",
    )
    attach.set_defaults(run=run_attach)

    switch = kinds.add_parser("switch", help="a packet through the switch, by each path")
    _add_json(switch, "switch")
    switch.add_argument(
        "--sizes", type=_numbers, metavar="LIST", help="frame bytes (default 64,128,...,1514)"
    )
    switch.add_argument(
        "--bursts",
        type=_numbers,
        metavar="LIST",
        help="frames of one call (default 1,8,32,128,256)",
    )
    switch.add_argument(
        "--guests", type=_numbers, default=[2, 4, 8], metavar="LIST", help="default 2,4,8"
    )
    switch.add_argument("--repeats", type=int, default=8, metavar="N", help="bursts (default 8)")
    switch.set_defaults(run=run_switch)

    interrupts = kinds.add_parser("interrupts", help="what an interrupt inside an object waits for")
    _add_json(interrupts, "interrupts")
    interrupts.add_argument(
        "--count", type=int, default=50, metavar="N", help="of each kind (default 50)"
    )
    interrupts.add_argument(
        "--left",
        type=_numbers,
        metavar="LIST",
        help="ticks of work left when it comes (default 0,1000,10000,100000)",
    )
    interrupts.set_defaults(run=run_interrupts)


def _add_json(parser: argparse.ArgumentParser, kind: str) -> None:
    default = Path(f"build/bench/{kind}.json")
    parser.add_argument(
        "--json",
        type=Path,
        default=default,
        metavar="FILE",
        help=f"where to keep the record (default {default}); the chart goes beside it",
    )


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers like 64,1514") from None


def run_crossing(options: argparse.Namespace) -> int:
    """Run `pykvm bench crossing`; return the exit status."""
    _require("--calls", [options.calls], 1, 100_000)

    def measure() -> dict[str, Any]:
        from pykvm.kvm import Kvm  # noqa: PLC0415
        from pykvm.measure.crossing_cost import measure_crossing  # noqa: PLC0415

        with Kvm() as kvm:
            crossing = measure_crossing(kvm, options.calls, ticks_scale(kvm))
        return {**_head(), "calls": options.calls, **crossing.as_dict()}

    arguments = ["bench", "crossing", "--calls", str(options.calls)]
    record = on_suitable_host(measure, arguments, files={}, out=options.json)
    if not is_emulated():
        for name in ("vmfunc", "vmcall_kernel", "vmcall_user", "direct"):
            way = record[name]
            print(
                f"{name:14} {way['cost']:8.0f} {record['unit']}  "
                f"{way['vm_exits']:.3f} VM exits  {way['vmfuncs']} VMFUNCs"
            )
        print(extra_protections(record))
        keep_charts(options.json, partial(draw_crossing, record))
    return 0


def run_protections(options: argparse.Namespace) -> int:
    """Run `pykvm bench protections`; return the exit status."""
    _require("--calls", [options.calls], 1, 100_000)

    def measure() -> dict[str, Any]:
        from pykvm.kvm import Kvm  # noqa: PLC0415
        from pykvm.measure.protection_cost import measure_protections  # noqa: PLC0415

        with Kvm() as kvm:
            measured = measure_protections(kvm, options.calls, ticks_scale(kvm))
        return {**_head(), "calls": options.calls, **measured.as_dict()}

    arguments = ["bench", "protections", "--calls", str(options.calls)]
    record = on_suitable_host(measure, arguments, files={}, out=options.json)
    if not is_emulated():
        unit = record["unit"]
        for mode in ("kernel", "user"):
            print(f"{record[mode]['cost']:8.0f} {unit} for a call from {mode} mode")
        for one in record["protections"]:
            part = "more on" if one["for_weak_processors"] else "of them for"
            print(
                f"{one['cost']:8.0f} {part} {one['what']}, {one['mode']} mode"
                f" ({one['ratio']:.2f}x){'' if one['optional'] else ', not optional'}"
            )
        keep_charts(options.json, partial(draw_protections, record))
    return 0


def run_attach(options: argparse.Namespace) -> int:
    """Run `pykvm bench attach`; return the exit status."""
    _require("--repeats", [options.repeats], 1, 10_000)
    _require("--sizes", options.sizes, 1, 32 << 10)

    def measure() -> dict[str, Any]:
        from pykvm.kvm import Kvm  # noqa: PLC0415
        from pykvm.measure.attach import measure_attach  # noqa: PLC0415

        objects = []
        with Kvm() as kvm:
            for size in options.sizes:
                print(f"an object of {size} MiB", file=sys.stderr, flush=True)
                objects.append(measure_attach(kvm, size, options.repeats, ticks_scale(kvm)))
        return {
            **_head(),
            "repeats": options.repeats,
            "objects": [measured.as_dict() for measured in objects],
        }

    sizes = ",".join(map(str, options.sizes))
    arguments = ["bench", "attach", "--repeats", str(options.repeats), "--sizes", sizes]
    # The largest object, and as much for everything else.
    memory = next((m for m in MEMORIES if m >= 2 * max(options.sizes)), MEMORIES[-1])
    record = on_suitable_host(measure, arguments, files={}, out=options.json, memory=memory)
    if not is_emulated():
        _print_attach(record)
        print(f"kept: {options.json}")
    return 0


def _print_attach(record: dict[str, Any]) -> None:
    unit = record["unit"]
    print(f"Costs for the host in {unit}, with Python; pages as charged to RLIMIT_MEMLOCK.")
    print(f"{'':24}" + "".join(f"{one['mib']:>10} MiB" for one in record["objects"]))
    for name in ("register", "attach first", "attach last", "detach", "revoke"):
        costs = "".join(f"{one[name]['cost']:14,.0f}" for one in record["objects"])
        print(f"{_STEPS.get(name, name):24}{costs}")
    for label, pages in (
        ("pages, registered", [one["registered"]["charged"] for one in record["objects"]]),
        ("pages, attach, 1st", [one["pages"]["charged"][0] for one in record["objects"]]),
        ("pages, attach, 64th", [one["pages"]["charged"][-1] for one in record["objects"]]),
        ("huge pages of 2 MiB", [one["registered"]["large"] for one in record["objects"]]),
    ):
        print(f"{label:24}" + "".join(f"{number:14,}" for number in pages))


def run_switch(options: argparse.Namespace) -> int:
    """Run `pykvm bench switch`; return the exit status."""
    from pykvm.measure.bursts import BURSTS, SIZES  # noqa: PLC0415

    sizes, bursts = options.sizes or SIZES, options.bursts or BURSTS
    _require("--sizes", sizes, 14, 1514)
    _require("--bursts", bursts, 1, 256)
    _require("--guests", options.guests, 2, 8)
    _require("--repeats", [options.repeats], 1, 1000)

    def measure() -> dict[str, Any]:
        from pykvm.kvm import Kvm  # noqa: PLC0415
        from pykvm.measure.bursts import measure_bursts  # noqa: PLC0415
        from pykvm.measure.programs import SwitchPath  # noqa: PLC0415

        points = []
        with Kvm() as kvm:
            scale = ticks_scale(kvm)
            for guests in options.guests:
                for name in _PATHS:
                    print(f"{guests} guests over {name}", file=sys.stderr, flush=True)
                    points += measure_bursts(
                        kvm,
                        SwitchPath[name.upper()],
                        guests,
                        scale,
                        sizes=sizes,
                        bursts=bursts,
                        repeats=options.repeats,
                    )
        return {**_head(), "points": [point.as_dict() for point in points]}

    arguments = ["bench", "switch", "--repeats", str(options.repeats)]
    for option, numbers in (
        ("--sizes", sizes),
        ("--bursts", bursts),
        ("--guests", options.guests),
    ):
        arguments += [option, ",".join(map(str, numbers))]
    record = on_suitable_host(measure, arguments, files={}, out=options.json)
    if not is_emulated():
        _print_points(record)
        keep_charts(options.json, partial(draw_switch, record))
    return 0


def run_interrupts(options: argparse.Namespace) -> int:
    """Run `pykvm bench interrupts`; return the exit status."""
    from pykvm.measure.interrupts import LEFT  # noqa: PLC0415

    left = options.left or LEFT
    _require("--count", [options.count], 1, 1000)
    _require("--left", left, 0, 100_000_000)

    def measure() -> dict[str, Any]:
        from pykvm.kvm import Kvm  # noqa: PLC0415
        from pykvm.measure.interrupts import measure_interrupts  # noqa: PLC0415

        with Kvm() as kvm:
            points = measure_interrupts(kvm, options.count, ticks_scale(kvm), left)
        return {**_head(), "count": options.count, "points": [one.as_dict() for one in points]}

    arguments = ["bench", "interrupts", "--count", str(options.count)]
    arguments += ["--left", ",".join(map(str, left))]
    record = on_suitable_host(measure, arguments, files={}, out=options.json)
    if not is_emulated():
        _print_latencies(record)
        keep_charts(options.json, partial(draw_interrupts, record))
    return 0


def _require(option: str, numbers: list[int] | tuple[int, ...], low: int, high: int) -> None:
    for number in numbers:
        if not low <= number <= high:
            raise PykvmError(f"{option} {number} is out of range", f"use {low} to {high}")


def _head() -> dict[str, Any]:
    return {
        "host": host_kind(),
        "unit": unit_of_host(host_kind()),
        "fingerprint": fingerprint(),
    }


def _print_points(record: dict[str, Any]) -> None:
    """Print a line for each number of guests, size and burst, with a column for each path."""
    costs = {
        (point["guests"], point["size"], point["burst"], point["path"]): point["cost_per_packet"]
        for point in record["points"]
    }
    print(f"{record['unit']} per packet, sender's side")
    print(f"{'guests':>6} {'bytes':>6} {'burst':>6}" + "".join(f"{name:>10}" for name in _PATHS))
    for guests, size, burst in dict.fromkeys(key[:3] for key in costs):
        cells = "".join(f"{costs[guests, size, burst, name]:10.1f}" for name in _PATHS)
        print(f"{guests:>6} {size:>6} {burst:>6}{cells}")


def _print_latencies(record: dict[str, Any]) -> None:
    """Print a line for each amount of work: both latencies, and the delay after the work's end."""
    points = {(point["left"], point["way"]): point for point in record["points"]}
    print(f"{record['unit']} from the deadline to the handler, median")
    print(f"{'left':>10} {'default':>10} {'object':>10} {'behind':>10}  taken at the return")
    for left in dict.fromkeys(left for left, _ in points):
        default, inside = points[left, "default"], points[left, "object"]
        behind = f"{inside['behind']['median']:10.0f}" if inside["behind"] else " " * 10
        print(
            f"{left:>10} {default['median']:10.0f} {inside['median']:10.0f} {behind}"
            f"  {inside['at_return']} of {len(inside['samples'])}"
        )
