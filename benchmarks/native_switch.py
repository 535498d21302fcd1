"""Measure what the switch itself costs a sender on this processor, without any crossing.

    .venv/bin/python benchmarks/native_switch.py [--json FILE] [--samples N]

The native build sends bursts from port 0 to port 1, whose receiver only gives the slots back, so
that the figures are the sender's. The loop is C. One sample is the mean of enough calls to make
clock readings negligible; the table shows the median of all samples, the record holds them all.
"""

from __future__ import annotations

import argparse
import importlib.util
import mmap
import sys
import tempfile
from pathlib import Path
from typing import Any

from cffi import FFI

from pykvm.errors import PykvmError
from pykvm.measure.fingerprint import fingerprint
from pykvm.measure.records import Samples, require_writable, write_record
from pykvm.resources import GUEST_SOURCES
from pykvm.switch import NativePort, Switch, SwitchConfig
from pykvm.switch._native import ffi
from pykvm.switch.build_native import COMPILE_ARGS

LOOP = Path(__file__).resolve().with_name("native_switch.c")
SIZES = (64, 128, 256, 512, 1024, 1514)
BURSTS = (1, 8, 32, 128, 256)
PACKETS_PER_SAMPLE = 8192
STATIONS = (b"\x02\0\0\0\0\x01", b"\x02\0\0\0\0\x02")


def build_loop(directory: Path) -> Any:
    """Compile native_switch.c together with the switch; return the extension module."""
    builder = FFI()
    builder.cdef(
        "uint64_t native_switch_measure(const void *env, uint32_t receiver, uint32_t burst,"
        " uint32_t calls);"
    )
    builder.set_source(
        "_native_switch",
        "uint64_t native_switch_measure(const void *env, uint32_t receiver, uint32_t burst,"
        " uint32_t calls);",
        sources=[str(LOOP), str(GUEST_SOURCES / "switch/switch.c")],
        include_dirs=[str(GUEST_SOURCES / "include")],
        extra_compile_args=COMPILE_ARGS,
    )
    library = builder.compile(tmpdir=str(directory))
    spec = importlib.util.spec_from_file_location("_native_switch", library)
    if spec is None or spec.loader is None:
        raise PykvmError(f"cannot load {library}", "check the compiler's messages")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(loop: Any, size: int, burst: int, samples: int) -> Samples:
    """Return samples of `PACKETS_PER_SAMPLE` packets each; the unit is ns for that many packets."""
    config = SwitchConfig()
    switch = Switch(config, mmap.mmap(-1, config.total_size))
    ports = [NativePort(switch, number) for number in range(2)]
    for port in ports:
        switch.enable(port.number)
    for number in (1, 0):
        header = STATIONS[1 - number] + STATIONS[number] + b"\x88\xb5"
        frame = header + bytes(size - len(header))
        for slot in range(config.tx_slots):
            ports[number].put(slot, frame)
        ports[number].send([frame])
        ports[1 - number].receive(number)
    calls = PACKETS_PER_SAMPLE // burst
    env = loop.ffi.cast("void *", int(ffi.cast("uintptr_t", switch.native_env(0))))
    values = []
    for _ in range(samples + 1):
        took = loop.lib.native_switch_measure(env, 1, burst, calls)
        if took == 0:
            raise PykvmError("frames were lost on the way", "run the tests first")
        values.append(int(took))
    return Samples(values[1:], scale=1 / PACKETS_PER_SAMPLE)  # the first one warms the caches


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="write the record with all raw samples here")
    parser.add_argument("--samples", type=int, default=21, help="per row (default: 21)")
    options = parser.parse_args(arguments)
    if not 1 <= options.samples <= 10_000:
        raise PykvmError(f"--samples {options.samples} is out of range", "use 1 to 10000")
    if options.json:
        require_writable(options.json)
    rows = []
    print(f"{'bytes':>6} {'burst':>6} {'ns/packet':>10} {'min':>8} {'max':>8}")
    with tempfile.TemporaryDirectory() as directory:
        loop = build_loop(Path(directory))
        for size in SIZES:
            for burst in BURSTS:
                row = measure(loop, size, burst, options.samples).as_dict()
                least = min(row["samples"])
                rows.append({"size": size, "burst": burst, "ns_per_packet": row})
                print(f"{size:6} {burst:6} {row['median']:10.1f} {least:8.1f} {row['max']:8.1f}")
    if options.json:
        record = {
            "benchmark": "native_switch",
            "unit": "ns",
            "fingerprint": fingerprint(),
            "packets_per_sample": PACKETS_PER_SAMPLE,
            "rows": rows,
        }
        write_record(options.json, record)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PykvmError as error:
        print(f"native_switch: {error}", file=sys.stderr)
        sys.exit(1)
