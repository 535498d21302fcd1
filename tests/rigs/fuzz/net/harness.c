/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzes the network device (net.c, net_receive.c) with what a guest controls, its rings and what
 * they hold, and with what comes from the other side: frames of a TAP, whose part datagrams play, or
 * a stream. The loop's thread is not started: the input says which of its calls comes next. Besides
 * the sanitizers judge:
 *
 *  - Whatever the guest does, the other side sees whole frames of a size that frames have.
 *  - All chains that were taken are given back when the device is stopped.
 *  - A driver that begins anew sends and receives, unless the stream was spoilt.
 *
 * What a guest can do to the rings between two loads is the target virtqueue's.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest.h"
#include "net.h"

enum { RECEIVE, TRANSMIT, QUEUES };

#define MERGEABLE (1ull << 15)
#define HEADER 12
#define ETHERNET 14
#define MOST 65536
#define BUFFERS 0x3000
#define FRAME 60
#define ROOM 256

static struct driver drivers[QUEUES];
static struct virtqueue_setup setups[QUEUES];
static struct virtio_device *device;
static struct virtio_loop *loop;
static int call = -1, ours, theirs;
static bool stream, spoilt;

/* What the other side has read and not looked at: at most one frame and a part of the next. */
static uint8_t inbox[4 * MOST];
static size_t inbox_size;

/* ---------------------------------------------------------- the other side */

static uint32_t big_endian(const uint8_t *at)
{
	return (uint32_t)at[0] << 24 | at[1] << 16 | at[2] << 8 | at[3];
}

/* Takes all that has come; returns the size of the last frame, which is in `last`, or 0. */
static size_t collect(uint8_t *last)
{
	size_t found = 0;
	ssize_t n;

	while ((n = recv(theirs, inbox + inbox_size, sizeof(inbox) - inbox_size,
			 MSG_DONTWAIT)) > 0) {
		size_t at = 0;

		inbox_size += (size_t)n;
		if (!stream) {
			REQUIRE(n >= HEADER + ETHERNET);
			found = (size_t)n - HEADER;
			memcpy(last, inbox + HEADER, found);
			at = inbox_size;
		}
		while (stream && inbox_size - at >= 4) {
			size_t size = big_endian(inbox + at);

			REQUIRE(size >= ETHERNET && size < MOST);
			if (inbox_size - at < 4 + size)
				break;
			found = size;
			memcpy(last, inbox + at + 4, size);
			at += 4 + size;
		}
		memmove(inbox, inbox + at, inbox_size - at);
		inbox_size -= at;
	}
	return found;
}

/* Returns whether there was room for it. */
static bool send_frame(const uint8_t *frame, uint32_t size)
{
	uint8_t bytes[HEADER + 4096] = { 0 };
	size_t before = stream ? 4 : HEADER;

	if (stream) {
		bytes[2] = (uint8_t)(size >> 8);
		bytes[3] = (uint8_t)size;
	}
	memcpy(bytes + before, frame, size);
	/* A part of a frame spoils a stream. */
	if (send(theirs, bytes, before + size, MSG_DONTWAIT | MSG_NOSIGNAL) ==
	    (ssize_t)(before + size))
		return true;
	spoilt |= stream;
	return false;
}

static void send_anything(void)
{
	uint8_t frame[4096];
	uint8_t what = (uint8_t)take_number(1);
	uint32_t size = what & 1 ? (uint32_t)take_number(2) % sizeof(frame) : what;

	memset(frame, what, sizeof(frame));
	if (what & 2 && stream) {
		take(frame, 8);
		size = what >> 4 & 7;
		if (send(theirs, frame, size, MSG_DONTWAIT | MSG_NOSIGNAL) != 0)
			spoilt = true;
		return;
	}
	send_frame(frame, size);
}

/* ---------------------------------------------------------------- guest */

static void describe(void)
{
	struct buffer buffers[8];
	uint8_t how = (uint8_t)take_number(1);
	uint32_t count = 1 + (how >> 2 & 7), queue = how >> 5 & 1;

	for (uint32_t i = 0; i < count; i++) {
		uint8_t what = (uint8_t)take_number(1);

		buffers[i].gpa = what & 1 ? interesting_address() : BUFFERS + 64 * i;
		buffers[i].length = what & 2 ? interesting_length() : 16u << (what >> 3 & 7);
		buffers[i].flags = what & 4 ? (what >> 5 & 7)
					    : (queue == RECEIVE ? VIRTIO_DESC_WRITE : 0);
		buffers[i].next = (uint16_t)(what >> 4);
		if ((what & 0xc1) == 0xc0) {	/* much at once */
			buffers[i].gpa = LOW_GPA;
			buffers[i].length = LOW_SIZE + HIGH_SIZE;
		}
	}
	offer(&drivers[queue], buffers, count, how & 1, how & 2);
}

static bool start(void)
{
	loop = virtio_loop_new(device, QUEUES, -1);
	REQUIRE(loop);
	for (uint32_t i = 0; i < QUEUES; i++) {
		if (virtio_loop_add(loop, i, &memory, &setups[i])) {
			virtio_loop_free(loop);
			loop = NULL;
			return false;
		}
	}
	device->begin(device, loop);
	return true;
}

static void stop(void)
{
	device->drain(device, loop);
	for (uint32_t i = 0; i < QUEUES; i++) {
		struct virtqueue *queue = virtio_loop_queue(loop, i);

		virtqueue_flush(queue);
		REQUIRE(queue->broken || !queue->in_flight);
		setups[i].base = virtqueue_base(queue);
	}
	virtio_loop_free(loop);
	loop = NULL;
}

