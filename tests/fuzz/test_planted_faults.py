"""The fuzzers find planted faults."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest

from tests.rigs.fuzz.target import Plant
from tests.rigs.fuzz.targets import TARGETS

pytestmark = pytest.mark.unit

SECONDS: Final = 120  # at most: most are found in the first, by an idle processor

SERIAL = "devices/serial.c"
SEGMENTS = "machine/linux/segments.py"
FUNCTION, BUS, PORTS = "devices/pci/function.py", "devices/pci/bus.py", "devices/pci/ports.py"
VIRTIO, MSIX = "devices/virtio/pci.py", "devices/pci/msix.py"
STATE = "devices/virtio/pci_state.py"
CONFIG, NETWORK = "machine/linux/config.py", "network/specification.py"
SERVER = "control/server.py"
MESSAGES = "devices/virtio/vhost_user_messages.py"
CONNECTION = "devices/virtio/vhost_user_connection.py"
WATCH = "devices/virtio/vhost_user_watch.py"

FAULTS: Final = {
    "serial": {
        "input beyond its end": Plant(
            SERIAL, "if (serial->in_count == SERIAL_INPUT) {", "if (0) {"
        ),
        "an access beyond its ports": Plant(
            SERIAL, "(at + i % access->size) % SERIAL_PORTS;", "at + i % access->size;"
        ),
        "words sent as bytes": Plant(SERIAL, "access->size == 1 && at == DATA", "at == DATA"),
        "more of the tail than asked for": Plant(
            SERIAL,
            "n = serial->tail_count < size ? serial->tail_count : size;\n\tfirst",
            "n = serial->tail_count;\n\tfirst",
        ),
        "input though nobody listens": Plant(
            SERIAL, "if (!(serial->ier & IER_RECEIVED))\n\t\tn = 0;", ""
        ),
        "an interrupt that is not enabled": Plant(
            SERIAL, "if (serial->sent && (serial->ier & IER_SENT))", "if (serial->sent)"
        ),
        "a lost byte that nobody hears of": Plant(SERIAL, "serial->overrun = LSR_OVERRUN;", ""),
        "a snapshot with more input than there is room for": Plant(
            SERIAL, "if (state->count > SERIAL_INPUT || ", "if ("
        ),
        "a snapshot without the divisor": Plant(
            SERIAL, "\tserial->divisor = state->divisor;\n", ""
        ),
        "the loop on the line": Plant(
            SERIAL, "if (serial->mcr & MCR_LOOP) {\n\t\tfor", "if (0) {\n\t\tfor"
        ),
    },
    "kernel-files": {
        "more of the boot header than there is room for": Plant(
            "machine/linux/bzimage.py",
            "end = min(_SIGNATURE + self._head[_HEADER_END], HEADER_SIZE)",
            "end = _SIGNATURE + self._head[_HEADER_END]",
        ),
        "a payload beyond the file": Plant(
            "machine/linux/bzimage.py", "if offset + length > self._size or", "if"
        ),
        "a segment over the machine's tables": Plant(
            SEGMENTS, "if one.physical < layout.FIRST_MEGABYTE:", "if False:"
        ),
        "a segment beyond the file": Plant(SEGMENTS, " or one.offset + one.file_size > size:", ":"),
        "more in the file than in memory": Plant(
            SEGMENTS, "if one.file_size > one.memory_size or", "if"
        ),
        "an entry point outside": Plant(
            "machine/linux/elf_kernel.py", "        require_entry(entry, self._loads, name)\n", ""
        ),
        "headers beyond the file": Plant(
            SEGMENTS, "if offset + size > os.fstat(descriptor).st_size:", "if False:"
        ),
        "addresses before the file": Plant(
            "machine/linux/multiboot.py", "if not 0 <= offset <= header.at or", "if"
        ),
        "a packed kernel that ends early": Plant(
            "machine/linux/compression.py", "OSError, EOFError, gzip.BadGzipFile", "OSError"
        ),
    },
    "pci": {
        "read-only registers written": Plant(
            FUNCTION, "self._config[at] & ~mask | value & mask", "value"
        ),
        "beyond the end of a BAR": Plant(
            BUS, "gpa + size <= bar.gpa + bar.size", "gpa < bar.gpa + bar.size"
        ),
        "a BAR while memory is off": Plant(
            FUNCTION, "register & -bar.size if enabled else None", "register & -bar.size"
        ),
        "fewer bytes than were asked for": Plant(
            FUNCTION,
            'self._config[offset : offset + size]).ljust(size, b"\\0")',
            "self._config[offset : offset + size])",
        ),
        "a device that is not there": Plant(
            BUS, "device >= len(self._functions)", "device > len(self._functions)"
        ),
        "a function that is not there": Plant(BUS, "if number or device", "if device"),
        "the command register without effect": Plant(
            FUNCTION, "if offset < _COMMAND + 2 or (", "if ("
        ),
        "across the end of the window": Plant(
            PORTS, "_DATA <= port <= _DATA + 4 - size", "_DATA <= port"
        ),
        "another bus": Plant(PORTS, "or address & _BUS or", "or"),
        "reserved bits of the address": Plant(PORTS, " & (_ENABLE | 0xFF_FFFC)", ""),
    },
    "virtio-pci": {
        "features that were not offered": Plant(
            VIRTIO, "not features & ~self._offered and bool(", "bool("
        ),
        "a driver of the old kind": Plant(VIRTIO, " and bool(features & Feature.VERSION_1)", ""),
        "features changed when they are agreed on": Plant(
            VIRTIO, "if not registers.status & Status.FEATURES_OK:", "if True:"
        ),
        "a queue of any size": Plant(VIRTIO, "if 1 <= value <= queue.most:", "if value <= 0x8000:"),
        "a split ring of any size": Plant(
            VIRTIO, "queue.enabled and queue.size & queue.size - 1", "0"
        ),
        "a vector that is not there": Plant(
            VIRTIO,
            "queue.vector = value if value < self.msix.count else NO_VECTOR",
            "queue.vector = value",
        ),
        "started twice": Plant(
            VIRTIO, "if added & Status.DRIVER_OK", "if value & Status.DRIVER_OK"
        ),
        "a reset that stops nothing": Plant(
            VIRTIO,
            "        self.device.stop()\n        self._started = self._failed",
            "        self._started = self._failed",
        ),
        "notifications where the BAR was": Plant(
            VIRTIO,
            "                self._vm.unregister_ioevent(queue.kick, queue.ioevent_at, 0)\n"
            "                queue.ioevent_at = None\n            if bar",
            "                queue.ioevent_at = None\n            if bar",
        ),
        "interrupts while all are masked": Plant(
            MSIX, "not (word & _MASK_ALL or control & _MASKED)", "not control & _MASKED"
        ),
        "a window to no BAR": Plant(VIRTIO, "if bar >= len(self.bars) or size", "if size"),
        "beyond the table of vectors": Plant(
            MSIX, "end = min(offset + len(data), len(self._table))", "end = offset + len(data)"
        ),
    },
    "device-state": {
        "started before its driver is ready": Plant(
            VIRTIO,
            "if started and not (agreed and registers.status & Status.DRIVER_OK):",
            "if False:",
        ),
        "features that are not offered": Plant(
            VIRTIO,
            "if agreed and not self._suits(registers.driver_features):",
            "if False:",
        ),
        "a queue of any size": Plant(VIRTIO, "if not 1 <= queue.size <= queue.most:", "if False:"),
        "a vector that is not there": Plant(
            VIRTIO, "if vector >= self.msix.count and vector != NO_VECTOR:", "if False:"
        ),
        "an interrupt that is not there": Plant(
            MSIX, "type(one) is int and 0 <= one < self.count for", "type(one) is int for"
        ),
        "another device's identity": Plant(
            FUNCTION, "if any((new ^ old) & ~mask for", "if any(0 for"
        ),
        "registers of too many bits": Plant(STATE, " or not 0 <= value < 1 << width:", ":"),
        "a ring's place of any size": Plant(
            STATE, "if not 0 <= pair[0] < queues or not 0 <= pair[1] < 1 << 32:", "if False:"
        ),
    },
    "configuration": {
        "lists without end": Plant(CONFIG, "except RecursionError as", "except KeyError as"),
        "a zero byte": Plant(CONFIG, 'if "\\0" in value:', "if False:"),
        "a path that ends as with a mode": Plant(
            CONFIG, "if _with_mode(path, default) == (path, mode) else", "if mode == default else"
        ),
        "a part of a page": Plant(CONFIG, " or self.memory % PAGE_SIZE:", ":"),
        "a value of another kind": Plant(
            CONFIG, "            except TypeError:\n", "            except KeyError:\n"
        ),
        "any number of queues": Plant(NETWORK, " or not low <= int(text) <= high:", ":"),
        "a port that is not there": Plant(
            NETWORK, "if not all(0 < port < 65536 for port in ports):", "if False:"
        ),
        "another key": Plant(CONFIG, "if key not in _KEYS:", "if False:"),
    },
    "control": {
        "brackets without end": Plant(SERVER, "(ValueError, RecursionError)", "ValueError"),
        "a line without end": Plant(SERVER, "if len(buffered) > LONGEST_LINE:", "if False:"),
        "a request that is no object": Plant(SERVER, "if not isinstance(request, dict) or", "if"),
        "a command that is no text": Plant(
            SERVER, 'not isinstance(request.get("command"), str)', '"command" not in request'
        ),
        "an argument of another kind": Plant(
            SERVER, "except Exception as error:", "except (LookupError, ValueError) as error:"
        ),
        "a connection left open": Plant(
            SERVER,
            "        finally:\n            self._drop(client)",
            "        finally:\n            pass",
        ),
        "only the first of several requests": Plant(
            SERVER,
            'line, _, buffered = buffered.partition(b"\\n")',
            'line, buffered = buffered.partition(b"\\n")[0], b""',
        ),
    },
    "vhost-user": {
        "flags that nobody knows": Plant(MESSAGES, " or flags & ~_KNOWN_FLAGS:", ":"),
        "a message of any size": Plant(MESSAGES, "if size > LONGEST_REPLY:", "if size > 1 << 31:"),
        "a reply to another request": Plant(CONNECTION, "if header.code != code or not", "if not"),
        "a request in place of a reply": Plant(CONNECTION, " or not header.is_reply:", ":"),
        "a reply about another ring": Plant(MESSAGES, "if about != index:", "if False:"),
        "other bytes of the configuration": Plant(
            MESSAGES, "if (at, length) != (offset, size):", "if False:"
        ),
        "a payload of any size": Plant(MESSAGES, "if len(payload) != size:", "if False:"),
        "on after an error": Plant(CONNECTION, "if self._broken is not None:", "if False:"),
        "a refusal as a success": Plant(CONNECTION, "        if status:\n", "        if False:\n"),
        "a reply on the back end's channel": Plant(WATCH, "if header.is_reply:", "if False:"),
        "a request without its answer": Plant(WATCH, "if header.need_reply:", "if False:"),
        "a payload that stays": Plant(WATCH, '_rest(channel, b"", header.size)\n', "pass\n"),
    },
}
"""By target and by name."""


# All of them are tried by PYKVM_ALL_FAULTS=1, two of each target here.
_MOST: Final = None if os.environ.get("PYKVM_ALL_FAULTS") else 1


@pytest.mark.parametrize(
    ("name", "fault"),
    [(name, fault) for name, faults in FAULTS.items() for fault in list(faults)[:_MOST]],
)
def test_a_planted_fault_is_found(name: str, fault: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    if missing := target.missing():
        pytest.skip(missing)
    fuzzer = target.fuzzer(tmp_path, FAULTS[name][fault])
    outcome = fuzzer.run(SECONDS, inputs=target.inputs())
    assert outcome.finding, f"not found in {outcome.executions} executions"
    print(f"{name}, {fault}: {outcome.executions} executions, {outcome.finding}")
