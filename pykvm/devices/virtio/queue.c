#include "queue.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define F_INDIRECT_DESC		(1ULL << 28)
#define F_EVENT_IDX		(1ULL << 29)
#define F_RING_PACKED		(1ULL << 34)

#define PACKED_AVAIL		0x0080
#define PACKED_USED		0x8000

#define EVENTS_ON		0	/* flags of an event suppression structure (2.8.10) */
#define EVENTS_OFF		1
#define EVENTS_AT		2

#define READ_ONCE(type, from)		(*(const volatile type *)(from))
#define WRITE_ONCE(type, to, value)	(*(volatile type *)(to) = (type)(value))
#define LOAD_ACQUIRE(type, from)	__atomic_load_n((const type *)(from), __ATOMIC_ACQUIRE)
#define STORE_RELEASE(type, to, value)	__atomic_store_n((type *)(to), (value), __ATOMIC_RELEASE)
#define FULL_FENCE()			__atomic_thread_fence(__ATOMIC_SEQ_CST)

/* Parts of a split ring: {flags, index, ring[size], event}. */
#define SPLIT_FLAGS(ring)	(ring)
#define SPLIT_INDEX(ring)	((ring) + 2)
#define SPLIT_RING(ring)	((ring) + 4)

static uint8_t *used_event(const struct virtqueue *queue)
{
	return queue->driver + 4 + 2 * (size_t)queue->size;
}

static uint8_t *avail_event(const struct virtqueue *queue)
{
	return queue->device + 4 + 8 * (size_t)queue->size;
}

static int find_ring(struct virtqueue *queue, const struct virtqueue_setup *setup)
{
	const struct virtio_memory *memory = queue->memory;
	uint64_t size = queue->size;
	uint64_t driver = queue->packed ? 4 : 6 + 2 * size, device = queue->packed ? 4 : 6 + 8 * size;

	queue->descriptors = virtio_translate(memory, setup->descriptors, size * VIRTIO_DESC_BYTES,
					      16, queue->packed);
	queue->driver = virtio_translate(memory, setup->driver, driver, queue->packed ? 4 : 2, false);
	queue->device = virtio_translate(memory, setup->device, device, 4, true);
	if (!queue->descriptors || !queue->driver || !queue->device)
		return VIRTQUEUE_BAD_RING;
	return 0;
}

int virtqueue_init(struct virtqueue *queue, const struct virtio_memory *memory,
		   const struct virtqueue_setup *setup)
{
	uint32_t size = setup->size, base = setup->base;
	int fault;

	memset(queue, 0, sizeof(*queue));
	queue->memory = memory;
	queue->size = size;
	queue->kick = setup->kick;
	queue->call = setup->call;
	queue->most_bytes = setup->most_bytes ? setup->most_bytes : VIRTIO_CHAIN_BYTES;
	queue->packed = setup->features & F_RING_PACKED;
	queue->indirect = setup->features & F_INDIRECT_DESC;
	queue->event_idx = setup->features & F_EVENT_IDX;
	if (!size || size > VIRTQUEUE_MAX_SIZE || (!queue->packed && size & (size - 1)))
		return queue->broken = VIRTQUEUE_BAD_SIZE;
	fault = find_ring(queue, setup);
	if (fault)
		return queue->broken = fault;
	if (queue->packed) {
		queue->next = base & 0x7fff;
		queue->next_wrap = base >> 15 & 1;
		queue->used = base >> 16 & 0x7fff;
		queue->used_wrap = base >> 31;
		if (queue->next >= size || queue->used >= size)
			return queue->broken = VIRTQUEUE_BAD_BASE;
	} else {
		if (base > 0xffff)
			return queue->broken = VIRTQUEUE_BAD_BASE;
		/* Nothing is in flight, so as many are used as were taken. */
		queue->next = queue->used = (uint16_t)base;
	}
	return 0;
}

/* ------------------------------------------------------------------- take */

static bool is_available(const struct virtqueue *queue)
{
	const uint8_t *desc = queue->descriptors + queue->next * VIRTIO_DESC_BYTES;
	uint16_t flags;

	if (!queue->packed)
		return LOAD_ACQUIRE(uint16_t, SPLIT_INDEX(queue->driver)) != queue->next;
	flags = LOAD_ACQUIRE(uint16_t, desc + 14);
	return !!(flags & PACKED_AVAIL) == queue->next_wrap &&
	       !!(flags & PACKED_USED) != queue->next_wrap;
}

