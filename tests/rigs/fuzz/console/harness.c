/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzes a console of three ports: a driver and a host that do anything in any order. An input is
 * honest or hostile. A hostile driver writes what it likes into its memory, before and while the
 * device reads it: the sanitizers judge, and no descriptor is used with memory that is not the
 * guest's. An honest one keeps to the rules, and then nothing may be lost, doubled or in disorder:
 *
 *  - What the guest writes comes out in order, over short writes, waits, stops and starts; in the
 *    end all of it.
 *  - What the host writes reaches the guest in order, and only while the guest has the port open.
 *  - The guest is told of the end of an input when it has all of it.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "console.h"
#include "guest.h"

#define PORTS 3
#define QUEUES (2 * PORTS + 2)
#define SIZE 4
#define INPUT(port) (100 + 2 * (port))
#define OUTPUT(port) (101 + 2 * (port))
#define RX(port) ((port) ? 2 * (port) + 2 : 0)
#define PART 128 /* bytes of a buffer */

static bool honest, blocking;
static struct virtio_device *device;
static struct virtio_loop *loop;
static struct driver drivers[QUEUES];
static uint16_t seen[QUEUES]; /* used entries that the driver has looked at */
static uint32_t again; /* queues to be served */
static uint32_t watched[2 * PORTS];
static bool failed;

static struct stream {
	uint64_t there; /* bytes that can be read, or written */
	uint64_t at; /* bytes that have been */
	uint64_t got; /* of an input: those that the guest has looked at; of an output: it wrote */
	bool ended; /* nothing more comes, or nobody reads */
} inputs[PORTS], outputs[PORTS];

static uint8_t byte_of(uint32_t port, uint64_t at)
{
	return (uint8_t)(at * 31 + port * 7 + at / 255);
}

/* ------------------------------------------------------------ descriptors */

static struct stream *stream_of(int fd)
{
	REQUIRE(fd >= 100 && fd < 100 + 2 * PORTS);
	return fd & 1 ? &outputs[(fd - 100) / 2] : &inputs[(fd - 100) / 2];
}

ssize_t fake_readv(int fd, const struct iovec *iov, int count)
{
	struct stream *stream = stream_of(fd);
	uint32_t port = (uint32_t)(fd - 100) / 2;
	ssize_t done = 0;

	REQUIRE(!(fd & 1));
	REQUIRE(console_state(device, port) & CONSOLE_OPENED);
	if (!stream->there && !stream->ended) {
		errno = EAGAIN;
		return -1;
	}
	for (int i = 0; i < count; i++) {
		REQUIRE(is_guest(iov[i].iov_base, iov[i].iov_len, true));
		for (size_t n = 0; n < iov[i].iov_len && stream->there; n++, stream->there--, done++)
			((uint8_t *)iov[i].iov_base)[n] = byte_of(port, stream->at++);
	}
	return done;
}

ssize_t fake_writev(int fd, const struct iovec *iov, int count)
{
	struct stream *stream = stream_of(fd);
	uint32_t port = (uint32_t)(fd - 100) / 2;
	ssize_t done = 0;

	REQUIRE(fd & 1 && count > 0);
	if (stream->ended || !stream->there) {
		errno = stream->ended ? EPIPE : EAGAIN;
		return -1;
	}
	for (int i = 0; i < count; i++) {
		for (size_t n = 0; n < iov[i].iov_len && stream->there; n++, stream->there--, done++) {
			uint8_t byte = ((const uint8_t *)iov[i].iov_base)[n];

			REQUIRE(!honest || (byte == byte_of(port, stream->at) &&
					    stream->at < stream->got));
			stream->at++;
		}
	}
	return done;
}

int fake_poll(struct pollfd *polled, nfds_t count, int timeout)
{
	struct stream *stream = stream_of(polled->fd);

	REQUIRE(count == 1);
	(void)timeout;
	return stream->there || stream->ended;
}

int fake_fcntl(int fd, int operation, ...)
{
	return operation == F_GETFL ? blocking ? 0 : O_NONBLOCK : fd;
}

int fake_close(int fd)
{
	stream_of(fd);
	return 0;
}

int fake_watch(struct virtio_loop *of, int fd, uint32_t events)
{
	REQUIRE(of == loop);
	stream_of(fd);
	watched[fd - 100] = events;
	return 0;
}

