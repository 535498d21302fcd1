"""The host's side: memory, ports that come and go while others run, counters from outside."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import threading
import time

import pytest

from pykvm.switch import (
    PortBusyError,
    PortStateError,
    Switch,
    SwitchConfig,
    SwitchConfigError,
    SwitchCounters,
    SwitchMemoryError,
    read_counters,
)
from pykvm.switch._native import ffi, lib
from pykvm.switch.counters import NotASwitchError
from pykvm.switch.switch import AddressError, PinError, parse_address
from tests.rigs.switch.native_rig import BROADCAST, frame, make_rig
from tests.rigs.switch.single_step import single_steps
from tests.rigs.switch.variants import AS_BUILT

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ports": 1}, "2 to 64 ports"),
        ({"ports": 65}, "2 to 64 ports"),
        ({"lane_slots": 0}, "lane_slots is a power of two"),
        ({"lane_slots": 48}, "lane_slots is a power of two"),
        ({"lane_slots": 8192}, "up to 4096"),
        ({"tx_slots": 512}, "up to 256"),
        ({"frame_limit": 13}, "14 to 2040"),
        ({"frame_limit": 2041}, "14 to 2040"),
        ({"max_age": 0}, "1 to 50"),
        ({"max_age": 51}, "1 to 50"),
        ({"group_forward_mask": -1}, "has 16 bits"),
        ({"group_forward_mask": 0x10000}, "has 16 bits: change 0x10000"),
    ],
)
def test_switches_that_cannot_be(change: dict[str, int], message: str) -> None:
    with pytest.raises(SwitchConfigError, match=message):
        SwitchConfig(**change)


def test_geometry_is_what_the_window_says_of_itself() -> None:
    config = SwitchConfig(ports=5, lane_slots=16, tx_slots=8, frame_limit=900)
    rig = make_rig(config)
    info = ffi.cast("struct switch_window_info *", rig.switch.window(3))
    assert info.magic == lib.SWITCH_WINDOW_MAGIC
    assert (info.port, info.ports) == (3, 5)
    assert (info.tx_slots, info.lane_slots, info.frame_limit) == (8, 16, 900)
    assert info.lanes_offset == config.lane_offset(0) == config.tx_offset(8) == 0x3000 + 8 * 2048
    assert info.lane_bytes == config.lane_offset(1) - config.lane_offset(0) == 16 * 2048
    assert config.window_size % 4096 == 0
    assert config.lane_offset(5) <= config.window_size < config.lane_offset(5) + 4096
    assert config.windows_offset == 2 << 20
    assert config.total_size == config.windows_offset + 5 * config.window_size
    assert config.tx_length_offset(3) == 0x40C
    assert config.lane_head_offset(2) == 0x1100
    assert config.lane_tail_offset(2) == 0x1140


def test_buffers_that_cannot_hold_a_switch() -> None:
    config = SwitchConfig(lane_slots=4, tx_slots=4)
    with pytest.raises(SwitchMemoryError, match=r"allocate config\.total_size"):
        Switch(config, mmap.mmap(-1, config.total_size - 4096))
    memory = mmap.mmap(-1, config.total_size + 4096)
    with pytest.raises(SwitchMemoryError, match="aligned"):
        Switch(config, memoryview(memory)[8:])
    with pytest.raises(SwitchMemoryError, match=r"use config\.windows_offset"):
        Switch(config, memory, windows_offset=4096)


def test_ports_that_do_not_exist_or_are_enabled_already() -> None:
    rig = make_rig()
    for call in (rig.switch.enable, rig.switch.disable, rig.switch.window, rig.switch.native_env):
        for port in (-1, 2):
            with pytest.raises(PortStateError, match="this switch has 0 to 1"):
                call(port)
    with pytest.raises(PortStateError, match=r"disable\(1\) first"):
        rig.switch.enable(1)


def test_a_new_guest_sees_nothing_of_the_one_before() -> None:
    rig = make_rig(SwitchConfig(ports=3, lane_slots=8, tx_slots=8))
    rig.teach()
    secret = b"secret of the guest before"
    rig.ports[0].send([frame(1, 0) + secret] * 3)  # port 1 has not taken them
    rig.ports[1].send([frame(BROADCAST, 1) + secret])
    size = rig.switch.config.window_size
    assert secret in bytes(ffi.buffer(rig.switch.window(1), size))
    rig.switch.disable(1)
    rig.ports[0].send([frame(1, 0)])  # forgotten: flooded to port 2 only
    assert len(rig.ports[2].receive(0)) == 1
    rig.switch.enable(1)
    window = bytes(ffi.buffer(rig.switch.window(1), size))
    assert not any(window[ffi.sizeof("struct switch_window_info") :])
    assert rig.ports[1].receive_all() == []
    # Lanes to and from it work, and its old transmissions are still with their receivers.
    assert rig.ports[0].receive(1) == [frame(BROADCAST, 1) + secret]
    rig.ports[0].send([frame(1, 0, mark=8)])
    rig.ports[1].send([frame(0, 1, mark=9)])
    assert rig.ports[1].receive_all() == [frame(1, 0, mark=8)]
    assert rig.ports[0].receive_all() == [frame(0, 1, mark=9)]
    assert rig.switch.counters().check() == []
    assert rig.switch.counters().enabled == (0, 1, 2)


def test_enabling_waits_for_calls_that_could_still_write_to_the_window() -> None:
    rig = make_rig(SwitchConfig(ports=3, lane_slots=8, tx_slots=8))
    rig.teach()
    for slot in range(4):
        rig.ports[0].put(slot, frame(1, 0))
    steps = single_steps(AS_BUILT.address, lambda: AS_BUILT.serve(lib.SWITCH_OP_SEND, 0, 4, rig))
    for _ in range(150):  # port 0's call stops in the middle
        next(steps)
    rig.switch.disable(1)
    with pytest.raises(PortBusyError, match="port 0 has been inside") as busy:
        rig.switch.enable(1, timeout=0.02)
    assert busy.value.port == 0
    assert not rig.switch.is_enabled(1)
    for _ in steps:  # it goes on and delivers to the port's previous guest
        pass
    rig.switch.enable(1, timeout=0.02)
    assert rig.ports[1].receive_all() == []
    rig.ports[1].send([frame(0, 1)])
    rig.ports[0].send([frame(1, 0, mark=3)])
    assert rig.ports[1].receive_all() == [frame(1, 0, mark=3)]


def test_a_killed_guest_keeps_others_waiting_only_until_it_is_said_to_be_gone() -> None:
    rig = make_rig(SwitchConfig(ports=3, lane_slots=8, tx_slots=8))
    rig.teach()
    steps = single_steps(AS_BUILT.address, lambda: AS_BUILT.serve(lib.SWITCH_OP_SEND, 0, 4, rig))
    for _ in range(100):
        next(steps)
    steps.close()  # killed
    rig.switch.disable(1)
    with pytest.raises(PortBusyError, match="vcpu_gone=True"):
        rig.switch.enable(1, timeout=0)
    rig.switch.disable(0, vcpu_gone=True)
    rig.switch.enable(1, timeout=0)
    rig.switch.enable(0, timeout=0)
    rig.ports[1].send([frame(0, 1)])
    assert rig.ports[0].receive(1) == [frame(0, 1)]


def test_ports_come_and_go_while_others_send() -> None:
    rig = make_rig(SwitchConfig(ports=3, lane_slots=16, tx_slots=16))
    stop = threading.Event()
    failures: list[BaseException] = []

    def send(number: int) -> None:
        try:
            mark = 0
            while not stop.is_set():
                burst = [frame(2, number, mark=mark + n) for n in range(16)]
                rig.ports[number].send(burst)
                mark += 16
                rig.ports[number].receive_all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=send, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    received = 0
    try:
        for _ in range(100):
            rig.ports[2].send([frame(BROADCAST, 2)])
            for source in (0, 1):
                got = rig.ports[2].receive(source)
                marks = [int.from_bytes(one[14:18], "little") for one in got]
                assert marks == sorted(set(marks)), "nothing old, nothing twice"
                received += len(got)
            rig.switch.disable(2)
            rig.switch.enable(2)
            time.sleep(0.001)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert received > 100
    assert rig.switch.counters().check() == []


def _read_in_another_process(fd: int, sender: multiprocessing.connection.Connection) -> None:
    with mmap.mmap(fd, SwitchConfig().shared_size, prot=mmap.PROT_READ) as memory:
        sender.send(read_counters(memory))


def test_another_process_reads_the_counters_while_frames_flow() -> None:
    config = SwitchConfig(lane_slots=16, tx_slots=16)
    fd = os.memfd_create("switch")
    try:
        os.ftruncate(fd, config.total_size)
        switch = Switch(config, mmap.mmap(fd, config.total_size))
        for port in (0, 1):
            switch.enable(port)
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        env = switch.native_env(0)
        lib.switch_window_put(switch.window(0), 0, frame(1, 0), 64)
        assert lib.elisa_serve(lib.SWITCH_OP_SEND, 0, 1, env) == 1
        reader = context.Process(target=_read_in_another_process, args=(fd, theirs))
        reader.start()
        counters: SwitchCounters = ours.recv()
        reader.join()
        assert reader.exitcode == 0
        assert counters == switch.counters()
        assert counters.ports[0].unknown == 1
        assert counters.sent_to(1).delivered == counters.sent_by(0).delivered == 1
        assert counters.sent_to(1).bytes == 64
        assert counters.enabled == (0, 1)
    finally:
        os.close(fd)


def test_counters_of_memory_that_is_no_switch() -> None:
    with pytest.raises(NotASwitchError, match="map all of it"):
        read_counters(bytes(100))
    with pytest.raises(NotASwitchError, match="create one"):
        read_counters(bytes(SwitchConfig().shared_size))
    rig = make_rig()
    rig.memory[4] += 1
    with pytest.raises(NotASwitchError, match="the pykvm that made it"):
        read_counters(rig.memory)


def test_the_hypercall_entry_serves_the_guest_of_its_context() -> None:
    rig = make_rig()
    rig.teach()
    rig.ports[0].put(0, frame(1, 0))
    arguments = ffi.new("uint64_t[6]", [lib.SWITCH_OP_SEND, 0, 1, 0, 0, 0])
    assert rig.switch.hypercall(rig.switch.native_env(0), arguments) == 1
    assert rig.ports[1].receive(0) == [frame(1, 0)]
    refused = rig.switch.hypercall(rig.switch.native_env(1), arguments)
    assert ctypes.c_int64(refused).value == -lib.ELISA_EPERM


def test_addresses() -> None:
    assert parse_address("02:00:00:00:00:01") == 0x0100_0000_0002
    for text in ("", "02:00:00:00:00", "02:00:00:00:00:0g", "01:00:00:00:00:01", "0:0:0:0:0:0"):
        with pytest.raises(AddressError, match="six octets like"):
            parse_address(text)


def test_a_line_of_the_table_full_of_pinned_addresses() -> None:
    rig = make_rig()
    numbers = iter(range(1, 5000))

    def pin_many() -> None:
        for number in numbers:
            rig.switch.pin(f"02:00:00:00:{number >> 8:02x}:{number & 255:02x}", 1)

    with pytest.raises(PinError, match="unpin another"):
        pin_many()
    assert next(numbers) > 500
    rig.ports[0].send([frame(1, 0)])
    assert rig.ports[1].receive(0) == [frame(1, 0)]
