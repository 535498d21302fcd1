"""The fuzzers of virtio find planted faults, and none in the sources as they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.rigs.fuzz.native import missing_tools
from tests.rigs.fuzz.target import Plant
from tests.rigs.fuzz.targets import TARGETS

pytestmark = pytest.mark.unit

SECONDS = 300
"""Seconds for each fault at most; all are found in a few, even by a busy processor."""

CHAIN = "devices/virtio/chain.c"
QUEUE = "devices/virtio/queue.c"
CONSOLE = "devices/virtio/console.c"
CONTROL = "devices/virtio/console_control.c"
OUTPUT = "devices/virtio/console_output.c"
BLOCK = "devices/virtio/block_request.c"
BALLOON = "devices/virtio/balloon.c"
NET = "devices/virtio/net.c"
RECEIVE = "devices/virtio/net_receive.c"

QUEUE_FAULTS = {
    "a descriptor behind the table": Plant(
        QUEUE, "if (index >= queue->size)", "if (index > queue->size)"
    ),
    "a head read again after it was checked": Plant(
        QUEUE,
        "\tchain->slots = 1;\n",
        "\tchain->id = READ_ONCE(uint16_t, SPLIT_RING(queue->driver) + 2 * at);\n"
        "\tchain->slots = 1;\n",
    ),
    "a chain without end": Plant(QUEUE, "if (seen++ == queue->size)", "if (seen++ == 1u << 20)"),
    "a packed chain without end": Plant(
        QUEUE,
        "if (seen == queue->size)\n\t\t\treturn VIRTQUEUE_LOOP;\n"
        "\t\tif (queue->in_flight + ++seen > queue->size)",
        "if (++seen > 1u << 20)",
    ),
    "a table without end": Plant(CHAIN, "seen < count; seen++", "seen < 1u << 20; seen++"),
    "a buffer over the end of a region": Plant(
        CHAIN, "region->size - offset < size ? region->size - offset : size", "size"
    ),
    "a buffer behind the end of a region": Plant(
        CHAIN,
        "if (gpa < region->gpa || offset >= region->size)",
        "if (gpa < region->gpa || offset > region->size)",
    ),
    "a write to ROM": Plant(
        CHAIN, "if (writable && region->read_only)", "if (0 && region->read_only)"
    ),
    "one iovec too many": Plant(CHAIN, "if (at == chain->room)", "if (at > chain->room)"),
    "more bytes than the device takes": Plant(
        CHAIN, "chain->readable + chain->writable + left > most_bytes", "left > most_bytes"
    ),
    "more in flight than there are entries": Plant(
        QUEUE,
        "(uint32_t)(uint16_t)(there - queue->next) + queue->in_flight > queue->size",
        "(uint32_t)(uint16_t)(there - queue->next) > queue->size",
    ),
    "a ring over the end of a region": Plant(
        CHAIN, "host && there == size && !(gpa", "host && !(gpa"
    ),
    "a packed ring that begins behind its end": Plant(
        QUEUE,
        "if (queue->next >= size || queue->used >= size)",
        "if (queue->next > size || queue->used > size)",
    ),
    "a ring of no size": Plant(QUEUE, "if (!size || size > VIRTQUEUE", "if (size > VIRTQUEUE"),
    "a part of a chain that it has not": Plant(
        CHAIN, "if (offset > bytes || size > bytes - offset)", "if (offset > bytes)"
    ),
    "a broken queue that goes on": Plant(
        QUEUE, "if (queue->broken)\n\t\treturn -1;\n\tif (!is_available", "if (!is_available"
    ),
    "a used entry that is seen too early": Plant(
        QUEUE,
        "\t\tqueue->first_flags = flags;\n",
        "\t\tqueue->first_flags = flags;\n\t\tSTORE_RELEASE(uint16_t, entry + 14, flags);\n",
    ),
}

BLOCK_FAULTS = {
    "a sector behind the end": Plant(BLOCK, "sector <= sectors &&", "true &&"),
    "a request over the end": Plant(
        BLOCK, "bytes / BLOCK_SECTOR <= sectors - sector", "sector < sectors"
    ),
    "half a sector": Plant(BLOCK, "bytes % BLOCK_SECTOR == 0 &&", "true &&"),
    "a write to a read-only disk": Plant(
        BLOCK,
        "request->type == BLOCK_OUT && disk->read_only ?",
        "request->type == BLOCK_GET_ID && disk->read_only ?",
    ),
    "a discard of a read-only disk": Plant(
        BLOCK,
        "if (disk->read_only)\n\t\t\treturn BLOCK_IOERR;\n\t\treturn parse_ranges",
        "return parse_ranges",
    ),
    "the type read again after it was checked": Plant(
        BLOCK,
        "\treturn request->type == BLOCK_FLUSH || request->size;\n",
        "\tvirtio_chain_read(chain, 0, &request->type, 4);\n"
        "\treturn request->type == BLOCK_FLUSH || request->size;\n",
    ),
    "more ranges than there is room for": Plant(
        BLOCK, "|| size > sizeof(request->range))", "|| size > 2 * sizeof(request->range))"
    ),
    "no status": Plant(BLOCK, "if (!chain->writable ||\n", "if (\n"),
    "a short write": Plant(
        BLOCK,
        "\t\trequest->done += (uint64_t)n;\n\t}\n}",
        "\t\trequest->done = request->size;\n\t}\n}",
    ),
    "a short write that did not wait": Plant(
        BLOCK,
        "\t\trequest->done += (uint64_t)n;\n\treturn",
        "\t\trequest->done = request->size;\n\treturn",
    ),
    "a flush that fails once": Plant(
        BLOCK,
        "\tif (__atomic_load_n(&disk->flush_failed, __ATOMIC_ACQUIRE))\n\t\tfailed",
        "\tif (__atomic_exchange_n(&disk->flush_failed, 0, __ATOMIC_ACQ_REL))\n\t\tfailed",
    ),
    "no flush": Plant(BLOCK, "!disk->read_only && fdatasync(disk->file)", "disk->file < 0"),
    "a write that is not durable": Plant(BLOCK, "flags |= RWF_DSYNC", "flags |= 0"),
    "zeros that are not durable": Plant(
        BLOCK, "\tif (disk->write_through)\n\t\tflush(request, disk);\n", ""
    ),
    "memory of the host for data that were not read": Plant(
        BLOCK,
        "if (request->type == BLOCK_IN && request->status == BLOCK_OK)",
        "if (request->type == BLOCK_IN)",
    ),
}

CONSOLE_FAULTS = {
    "a port that does not exist": Plant(
        CONTROL, "message.port >= console->count", "message.port > console->count"
    ),
    "the end of an input that goes on": Plant(
        CONSOLE,
        "if (n < 0 && (errno == EAGAIN || errno == EINTR))",
        "if (n < 0 && errno == EINTR)",
    ),
    "input for a port that is not open": Plant(
        CONSOLE, "port->is.input >= 0 && port->state & CONSOLE_OPENED", "port->is.input >= 0"
    ),
    "a short write": Plant(OUTPUT, "port->done += (uint64_t)out;", "port->done = chain->readable;"),
    "bytes written twice": Plant(
        OUTPUT,
        "if (out == 0)\n\t\t\treturn false;",
        "if (out == 0) {\n\t\t\tport->done = 0;\n\t\t\treturn false;\n\t\t}",
    ),
    "later bytes before earlier ones": Plant(
        OUTPUT, "if (!write_kept(loop, port)) {", "if (0 && !write_kept(loop, port)) {"
    ),
    "output that is forgotten by a stop": Plant(
        OUTPUT, "port->kept_size += virtio_chain_read(", "(void)virtio_chain_read("
    ),
    "a buffer that is lost while there is no input": Plant(
        CONSOLE,
        "\t\t\tvirtqueue_untake(queue, &chain);\n\t\t\tif (n < 0",
        "\t\t\tif (n < 0",
    ),
    "a waiting reader that is forgotten": Plant(
        CONSOLE, "\t\t\tport->output_waits = false;\n", "\t\t\tport->closing = false;\n"
    ),
    "bytes repeated when the driver says hello": Plant(
        CONTROL,
        "\t\tport->closing = false;\n\t\tconsole_change(port, CONSOLE_OPENED, 0);\n",
        "\t\tport->done = 0;\n\t\tconsole_change(port, CONSOLE_OPENED, 0);\n",
    ),
}

NET_FAULTS = {
    "held chains whose iovecs stay behind": Plant(
        RECEIVE, "receiver->held[i].iov -= iovecs;", "receiver->held[i].iov -= 0;"
    ),
    "a frame larger than what is held": Plant(
        RECEIVE,
        "\tif (receiver->bytes < total)\n\t\treturn drop(receiver);\n\tscatter",
        "\tscatter",
    ),
    "bytes that are held for ever": Plant(
        RECEIVE, "\t\treceiver->bytes -= receiver->held[i].writable;\n", ""
    ),
    "chains that are not given back": Plant(
        RECEIVE,
        "\twhile (receiver->count)\n"
        "\t\tvirtqueue_untake(receiver->queue, &receiver->held[--receiver->count]);\n",
        "\treceiver->count = 0;\n",
    ),
    "a frame in part that is never finished": Plant(
        RECEIVE, "\treceiver->total = 0;\n\tif (receiver->bytes", "\tif (receiver->bytes"
    ),
    "a stream's buffer that grows at each move": Plant(
        RECEIVE, "\t\treceiver->end -= receiver->at;\n\t\tmemmove", "\t\tmemmove"
    ),
    "a frame that is too large for a stream": Plant(
        NET, "chain->readable > NET_HEADER + most)", "chain->readable > NET_HEADER + 4 * most)"
    ),
    "a frame that is none": Plant(
        NET, "readable < NET_HEADER + NET_ETHERNET", "readable < NET_HEADER"
    ),
    "a frame inside another": Plant(NET, "\tif (net->blocked)\n\t\treturn VIRTIO_NOT_NOW;\n", ""),
    "the rest of a frame from its beginning": Plant(
        NET, "net->out_at = (size_t)n;", "net->out_at = 0;"
    ),
}

BALLOON_FAULTS = {
    "memory that is shared with others": Plant(
        BALLOON, "if (!is_ram(&balloon->ram, host, size))", "if (!host)"
    ),
    "a part of the first page": Plant(BALLOON, "-(uintptr_t)host & (PAGE - 1)", "0"),
    "a part of the last page": Plant(BALLOON, "(size - before) & ~(PAGE - 1)", "size - before"),
    "pages behind a list that goes down": Plant(
        BALLOON, "\t\trun->host = host;\n\t\trun->size += PAGE;", "\t\trun->size += PAGE;"
    ),
    "more numbers than were read": Plant(
        BALLOON, "sizeof(numbers)) / sizeof(numbers[0]);", "sizeof(numbers)) * 0 + there;"
    ),
    "a buffer for statistics that is kept": Plant(
        BALLOON, "\tif (balloon->holds)\n\t\tvirtqueue_untake", "\tif (0)\n\t\tvirtqueue_untake"
    ),
}

FAULTS = {
    f"{target}: {name}": (target, plant)
    for target, faults in (
        ("virtqueue", QUEUE_FAULTS),
        ("block", BLOCK_FAULTS),
        ("console", CONSOLE_FAULTS),
        ("net", NET_FAULTS),
        ("balloon", BALLOON_FAULTS),
    )
    # Each takes some ten seconds: PYKVM_ALL_FAULTS=1 tries all, this the first of each target.
    for name, plant in list(faults.items())[: None if os.environ.get("PYKVM_ALL_FAULTS") else 1]
}

LEAST = {
    "virtqueue": (99, 96),
    "block": (99, 95),
    "console": (95, 88),
    "net": (93, 83),
    "balloon": (99, 87),
}
"""Percent of lines and branches that a corpus reaches: what is left is the host's errors."""


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    if missing := missing_tools():
        pytest.skip(missing)


@pytest.mark.parametrize("name", LEAST)
def test_the_corpus_finds_nothing_and_reaches_nearly_all(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    inputs = target.inputs()
    outcome = target.fuzzer(tmp_path).run(0, corpus=tmp_path / "seeds", inputs=inputs)
    assert outcome.finding == "", outcome.output
    assert outcome.executions >= len(inputs)
    reached = target.coverage(tmp_path, inputs)
    assert reached.lines >= LEAST[name][0]
    assert reached.branches >= LEAST[name][1]


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    target = TARGETS[FAULTS[name][0]]
    outcome = target.fuzzer(tmp_path, FAULTS[name][1]).run(SECONDS, inputs=target.inputs())
    assert outcome.finding, f"not found in {outcome.executions} executions"
    print(f"{name}: {outcome.executions} executions, {outcome.finding}")
