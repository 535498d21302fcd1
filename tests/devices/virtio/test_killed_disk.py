"""A monitor that is killed at any moment: what a flush has acknowledged is in the file."""

from __future__ import annotations

import os
import random
import signal
import struct
import time
from pathlib import Path
from typing import NoReturn

import pytest

from pykvm.devices.virtio.block import Block, DiskFile
from pykvm.sizes import MIB
from tests.rigs.virtio_disk import DiskDriver
from tests.rigs.virtio_driver import RING_FEATURES

pytestmark = pytest.mark.unit

ROUNDS = 100
SLOTS = 64
BYTES = 16_384
"""Of a slot, each 64-bit word of which holds the number of its last write."""


def _write_until_killed(path: Path, features: int, start: int, acknowledged: int) -> NoReturn:
    """Write slots in batches with a flush behind each; tell of those that a flush has covered."""
    try:
        pick = random.Random(start)
        driver = DiskDriver([64], features | 1 << 9)
        driver.start(Block(driver.memory, DiskFile(path), threads=4))
        number = start
        while True:
            batch = []
            for slot in pick.sample(range(SLOTS), pick.randint(1, 8)):
                number += 1
                driver.begin_write(slot * BYTES // 512, struct.pack("<Q", number) * (BYTES // 8))
                batch.append(struct.pack("<QQ", slot, number))
            flush = driver.begin_flush()
            driver.kick(0)
            while flush not in driver.completed(0):
                pass
            os.write(acknowledged, b"".join(batch))
    finally:
        os._exit(1)


def test_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(2 * MIB)
    pick = random.Random(9)
    durable = dict.fromkeys(range(SLOTS), 0)
    highest = flushed = 0
    for n in range(ROUNDS):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _write_until_killed(path, RING_FEATURES[n % len(RING_FEATURES)], highest, writer)
        os.close(writer)
        first = os.read(reader, 16)  # it has begun
        time.sleep(pick.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it was not killed: it failed"
        told = first
        while part := os.read(reader, 1 << 16):
            told += part
        os.close(reader)
        for slot, number in struct.iter_unpack("<QQ", told[: len(told) // 16 * 16]):
            durable[slot] = max(durable[slot], number)
            flushed += 1
        content = path.read_bytes()
        for slot, least in durable.items():
            words = struct.unpack_from(f"<{BYTES // 8}Q", content, slot * BYTES)
            assert min(words) >= least, f"round {n}: slot {slot} has lost write {least}"
            highest = max(highest, *words)
        highest = max(highest, *durable.values())
    assert flushed > 10 * ROUNDS
    assert path.stat().st_size == 2 * MIB
