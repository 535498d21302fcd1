/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzes the balloon (balloon.c) with what a guest puts into its queues. madvise() is the harness's.
 * The loop's thread is not started: the input says which of its calls comes next. Besides the
 * sanitizers judge:
 *
 *  - What is given back are whole pages of RAM: neither memory that is shared with others, as the
 *    upper of guest.h's regions is here, nor the read-only one.
 *  - The pages of an honest list are given back, and none besides.
 *  - All chains that were taken are given back when the device is stopped.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "balloon.h"
#include "guest.h"

enum { INFLATE, DEFLATE, STATISTICS, REPORTING, QUEUES };

#define BUFFERS 0x3000

static struct driver drivers[QUEUES];
static struct virtqueue_setup setups[QUEUES];
static struct virtio_region ram_region;
static const struct virtio_memory ram = { .count = 1, .regions = &ram_region };
static struct virtio_device *device;
static struct virtio_loop *loop;
static uint64_t given;
static bool is_refused;

int fake_madvise(void *at, size_t size, int advice);

int fake_madvise(void *at, size_t size, int advice)
{
	REQUIRE(advice == (is_refused ? MADV_DONTNEED : MADV_REMOVE) || advice == MADV_REMOVE);
	REQUIRE(size && size % PAGE == 0);
	REQUIRE(inside(at, size, ram_region.host, ram_region.size));
	REQUIRE((size_t)((uint8_t *)at - ram_region.host) % PAGE == 0);
	if (advice == MADV_REMOVE && is_refused) {
		errno = EACCES;
		return -1;
	}
	given += size;
	return 0;
}

static void describe(void)
{
	struct buffer buffers[8];
	uint8_t how = (uint8_t)take_number(1);
	uint32_t count = 1 + (how >> 2 & 7), queue = how >> 5 & 3;
	uint8_t bytes[32];

	take(bytes, sizeof(bytes));
	poke(BUFFERS, bytes, sizeof(bytes));
	for (uint32_t i = 0; i < count; i++) {
		uint8_t what = (uint8_t)take_number(1);

		buffers[i].gpa = what & 1 ? interesting_address() : BUFFERS + 8 * i;
		buffers[i].length = what & 2 ? interesting_length() : what >> 4;
		buffers[i].flags = what & 4 ? (what >> 5 & 7)
					    : (queue == REPORTING ? VIRTIO_DESC_WRITE : 0);
		buffers[i].next = (uint16_t)(what >> 4);
	}
	offer(&drivers[queue], buffers, count, how & 1, how & 2);
}

static void start(void)
{
	loop = virtio_loop_new(device, QUEUES, -1);
	REQUIRE(loop);
	for (uint32_t i = 0; i < QUEUES; i++)
		REQUIRE(!virtio_loop_add(loop, i, &memory, &setups[i]));
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

static void operation(void)
{
	uint64_t values[BALLOON_STATISTICS];
	struct balloon_counters counters;
	uint8_t what = (uint8_t)take_number(1);

	switch (what & 7) {
	case 0: case 1:
		describe();
		return;
	case 2:
		poke_anything();
		return;
	case 3:
		balloon_ask(device);
		return;
	case 4:
		device->nudged(device, loop);
		return;
	case 5:
		balloon_statistics(device, values);
		balloon_read_counters(device, &counters);
		REQUIRE(counters.reported % PAGE == 0);
		return;
	case 6:
		if (what & 0x80) {
			stop();
			start();
		}
		return;
	default:
		device->kicked(device, loop, what >> 3 & 3);
		return;
	}
}

static void begin_anew(uint64_t features)
{
	uint64_t at = 0;

	make_memory();
	ram_region = memory.regions[0];
	for (uint32_t i = 0; i < QUEUES; i++) {
		at = (place_ring(&drivers[i], at, 4, features) + 63) & ~63ull;
		setups[i] = (struct virtqueue_setup){
			.descriptors = drivers[i].descriptors, .driver = drivers[i].driver,
			.device = drivers[i].device, .features = features, .size = 4,
			.base = drivers[i].packed ? 0x80008000 : 0, .kick = -1, .call = -1,
		};
	}
	REQUIRE(at <= BUFFERS);
}

static void check_service(uint64_t features)
{
	static const uint32_t numbers[] = { 4, 3, 5, 1u << 20, 16, 0 };
	struct buffer list[] = { { BUFFERS, sizeof(numbers), 0, 0 } };
	struct buffer pages[] = { { 0x1800, 0x2800, VIRTIO_DESC_WRITE, 0 },
				  { HIGH_GPA, PAGE, VIRTIO_DESC_WRITE, 0 } };
	struct balloon_counters before, after;

	is_refused = false;
	begin_anew(features);
	start();
	balloon_read_counters(device, &before);
	poke(BUFFERS, numbers, sizeof(numbers));
	offer(&drivers[INFLATE], list, 1, false, false);
	given = 0;
	device->kicked(device, loop, INFLATE);
	REQUIRE(given == 3 * PAGE);
	offer(&drivers[REPORTING], pages, 2, false, false);
	given = 0;
	device->kicked(device, loop, REPORTING);
	REQUIRE(given == 2 * PAGE);
	balloon_read_counters(device, &after);
	REQUIRE(after.inflated == before.inflated + 3);
	REQUIRE(after.reported == before.reported + 2 * PAGE);
	REQUIRE(after.refused == before.refused + 4);
	stop();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint8_t shape;
	uint64_t features;

	set_input(data, size);
	shape = (uint8_t)take_number(1);
	is_refused = shape & 8;
	features = (shape & 1 ? FEATURE_PACKED : 0) | (shape & 2 ? FEATURE_INDIRECT : 0) |
		   (shape & 4 ? FEATURE_EVENT_IDX : 0);
	begin_anew(features);
	device = balloon_new(&ram);
	REQUIRE(device);
	device->features = features;
	balloon_set_queues(device, STATISTICS, REPORTING);
	start();
	for (int count = 0; count < 64 && input_left && !virtio_loop_failure(loop); count++)
		operation();
	stop();
	check_service(features);
	balloon_free(device);
	return 0;
}