/* Adds what a descriptor in the ring itself describes; *more: the chain goes on. */
static int add(const struct virtqueue *queue, struct virtio_chain *chain,
	       const struct virtio_desc *desc, bool *more)
{
	*more = desc->flags & VIRTIO_DESC_NEXT;
	if (!(desc->flags & VIRTIO_DESC_INDIRECT))
		return virtio_chain_add(chain, queue->memory, queue->most_bytes, desc);
	if (!queue->indirect)
		return VIRTQUEUE_BAD_INDIRECT;
	if (*more)
		return VIRTQUEUE_NESTED;
	return virtio_chain_add_table(chain, queue->memory, queue->most_bytes, desc, queue->packed);
}

static int take_split(struct virtqueue *queue, struct virtio_chain *chain)
{
	uint16_t there = LOAD_ACQUIRE(uint16_t, SPLIT_INDEX(queue->driver));
	uint16_t at = queue->next & (queue->size - 1);
	uint32_t index, seen = 0;
	bool more;
	int fault;

	/* There are as many entries as descriptors, so what is in flight counts. */
	if ((uint32_t)(uint16_t)(there - queue->next) + queue->in_flight > queue->size)
		return VIRTQUEUE_RUN_AHEAD;
	index = READ_ONCE(uint16_t, SPLIT_RING(queue->driver) + 2 * at);
	chain->id = (uint16_t)index;
	do {
		struct virtio_desc desc;

		if (seen++ == queue->size)
			return VIRTQUEUE_LOOP;
		if (index >= queue->size)
			return VIRTQUEUE_BAD_INDEX;
		virtio_load_desc(&desc, queue->descriptors + index * VIRTIO_DESC_BYTES, false);
		index = desc.next;
		fault = add(queue, chain, &desc, &more);
		if (fault)
			return fault;
	} while (more);
	chain->slots = 1;
	queue->next++;
	return 0;
}

static int take_packed(struct virtqueue *queue, struct virtio_chain *chain)
{
	uint32_t at = queue->next, seen = 0;
	bool more;
	int fault;

	do {
		struct virtio_desc desc;

		if (seen == queue->size)
			return VIRTQUEUE_LOOP;
		if (queue->in_flight + ++seen > queue->size)
			return VIRTQUEUE_RUN_AHEAD;
		virtio_load_desc(&desc, queue->descriptors + at * VIRTIO_DESC_BYTES, true);
		chain->id = desc.next;	/* the last one's counts */
		at = at + 1 == queue->size ? 0 : at + 1;
		fault = add(queue, chain, &desc, &more);
		if (fault)
			return fault;
	} while (more);
	chain->slots = (uint16_t)seen;
	if (at <= queue->next)
		queue->next_wrap = !queue->next_wrap;
	queue->next = (uint16_t)at;
	return 0;
}

int virtqueue_take(struct virtqueue *queue, struct virtio_chain *chain)
{
	if (queue->broken)
		return -1;
	if (!is_available(queue))
		return 0;
	chain->reads = chain->writes = 0;
	chain->readable = chain->writable = 0;
	queue->broken = queue->packed ? take_packed(queue, chain) : take_split(queue, chain);
	if (queue->broken)
		return -1;
	queue->in_flight += chain->slots;
	return 1;
}

void virtqueue_untake(struct virtqueue *queue, const struct virtio_chain *chain)
{
	queue->in_flight -= chain->slots;
	if (!queue->packed) {
		queue->next--;
		return;
	}
	if (queue->next < chain->slots) {
		queue->next_wrap = !queue->next_wrap;
		queue->next = (uint16_t)(queue->next + queue->size - chain->slots);
	} else {
		queue->next -= chain->slots;
	}
}

/* -------------------------------------------------------------------- put */

