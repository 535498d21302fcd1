#include "balloon.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { INFLATE, DEFLATE };	/* queues (5.5.2) */

#define PAGE_SHIFT	12	/* of the balloon, whatever the guest's pages are */
#define PAGE		4096ULL
#define NUMBERS		1024	/* page numbers in a request; Linux sends 256 */
#define STATISTIC	10	/* bytes: tag and value */

struct balloon {
	struct virtio_device device;
	struct virtio_memory ram;
	int statistics, reporting;
	bool holds;			/* the buffer that the next statistics go into */
	struct virtio_chain held;
	int asked;			/* atomic, like all that follows */
	uint32_t told;
	uint64_t values[BALLOON_STATISTICS];
	struct balloon_counters counters;
	struct virtio_region regions[];
};

static void count(uint64_t *counter, uint64_t more)
{
	/* One thread writes, others read. */
	__atomic_store_n(counter, *counter + more, __ATOMIC_RELAXED);
}

/*
 * Lets the host have the memory, which reads as zeros afterwards. What cannot be given back, such as
 * a part of a huge page, stays as it is.
 */
static void give_back(uint8_t *host, uint64_t size)
{
	if (size && madvise(host, size, MADV_REMOVE) && errno == EACCES)
		madvise(host, size, MADV_DONTNEED);	/* a private mapping */
}

/* ---------------------------------------------------------------- balloon */

/* Adjacent pages, which cost one call. */
struct run {
	uint8_t *host;
	uint64_t size;
};

static void add_page(struct run *run, uint8_t *host)
{
	if (run->size && host == run->host + run->size) {
		run->size += PAGE;
	} else if (run->size && host + PAGE == run->host) {
		run->host = host;
		run->size += PAGE;
	} else {
		give_back(run->host, run->size);
		run->host = host;
		run->size = PAGE;
	}
}

static int64_t inflate(struct virtio_device *device, struct virtio_loop *loop, uint32_t index,
		       struct virtio_chain *chain)
{
	struct balloon *balloon = (struct balloon *)device;
	uint32_t numbers[NUMBERS];
	uint64_t given = 0, there = chain->readable / sizeof(numbers[0]);
	size_t n = virtio_chain_read(chain, 0, numbers, sizeof(numbers)) / sizeof(numbers[0]);
	struct run run = { 0 };

	(void)loop, (void)index;
	for (size_t i = 0; i < n; i++) {
		uint64_t gpa = (uint64_t)le32toh(numbers[i]) << PAGE_SHIFT;
		uint8_t *host = virtio_translate(&balloon->ram, gpa, PAGE, PAGE, true);

		if (!host)
			continue;
		add_page(&run, host);
		given++;
	}
	give_back(run.host, run.size);
	count(&balloon->counters.inflated, given);
	count(&balloon->counters.refused, there - given);
	return 0;
}

static int64_t deflate(struct virtio_device *device, struct virtio_loop *loop, uint32_t index,
		       struct virtio_chain *chain)
{
	struct balloon *balloon = (struct balloon *)device;

	(void)loop, (void)index;
	count(&balloon->counters.deflated, chain->readable / sizeof(uint32_t));
	return 0;
}

/* -------------------------------------------------------------- reporting */

static bool is_ram(const struct virtio_memory *ram, const uint8_t *host, uint64_t size)
{
	for (size_t i = 0; i < ram->count; i++) {
		const struct virtio_region *region = &ram->regions[i];
		uintptr_t offset = (uintptr_t)host - (uintptr_t)region->host;

		if ((uintptr_t)host >= (uintptr_t)region->host && offset < region->size)
			return !region->read_only && size <= region->size - offset;
	}
	return false;
}

/* The buffers are the pages themselves. */
static int64_t report(struct virtio_device *device, struct virtio_loop *loop, uint32_t index,
		      struct virtio_chain *chain)
{
	struct balloon *balloon = (struct balloon *)device;

	(void)loop, (void)index;
	for (uint32_t i = chain->reads; i < chain->reads + chain->writes; i++) {
		uint8_t *host = chain->iov[i].iov_base;
		uint64_t size = chain->iov[i].iov_len;
		uint64_t before = -(uintptr_t)host & (PAGE - 1);

		if (!is_ram(&balloon->ram, host, size)) {
			count(&balloon->counters.refused, 1);
			continue;
		}
		if (size < before + PAGE)
			continue;
		size = (size - before) & ~(PAGE - 1);
		give_back(host + before, size);
		count(&balloon->counters.reported, size);
	}
	return 0;
}

/* ------------------------------------------------------------- statistics */

