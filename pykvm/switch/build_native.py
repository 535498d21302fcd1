"""Build the cffi extension ``pykvm.switch._native``; setup.py names ``ffibuilder``.

The switch is compiled from the source that also runs in the sub context. Struct layouts and
constants are asked from the C compiler: the declarations below end in ``...``.
"""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

CONSTANTS = (
    "SWITCH_MAX_PORTS",
    "SWITCH_MAX_BURST",
    "SWITCH_MAX_TX_SLOTS",
    "SWITCH_MAX_LANE_SLOTS",
    "SWITCH_SLOT_BYTES",
    "SWITCH_MIN_FRAME",
    "SWITCH_DEFAULT_FRAME",
    "SWITCH_TAG_BYTES",
    "SWITCH_MAX_TAGS",
    "SWITCH_MAX_FRAME",
    "SWITCH_OP_SEND",
    "SWITCH_WAIT",
    "SWITCH_WINDOW_MAGIC",
    "SWITCH_SHARED_MAGIC",
    "SWITCH_VERSION",
    "SWITCH_MAX_AGE",
    "SWITCH_TABLE_SHARE",
    "SWITCH_ANY_VLAN",
    "ELISA_EPERM",
    "ELISA_EINVAL",
    "ELISA_ENETDOWN",
)

STRUCTS = """
struct elisa_env {
    uint64_t shared, shared_size, windows, window_size; uint32_t id, guests, vcpu, vcpus;
    ...; };
struct switch_window_info {
    uint32_t magic, version, port, ports, tx_slots, lane_slots, frame_limit;
    uint64_t lanes_offset, lane_bytes; ...; };
struct switch_lane_control { uint32_t head; uint32_t tail; ...; };
struct switch_slot { uint32_t length; uint8_t frame[...]; ...; };
struct switch_window {
    uint32_t tx_length[...]; struct switch_lane_control lane[...]; ...; };
struct switch_port {
    uint64_t sequence, calls, frames, bytes, unicast, broadcast, multicast, unknown, copies,
        too_short, too_long, same_port, no_receiver, spoofed, bad_source, link_local, waited,
        cut, lost, not_learned, foreign_port, bad_request, port_down; ...; };
struct switch_lane { uint64_t delivered, bytes, full, bad_tail, start; ...; };
struct switch_shared {
    uint32_t magic, version, ports, tx_slots, lane_slots, frame_limit, max_age,
        group_forward_mask;
    uint64_t hash_seed, enabled, epoch, pins;
    struct switch_port port[...]; uint64_t table[...][...]; struct switch_lane lane[...][...];
    ...; };
"""

FUNCTIONS = """
uint64_t elisa_serve(uint64_t a0, uint64_t a1, uint64_t a2, const struct elisa_env *env);
uint64_t switch_station(const struct switch_shared *shared, uint64_t address, uint32_t vlan);
uint32_t switch_station_line(uint64_t station);
uint64_t switch_station_rest(uint64_t station);
uint64_t switch_tx_offset(uint32_t slot);
uint64_t switch_lane_offset(uint32_t tx_slots, uint32_t lane_slots, uint32_t source);
uint64_t switch_window_size(uint32_t ports, uint32_t tx_slots, uint32_t lane_slots);
"""

# Relative to the directory of setup.py, as setuptools wants them.
SOURCES = ["guest/switch/switch.c", "pykvm/switch/admin.c"]
INCLUDE_DIRS = ["guest/include", "pykvm/switch"]

# As for the sub context, so that instruction counts of the tests hold there too.
COMPILE_ARGS = [
    "-O2",
    "-fPIC",
    "-fno-stack-protector",
    "-fcf-protection=none",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-missing-field-initializers",
]


def _declarations() -> str:
    """Declare constants, structs, and the functions of both headers for cffi."""
    admin = (HERE / "admin.h").read_text()
    admin = re.sub(r"/\*.*?\*/", "", admin, flags=re.DOTALL)
    constants = "".join(f"#define {name} ...\n" for name in CONSTANTS)
    return constants + STRUCTS + FUNCTIONS + admin


ffibuilder = FFI()
ffibuilder.cdef(_declarations())
ffibuilder.set_source(
    "pykvm.switch._native",
    '#include "elisa_object.h"\n#include "switch.h"\n#include "admin.h"\n',
    sources=SOURCES,
    include_dirs=INCLUDE_DIRS,
    depends=[
        "guest/include/elisa_memory.h",
        "guest/include/elisa_object.h",
        "guest/include/switch.h",
        "pykvm/switch/admin.h",
    ],
    extra_compile_args=COMPILE_ARGS,
)