static void operation(uint8_t *last)
{
	uint8_t what = (uint8_t)take_number(1);

	switch (what & 15) {
	case 0: case 1: case 2: case 3:
		describe();
		return;
	case 4:
		poke_anything();
		return;
	case 5: case 6:
		device->kicked(device, loop, RECEIVE);
		return;
	case 7:
		device->kicked(device, loop, TRANSMIT);
		return;
	case 8: case 9:
		device->ready(device, loop, ours, EPOLLIN);
		return;
	case 10:
		device->ready(device, loop, ours, EPOLLOUT);
		return;
	case 11: case 12:
		send_anything();
		return;
	case 13:
		collect(last);
		return;
	case 14:
		if (what & 0x80) {
			stop();
			start();
		}
		return;
	default:
		if (what == 0xff)
			device->ready(device, loop, ours, EPOLLHUP);
		return;
	}
}

/* ------------------------------------------------------------- at the end */

static void begin_anew(void)
{
	uint64_t at = 0;

	make_memory();
	for (uint32_t i = 0; i < QUEUES; i++) {
		at = (place_ring(&drivers[i], at, 8, setups[i].features) + 63) & ~63ull;
		setups[i] = (struct virtqueue_setup){
			.descriptors = drivers[i].descriptors, .driver = drivers[i].driver,
			.device = drivers[i].device, .features = setups[i].features, .size = 8,
			.base = drivers[i].packed ? 0x80008000 : 0, .kick = -1, .call = call,
		};
	}
	REQUIRE(at <= BUFFERS);
}

/* Offers a buffer of its own for a frame to each place of the ring that has none. */
static void offer_buffers(uint16_t *offered, uint16_t seen)
{
	while ((uint16_t)(*offered - seen) < 8) {
		uint64_t gpa = BUFFERS + ROOM * (drivers[RECEIVE].next % 8);
		struct buffer buffer = { gpa, ROOM, VIRTIO_DESC_WRITE, 0 };

		offer(&drivers[RECEIVE], &buffer, 1, false, false);
		++*offered;
	}
}

static void check_receiving(uint8_t *frame)
{
	const uint8_t *at = memory.regions[0].host + BUFFERS;
	uint16_t offered = 0, seen = 0, id;
	uint32_t written, good = 0;
	bool sent = false;

	for (uint32_t round = 0; good < 20; round++) {
		REQUIRE(round < 1000);
		offer_buffers(&offered, seen);
		for (int i = 0; i < 3; i++)
			sent |= send_frame(frame, FRAME);
		if (spoilt)
			return;
		device->kicked(device, loop, RECEIVE);
		while (is_used(&drivers[RECEIVE], seen, &id, &written)) {
			const uint8_t *buffer = at + ROOM * (id % 8);

			seen++;
			/* What came before begins with other bytes. */
			if (sent && written == HEADER + FRAME && !memcmp(buffer + HEADER, frame, FRAME)) {
				REQUIRE(buffer[10] == 1 && buffer[11] == 0);
				good++;
			}
			REQUIRE(!good || (written == HEADER + FRAME &&
					  !memcmp(buffer + HEADER, frame, FRAME)));
			memset((uint8_t *)buffer, 0xee, ROOM);
		}
	}
}

/* Whatever happened: a driver that begins anew is served. */
static void check_service(uint8_t *last)
{
	uint8_t frame[FRAME];
	struct buffer sends[] = { { BUFFERS + 0x1000, HEADER + FRAME, 0, 0 } };
	uint32_t written = 0, rounds = 0;
	uint16_t id;

	begin_anew();
	REQUIRE(start());
	for (size_t i = 0; i < FRAME; i++)
		frame[i] = (uint8_t)(i + 7);
	/* What was on its way goes first: it has to be whole, and what came is taken. */
	for (int quiet = 0; quiet < 2; quiet = collect(last) || inbox_size ? 0 : quiet + 1) {
		device->ready(device, loop, ours, EPOLLOUT);
		REQUIRE(++rounds < 1000);
	}
	poke(BUFFERS + 0x1000 + HEADER, frame, FRAME);
	offer(&drivers[TRANSMIT], sends, 1, false, false);
	device->kicked(device, loop, TRANSMIT);
	REQUIRE(is_used(&drivers[TRANSMIT], 0, &id, &written));
	REQUIRE(collect(last) == FRAME && !memcmp(last, frame, FRAME));
	check_receiving(frame);
	stop();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static uint8_t last[MOST + 64];
	uint8_t shape, mode;
	uint64_t features;
	int ends[2], room = 4096;

	if (call < 0)
		call = eventfd(0, EFD_NONBLOCK);
	set_input(data, size);
	shape = (uint8_t)take_number(1);
	mode = (uint8_t)take_number(1);
	stream = shape & 8;
	spoilt = false;
	inbox_size = 0;
	features = (shape & 1 ? FEATURE_PACKED : 0) | (shape & 2 ? FEATURE_INDIRECT : 0) |
		   (shape & 4 ? FEATURE_EVENT_IDX : 0) | (shape & 16 ? MERGEABLE : 0);
	REQUIRE(!socketpair(AF_UNIX, (stream ? SOCK_STREAM : SOCK_DGRAM) | SOCK_NONBLOCK, 0, ends));
	ours = ends[0];
	theirs = ends[1];
	if (mode & 1)
		setsockopt(ours, SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
	device = net_new(ours, stream);
	REQUIRE(device);
	device->features = features;
	setups[0].features = setups[1].features = features;
	begin_anew();
	REQUIRE(start());
	for (int count = 0; count < 64 && input_left && loop && !virtio_loop_failure(loop); count++)
		operation(last);
	if (loop)
		stop();
	if (!net_lost(device))
		check_service(last);
	net_free(device);
	close(ours);
	close(theirs);
	return 0;
}
