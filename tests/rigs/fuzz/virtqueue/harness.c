/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzes virtqueues (chain.c, queue.c) with all that a guest controls: where its rings are, what
 * they hold, and that it changes between any two loads (guest.h). Besides the sanitizers judge:
 *
 *  - A load is from the rings, or a whole number inside guest memory while a table is read; a store
 *    is to the used ring, or a packed ring's descriptors. The loads of one call have a limit.
 *  - A chain lies in guest memory, what is to be written not in ROM, within the device's bounds.
 *  - No more is in flight than the ring holds, what is broken stays so, and an honest chain works.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "guest.h"

#define HELD 6
#define ROOM 8

static struct driver driver;
static struct virtqueue queue;
static struct virtqueue_setup setup;
static uint64_t accesses;
static uint8_t mode;

static struct held {
	struct virtio_chain chain;
	struct iovec *iov;
} held[HELD];
static uint32_t holds;
static bool may_untake;

static void watch(uint8_t *at, size_t bytes, bool store)
{
	uint64_t size = queue.size;

	REQUIRE(++accesses <= 8 * (size + VIRTIO_CHAIN_IOVECS) + 32);
	if (store) {
		REQUIRE(inside(at, bytes, queue.device, queue.packed ? 4 : 6 + 8 * size) ||
			(queue.packed && inside(at, bytes, queue.descriptors, 16 * size)));
		return;
	}
	REQUIRE(is_guest(at, bytes, false));
	REQUIRE(inside(at, bytes, queue.descriptors, 16 * size) ||
		inside(at, bytes, queue.driver, queue.packed ? 4 : 6 + 2 * size) ||
		queue.indirect);
	if (mode & 1)
		interfere(at, bytes);
}

#define WATCHED(call)                                                                              \
	({                                                                                         \
		accesses = 0;                                                                      \
		on_access = watch;                                                                 \
		__typeof__(call) result = (call);                                                  \
		on_access = NULL;                                                                  \
		result;                                                                            \
	})

static void forget(uint32_t number)
{
	free(held[number].iov);
	held[number] = held[--holds];
	may_untake = false;
}

static void hold(void)
{
	uint32_t room = take_number(1) % (ROOM + 1);
	/* Exactly so large: ASan sees one too many. */
	struct iovec *iov = malloc(room ? room * sizeof(*iov) : 1);
	struct virtio_chain chain = { .iov = iov, .room = room };
	int was = queue.broken, taken;

	if (holds == HELD) {
		free(iov);
		return;
	}
	taken = WATCHED(virtqueue_take(&queue, &chain));
	REQUIRE(!was || (taken == -1 && queue.broken == was));
	REQUIRE((taken == -1) == (queue.broken != 0));
	REQUIRE(queue.broken >= 0 && queue.broken < VIRTQUEUE_FAULTS);
	REQUIRE(strlen(virtqueue_reason(queue.broken)));
	REQUIRE(queue.in_flight <= queue.size);
	if (taken <= 0) {
		free(iov);
		return;
	}
	check_chain(&chain, queue.most_bytes);
	REQUIRE(chain.slots && chain.slots <= queue.size);
	REQUIRE(queue.packed ? queue.next < queue.size : chain.id < queue.size);
	held[holds++] = (struct held){ .chain = chain, .iov = iov };
	may_untake = true;
}

/* Copies of parts of a chain agree with its iovecs. */
static void copy(const struct virtio_chain *chain)
{
	uint8_t bytes[64];
	uint64_t offset = take_number(2), size = take_number(1) % sizeof(bytes);
	uint64_t there = chain->readable > offset ? chain->readable - offset : 0;
	struct iovec out[3];
	uint32_t room = 1 + take_number(1) % 3;
	int n;

	REQUIRE(virtio_chain_read(chain, offset, bytes, size) == (there < size ? there : size));
	there = chain->writable > offset ? chain->writable - offset : 0;
	if (mode & 2)
		REQUIRE(virtio_chain_write(chain, offset, bytes, size) ==
			(there < size ? there : size));
	n = virtio_chain_slice(chain, mode & 4, offset, size, out, room);
	if (n < 0)
		return;
	for (int i = 0; i < n; i++) {
		REQUIRE(is_guest(out[i].iov_base, out[i].iov_len, mode & 4));
		size -= out[i].iov_len;
	}
	REQUIRE(size == 0);
}