void fake_again(struct virtio_loop *of, uint32_t index)
{
	REQUIRE(of == loop && index < QUEUES);
	again |= 1u << index;
}

/* ------------------------------------------------------------------- loop */

static void settle(void)
{
	for (int rounds = 0; again && rounds < 200; rounds++) {
		uint32_t index = (uint32_t)__builtin_ctz(again);

		again &= ~(1u << index);
		if (!virtio_loop_failure(loop))
			device->kicked(device, loop, index);
	}
	failed = virtio_loop_failure(loop);
	REQUIRE(!honest || !failed);
}

static void start(void)
{
	loop = virtio_loop_new(device, QUEUES, -1);
	REQUIRE(loop);
	memset(watched, 0, sizeof(watched));
	again = 0;
}

static void begin(const uint32_t *bases)
{
	for (uint32_t i = 0; i < QUEUES; i++) {
		struct virtqueue_setup setup = {
			.descriptors = drivers[i].descriptors, .driver = drivers[i].driver,
			.device = drivers[i].device, .size = SIZE, .base = bases ? bases[i] : 0,
			.kick = -1, .call = -1,
		};

		REQUIRE(!virtio_loop_add(loop, i, &memory, &setup));
	}
	device->begin(device, loop);
	again |= (1u << QUEUES) - 1;
	settle();
}

static void stop(uint32_t *bases)
{
	device->drain(device, loop);
	for (uint32_t i = 0; i < QUEUES; i++) {
		struct virtqueue *queue = virtio_loop_queue(loop, i);

		virtqueue_flush(queue);
		REQUIRE(!queue->in_flight);
		bases[i] = virtqueue_base(queue);
	}
	virtio_loop_free(loop);
}

static void ready(int fd)
{
	if (!watched[fd - 100] || failed)
		return;
	device->ready(device, loop, fd, watched[fd - 100]);
	settle();
}

/* ----------------------------------------------------------------- driver */

/* Chains that the device has not used. */
static uint16_t pending(uint32_t index)
{
	return (uint16_t)(drivers[index].next - seen[index]);
}

static uint64_t place(uint32_t index)
{
	return 0x3000 + index * SIZE * PART + drivers[index].next % SIZE * PART;
}

static void look(uint32_t index)
{
	struct driver *driver = &drivers[index];
	uint16_t id;
	uint32_t written;
	struct { uint32_t port; uint16_t event, value; } message;

	while (honest && is_used(driver, seen[index], &id, &written) && pending(index)) {
		uint64_t from = 0x3000 + index * SIZE * PART + id % SIZE * PART;

		REQUIRE(id < SIZE && written <= PART);
		if (index == 2) {
			const uint8_t *at = virtio_translate(&memory, from, 8, 1, false);

			memcpy(&message, at, 8);
			REQUIRE(written >= 8 && message.port < PORTS && message.event < 8);
			if (message.event == 6 && !message.value)
				REQUIRE(inputs[message.port].ended && !inputs[message.port].there);
		} else if (!(index & 1)) {
			uint32_t port = index ? index / 2 - 1 : 0;

			for (uint32_t n = 0; n < written; n++)
				REQUIRE(*(uint8_t *)virtio_translate(&memory, from + n, 1, 1, false) ==
					byte_of(port, inputs[port].got++));
		}
		seen[index]++;
	}
	if (!honest)
		seen[index] = drivers[index].next;
}

static void put(uint32_t index, uint64_t gpa, uint32_t length, uint16_t flags)
{
	struct buffer buffer = { gpa, length, flags, 0 };

	offer(&drivers[index], &buffer, 1, false, true);
	again |= 1u << index;
	settle();
	look(index);
}

static void send_message(void)
{
	struct { uint32_t port; uint16_t event, value; } message;
	uint8_t what = (uint8_t)take_number(1);
	uint64_t at = place(3);

	message.port = what & 3;
	message.event = what >> 2 & 7;
	message.value = what >> 5 & 1;
	if (honest && message.port >= PORTS)
		return;
	look(3);
	if (pending(3) == SIZE)
		return;
	poke(at, &message, 8);
	put(3, at, what & 64 && !honest ? (uint32_t)take_number(1) : 8, 0);
}