static void read_statistics(struct balloon *balloon, const struct virtio_chain *chain)
{
	uint8_t bytes[BALLOON_STATISTICS * STATISTIC];
	size_t n = virtio_chain_read(chain, 0, bytes, sizeof(bytes)) / STATISTIC;
	uint32_t told = balloon->told;

	for (size_t i = 0; i < n; i++) {
		uint16_t tag;
		uint64_t value;

		memcpy(&tag, bytes + i * STATISTIC, sizeof(tag));
		memcpy(&value, bytes + i * STATISTIC + sizeof(tag), sizeof(value));
		tag = le16toh(tag);
		if (tag >= BALLOON_STATISTICS)
			continue;
		__atomic_store_n(&balloon->values[tag], le64toh(value), __ATOMIC_RELAXED);
		told |= 1U << tag;
	}
	__atomic_store_n(&balloon->told, told, __ATOMIC_RELEASE);
}

/* The driver sends its buffer back with statistics, and it stays here until some are wanted. */
static int64_t keep(struct virtio_device *device, struct virtio_loop *loop, uint32_t index,
		    struct virtio_chain *chain)
{
	struct balloon *balloon = (struct balloon *)device;

	(void)index;
	if (balloon->holds)
		return VIRTIO_NOT_NOW;	/* one is enough */
	read_statistics(balloon, chain);
	virtio_loop_tell(loop);
	balloon->held = *chain;
	balloon->holds = true;
	return VIRTIO_KEPT;
}

static void nudged(struct virtio_device *device, struct virtio_loop *loop)
{
	struct balloon *balloon = (struct balloon *)device;
	struct virtqueue *queue = virtio_loop_queue(loop, (uint32_t)balloon->statistics);

	if (!queue || !balloon->holds || !__atomic_exchange_n(&balloon->asked, 0, __ATOMIC_ACQ_REL))
		return;
	virtqueue_put(queue, &balloon->held, 0);
	virtqueue_flush(queue);
	balloon->holds = false;
	virtio_loop_again(loop, (uint32_t)balloon->statistics);
}

/* ----------------------------------------------------------------- device */

static void kicked(struct virtio_device *device, struct virtio_loop *loop, uint32_t index)
{
	const struct balloon *balloon = (const struct balloon *)device;

	if (index == INFLATE)
		virtio_loop_serve(loop, index, inflate);
	else if (index == DEFLATE)
		virtio_loop_serve(loop, index, deflate);
	else if ((int)index == balloon->statistics)
		virtio_loop_serve(loop, index, keep);
	else if ((int)index == balloon->reporting)
		virtio_loop_serve(loop, index, report);
}

static void drain(struct virtio_device *device, struct virtio_loop *loop)
{
	struct balloon *balloon = (struct balloon *)device;

	if (balloon->holds)
		virtqueue_untake(virtio_loop_queue(loop, (uint32_t)balloon->statistics),
				 &balloon->held);
	balloon->holds = false;
}

struct virtio_device *balloon_new(const struct virtio_memory *ram)
{
	size_t size = ram->count * sizeof(*ram->regions);
	struct balloon *balloon = calloc(1, sizeof(*balloon) + size);

	if (!balloon)
		return NULL;
	balloon->device.kicked = kicked;
	balloon->device.nudged = nudged;
	balloon->device.drain = drain;
	memcpy(balloon->regions, ram->regions, size);
	balloon->ram.count = ram->count;
	balloon->ram.regions = balloon->regions;
	balloon->statistics = balloon->reporting = -1;
	return &balloon->device;
}

void balloon_free(struct virtio_device *device)
{
	free(device);	/* begins where its balloon does */
}

void balloon_set_queues(struct virtio_device *device, int statistics, int reporting)
{
	struct balloon *balloon = (struct balloon *)device;

	balloon->statistics = statistics;
	balloon->reporting = reporting;
}

void balloon_read_counters(const struct virtio_device *device, struct balloon_counters *out)
{
	const struct balloon_counters *from = &((const struct balloon *)device)->counters;

	out->inflated = __atomic_load_n(&from->inflated, __ATOMIC_RELAXED);
	out->deflated = __atomic_load_n(&from->deflated, __ATOMIC_RELAXED);
	out->reported = __atomic_load_n(&from->reported, __ATOMIC_RELAXED);
	out->refused = __atomic_load_n(&from->refused, __ATOMIC_RELAXED);
}

void balloon_ask(struct virtio_device *device)
{
	__atomic_store_n(&((struct balloon *)device)->asked, 1, __ATOMIC_RELEASE);
}

uint32_t balloon_statistics(const struct virtio_device *device, uint64_t *values)
{
	const struct balloon *balloon = (const struct balloon *)device;
	uint32_t told = __atomic_load_n(&balloon->told, __ATOMIC_ACQUIRE);

	for (int tag = 0; tag < BALLOON_STATISTICS; tag++)
		values[tag] = __atomic_load_n(&balloon->values[tag], __ATOMIC_RELAXED);
	return told;
}