/* Of a descriptor: one that is there, or not quite. */
static uint16_t some_index(void)
{
	uint8_t what = (uint8_t)take_number(1);

	return (uint16_t)(what < 0xf0 ? driver.size - 2 + what % 4 : take_number(2));
}

/* When the driver wants to be called. */
static void suppress(void)
{
	uint32_t event = (uint32_t)take_number(1) % (driver.size + 1);

	if (!driver.packed) {
		poke(setup.driver + 4 + 2 * driver.size, &event, 2);
		return;
	}
	event |= (uint32_t)take_number(1) << 15 & 0x38000;
	poke(setup.driver, &event, 4);
}

static void describe(void)
{
	struct buffer buffers[8];
	uint32_t count = 1 + take_number(1) % 8;
	uint8_t how = (uint8_t)take_number(1);

	for (uint32_t i = 0; i < count; i++) {
		uint8_t what = (uint8_t)take_number(1);

		buffers[i].gpa = what & 1 ? interesting_address() : 0x3000 + 64 * i;
		buffers[i].length = what & 2 ? interesting_length() : 32;
		buffers[i].flags = what & 4 ? (what >> 5 & 7) : 2 * (i * 2 >= count);
		buffers[i].next = (uint16_t)(what & 8 ? some_index() : (i + 1) % driver.size);
	}
	offer(&driver, buffers, count, how & 1, how & 2);
	if (how & 4 && !driver.packed) {
		uint16_t head = some_index();

		poke(driver.driver + 4 + 2 * ((driver.next - 1) % driver.size), &head, 2);
	}
}

static void start(uint32_t base)
{
	setup.base = base;
	memset(&queue, 0xa5, sizeof(queue));
	if (virtqueue_init(&queue, &memory, &setup)) {
		REQUIRE(queue.broken);
		return;
	}
	REQUIRE(!queue.broken && queue.size && queue.size <= VIRTQUEUE_MAX_SIZE);
	REQUIRE(is_guest(queue.descriptors, queue.size * 16, queue.packed));
	REQUIRE(is_guest(queue.driver, queue.packed ? 4 : 6 + 2 * queue.size, false));
	REQUIRE(is_guest(queue.device, queue.packed ? 4 : 6 + 8 * queue.size, true));
	REQUIRE(!queue.packed || (queue.next < queue.size && queue.used < queue.size));
	REQUIRE(virtqueue_base(&queue) == base);
}

static void operation(void)
{
	uint8_t what = (uint8_t)take_number(1), which;

	switch (what & 15) {
	case 0: case 1: case 2: case 3:
		describe();
		return;
	case 4:
		poke_anything();
		return;
	case 5: case 6: case 7:
		hold();
		return;
	case 8: case 9:
		which = holds ? (uint8_t)take_number(1) % holds : 0;
		if (!holds)
			return;
		WATCHED((virtqueue_put(&queue, &held[which].chain, take_number(4)), 0));
		forget(which);
		return;
	case 10:
		WATCHED(virtqueue_flush(&queue));
		REQUIRE(!queue.unpublished && queue.in_flight <= queue.size);
		may_untake = false;
		return;
	case 11:
		WATCHED(virtqueue_enable_kicks(&queue));
		return;
	case 12:
		if (what & 16)
			suppress();
		else
			WATCHED((virtqueue_disable_kicks(&queue), 0));
		return;
	case 13:
		if (may_untake && !queue.broken) {
			virtqueue_untake(&queue, &held[holds - 1].chain);
			forget(holds - 1);
		}
		return;
	case 14:
		if (holds)
			copy(&held[(what >> 4) % holds].chain);
		return;
	default:
		/* Another device goes on. */
		if (!holds && !queue.broken) {
			WATCHED(virtqueue_flush(&queue));
			start(virtqueue_base(&queue));
		}
		return;
	}
}