static void receive(uint32_t index)
{
	uint32_t length = (uint32_t)take_number(1) % PART;

	look(index);
	if (pending(index) == SIZE)
		return;
	put(index, place(index), index == 2 ? PART : length, VIRTIO_DESC_WRITE);
}

static void write_out(uint32_t port)
{
	uint32_t length = (uint32_t)take_number(1) % PART, index = RX(port) + 1;
	uint64_t at = place(index);

	look(index);
	if (pending(index) == SIZE)
		return;
	for (uint32_t n = 0; n < length; n++) {
		uint8_t byte = byte_of(port, outputs[port].got++);

		poke(at + n, &byte, 1);
	}
	put(index, at, length, 0);
}

static void hostile(void)
{
	struct buffer buffers[3];
	uint32_t index = (uint32_t)take_number(1) % QUEUES, count = 1 + take_number(1) % 3;

	poke_anything();
	for (uint32_t i = 0; i < count; i++)
		buffers[i] = (struct buffer){ interesting_address(), interesting_length(),
					      (uint16_t)(take_number(1) & 3), 0 };
	offer(&drivers[index], buffers, count, false, false);
	is_changing = true;
	again |= 1u << index;
	settle();
	is_changing = false;
}

static void operation(void)
{
	uint8_t what = (uint8_t)take_number(1);
	uint32_t port = (what >> 4) % PORTS, bases[QUEUES];

	switch (what & 15) {
	case 0: case 1:
		send_message();
		return;
	case 2: case 3:
		receive(RX(port));
		return;
	case 4:
		receive(2);
		return;
	case 5: case 6:
		write_out(port);
		return;
	case 7:
		if (!inputs[port].ended)
			inputs[port].there += take_number(1);
		ready(INPUT(port));
		return;
	case 8:
		inputs[port].ended = true;
		ready(INPUT(port));
		return;
	case 9: case 10:
		outputs[port].there += take_number(1);
		ready(OUTPUT(port));
		return;
	case 11:
		outputs[port].ended |= !honest || what & 128;
		ready(OUTPUT(port));
		return;
	case 12:
		console_resize(device, (uint16_t)take_number(1), 25);
		if (!failed)
			device->nudged(device, loop);
		return;
	case 13:
		if (failed)
			return;
		stop(bases);
		if (what & 64)
			console_flush(device, port, 0);
		start();
		begin(bases);
		return;
	default:
		if (!honest)
			hostile();
		return;
	}
}

/* An honest guest has what was written for it, and all that it has written is out. */
static void finish(void)
{
	uint32_t bases[QUEUES];

	for (uint32_t port = 0; port < PORTS; port++) {
		outputs[port].there = 1 << 20;
		ready(OUTPUT(port));
		/* The second has no output. */
		REQUIRE(!honest || port == 1 || outputs[port].ended ||
			outputs[port].at == outputs[port].got);
	}
	stop(bases);
	for (uint32_t port = 0; port < PORTS; port++)
		REQUIRE(console_flush(device, port, 0) == 0 || !honest);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct console_port ports[PORTS] = {
		{ .input = INPUT(0), .output = OUTPUT(0), .is_console = true },
		{ .name = "stdin", .input = INPUT(1), .output = -1 },
		{ .name = "a name that has thirty-one bytes", .input = -1, .output = OUTPUT(2) },
	};
	uint64_t at = 0;
	uint8_t mode;

	set_input(data, size);
	make_memory();
	mode = (uint8_t)take_number(1);
	honest = mode & 1;
	blocking = mode & 2;
	failed = false;
	memset(inputs, 0, sizeof(inputs));
	memset(outputs, 0, sizeof(outputs));
	memset(seen, 0, sizeof(seen));
	device = console_new(ports, PORTS);
	REQUIRE(device);
	device->features = mode & 4 ? 1 : 3; /* without ports, or with; sizes in either case */
	for (uint32_t i = 0; i < QUEUES; i++)
		at = place_ring(&drivers[i], at, SIZE, 0);
	REQUIRE(at <= 0x3000);
	start();
	begin(NULL);
	for (int count = 0; count < 96 && input_left; count++)
		operation();
	finish();
	console_free(device);
	return 0;
}