void virtqueue_put(struct virtqueue *queue, const struct virtio_chain *chain, uint64_t written)
{
	uint32_t length = (uint32_t)(written < chain->writable ? written : chain->writable);
	uint8_t *entry;
	uint16_t flags;

	if (!queue->packed) {
		entry = SPLIT_RING(queue->device) + 8 * (size_t)(queue->used & (queue->size - 1));
		WRITE_ONCE(uint32_t, entry, chain->id);
		WRITE_ONCE(uint32_t, entry + 4, length);
		queue->used++;
		queue->unpublished++;
		return;
	}
	flags = (queue->used_wrap ? PACKED_AVAIL | PACKED_USED : 0) |
		(chain->writes ? VIRTIO_DESC_WRITE : 0);
	entry = queue->descriptors + (size_t)queue->used * VIRTIO_DESC_BYTES;
	WRITE_ONCE(uint32_t, entry + 8, length);
	WRITE_ONCE(uint16_t, entry + 12, chain->id);
	if (!queue->unpublished) {
		/* The driver looks at no later one before this one's flags are written. */
		queue->first = queue->used;
		queue->first_flags = flags;
	} else {
		STORE_RELEASE(uint16_t, entry + 14, flags);
	}
	queue->unpublished += chain->slots;
	queue->used += chain->slots;
	if (queue->used >= queue->size) {
		queue->used = (uint16_t)(queue->used - queue->size);
		queue->used_wrap = !queue->used_wrap;
	}
}

/* Whether at, where the driver wants to be told, is one of the last count entries before end. */
static bool is_passed(uint16_t at, uint16_t end, uint16_t count)
{
	return (uint16_t)(end - at - 1) < count;
}

static bool driver_wants_call(struct virtqueue *queue, uint16_t count)
{
	bool asked = queue->asked;
	uint32_t event;
	uint16_t at;

	queue->asked = true;
	if (!queue->packed) {
		if (!queue->event_idx)
			return !(READ_ONCE(uint16_t, SPLIT_FLAGS(queue->driver)) & 1);
		at = READ_ONCE(uint16_t, used_event(queue));
		/* The first time, nobody knows what an earlier device has told. */
		return !asked || is_passed(at, queue->used, count);
	}
	event = READ_ONCE(uint32_t, queue->driver);
	if ((event >> 16 & 3) == EVENTS_OFF)
		return false;
	if (!queue->event_idx || (event >> 16 & 3) != EVENTS_AT)
		return true;
	at = event & 0x7fff;
	if ((event >> 15 & 1) != queue->used_wrap)
		at = (uint16_t)(at - queue->size);	/* in the round before this one */
	return !asked || is_passed(at, queue->used, count);
}

bool virtqueue_flush(struct virtqueue *queue)
{
	const uint64_t one = 1;
	uint16_t count = queue->unpublished;

	if (!count)
		return false;
	queue->unpublished = 0;
	queue->in_flight -= count;
	if (queue->packed)
		STORE_RELEASE(uint16_t,
			      queue->descriptors + (size_t)queue->first * VIRTIO_DESC_BYTES + 14,
			      queue->first_flags);
	else
		STORE_RELEASE(uint16_t, SPLIT_INDEX(queue->device), queue->used);
	FULL_FENCE();	/* pairs with the driver's, between its wish and its look at the ring */
	if (!driver_wants_call(queue, count))
		return false;
	while (queue->call >= 0 && write(queue->call, &one, sizeof(one)) < 0 && errno == EINTR)
		;
	return true;
}

/* ------------------------------------------------------------------ kicks */

void virtqueue_disable_kicks(struct virtqueue *queue)
{
	if (queue->packed)
		WRITE_ONCE(uint32_t, queue->device, EVENTS_OFF << 16);
	else if (!queue->event_idx)
		WRITE_ONCE(uint16_t, SPLIT_FLAGS(queue->device), 1);
	/* With an event index, the old one asks for no kick before the ring has gone round. */
}

bool virtqueue_enable_kicks(struct virtqueue *queue)
{
	if (queue->packed && queue->event_idx)
		WRITE_ONCE(uint32_t, queue->device,
			   EVENTS_AT << 16 | (uint32_t)queue->next_wrap << 15 | queue->next);
	else if (queue->packed)
		WRITE_ONCE(uint32_t, queue->device, EVENTS_ON << 16);
	else if (queue->event_idx)
		WRITE_ONCE(uint16_t, avail_event(queue), queue->next);
	else
		WRITE_ONCE(uint16_t, SPLIT_FLAGS(queue->device), 0);
	FULL_FENCE();	/* either the driver sees the wish, or we see what it has made available */
	return !queue->broken && is_available(queue);
}

uint32_t virtqueue_base(const struct virtqueue *queue)
{
	if (!queue->packed)
		return queue->next;
	return queue->next | (uint32_t)queue->next_wrap << 15 | (uint32_t)queue->used << 16 |
	       (uint32_t)queue->used_wrap << 31;
}