/* Whatever happened: a driver that begins anew is served. */
static void check_service(void)
{
	static const uint8_t text[] = "what the driver writes";
	struct iovec iov[4];
	struct virtio_chain chain = { .iov = iov, .room = 4 };
	uint8_t back[sizeof(text)];

	make_memory();
	place_ring(&driver, 0, 4, setup.features);
	setup = (struct virtqueue_setup){
		.descriptors = driver.descriptors, .driver = driver.driver, .device = driver.device,
		.features = setup.features, .size = 4, .kick = -1, .call = -1,
	};
	start(setup.features & FEATURE_PACKED ? 0x80008000 : 0);
	for (uint16_t n = 0; n < 11; n++) {
		/* A packed chain of two takes two places, unless it is a table. */
		struct buffer buffers[] = {
			{ HIGH_GPA - 8, sizeof(text), 0, 0 }, { 0x3000, 100, VIRTIO_DESC_WRITE, 0 },
		};
		uint16_t id, places = driver.packed && !driver.indirect ? 2 : 1;
		uint32_t written;

		poke(HIGH_GPA - 8, text, sizeof(text));
		offer(&driver, buffers, 2, driver.indirect, false);
		REQUIRE(virtqueue_take(&queue, &chain) == 1);
		REQUIRE(chain.reads == 2 && chain.writes == 1);
		REQUIRE(virtio_chain_read(&chain, 0, back, sizeof(back)) == sizeof(text));
		REQUIRE(memcmp(back, text, sizeof(text)) == 0);
		REQUIRE(virtio_chain_write(&chain, 90, text, 20) == 10);
		REQUIRE(!is_used(&driver, n * places, &id, &written));
		virtqueue_put(&queue, &chain, 7);
		REQUIRE(!is_used(&driver, n * places, &id, &written));
		virtqueue_flush(&queue);
		REQUIRE(is_used(&driver, n * places, &id, &written));
		REQUIRE(id == chain.id && written == 7);
		REQUIRE(virtqueue_take(&queue, &chain) == 0);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const uint32_t sizes[] = { 4, 1, 2, 8, 16, 3, 7, 0, 32768, 65536, 128 };
	static int call = -1;
	uint8_t shape, where;

	if (call < 0)
		call = eventfd(0, EFD_NONBLOCK);
	set_input(data, size);
	make_memory();
	shape = (uint8_t)take_number(1);
	where = (uint8_t)take_number(1);
	mode = (uint8_t)take_number(1);
	setup = (struct virtqueue_setup){
		.features = (shape & 1 ? FEATURE_PACKED : 0) | (shape & 2 ? FEATURE_INDIRECT : 0) |
			    (shape & 4 ? FEATURE_EVENT_IDX : 0),
		.size = sizes[(shape >> 3) % 11],
		.most_bytes = mode & 8 ? 1000 : 0,
		.kick = -1,
		.call = call,
	};
	place_ring(&driver, 0, setup.size ? setup.size : 1, setup.features);
	setup.descriptors = where & 1 ? interesting_address() : driver.descriptors;
	setup.driver = where & 2 ? interesting_address() : driver.driver;
	setup.device = where & 4 ? interesting_address() : driver.device;
	start(where & 8 ? setup.size * (uint32_t)take_number(1) << (where & 16)
			: setup.features & FEATURE_PACKED ? 0x80008000 : 0);
	for (int count = 0; count < 64 && input_left && queue.device; count++)
		operation();
	while (holds)
		forget(holds - 1);
	check_service();
	return 0;
}
