#include "chain.h"

#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "rings are little-endian");

static const char *const reasons[VIRTQUEUE_FAULTS] = {
	[VIRTQUEUE_WHOLE] = "nothing",
	[VIRTQUEUE_BAD_SIZE] = "a queue size that the ring cannot have",
	[VIRTQUEUE_BAD_RING] = "a ring outside of guest memory, or not aligned",
	[VIRTQUEUE_BAD_BASE] = "a starting position outside of the ring",
	[VIRTQUEUE_RUN_AHEAD] = "more available buffers than the ring has entries",
	[VIRTQUEUE_BAD_INDEX] = "a descriptor index outside of its table",
	[VIRTQUEUE_BAD_ADDRESS] = "a buffer outside of guest memory",
	[VIRTQUEUE_LOOP] = "a descriptor chain that does not end",
	[VIRTQUEUE_TOO_LONG] = "a descriptor chain that is too long",
	[VIRTQUEUE_WRONG_ORDER] = "a readable descriptor after a writable one",
	[VIRTQUEUE_BAD_INDIRECT] = "an indirect table that is not valid",
	[VIRTQUEUE_NESTED] = "an indirect descriptor where none may be",
};

const char *virtqueue_reason(int fault)
{
	return fault >= 0 && fault < VIRTQUEUE_FAULTS ? reasons[fault] : "an unknown fault";
}

/* One load of a field that need not be aligned: indirect tables lie where the driver wants. */
#define LOAD(type, from)                                                                           \
	(((const volatile struct { type value; } __attribute__((packed)) *)(from))->value)

void virtio_load_desc(struct virtio_desc *to, const uint8_t *from, bool packed)
{
	to->address = LOAD(uint64_t, from);
	to->length = LOAD(uint32_t, from + 8);
	to->flags = LOAD(uint16_t, from + (packed ? 14 : 12));
	to->next = LOAD(uint16_t, from + (packed ? 12 : 14));
}

/* Host address of gpa, and how many of size bytes lie there; NULL: none. */
static uint8_t *look_up(const struct virtio_memory *memory, uint64_t gpa, uint64_t size,
			bool writable, uint64_t *there)
{
	for (size_t i = 0; i < memory->count; i++) {
		const struct virtio_region *region = &memory->regions[i];
		uint64_t offset = gpa - region->gpa;

		if (gpa < region->gpa || offset >= region->size)
			continue;
		if (writable && region->read_only)
			return NULL;
		*there = region->size - offset < size ? region->size - offset : size;
		return region->host + offset;
	}
	return NULL;
}

void *virtio_translate(const struct virtio_memory *memory, uint64_t gpa, uint64_t size,
		       uint64_t alignment, bool writable)
{
	uint64_t there = 0;
	uint8_t *host = look_up(memory, gpa, size, writable, &there);

	/* Regions are aligned to pages in both address spaces, so gpa's alignment is host's. */
	return host && there == size && !(gpa & (alignment - 1)) ? host : NULL;
}

int virtio_chain_add(struct virtio_chain *chain, const struct virtio_memory *memory,
		     uint64_t most_bytes, const struct virtio_desc *desc)
{
	bool writable = desc->flags & VIRTIO_DESC_WRITE;
	uint64_t gpa = desc->address, left = desc->length;

	if (!writable && chain->writes)
		return VIRTQUEUE_WRONG_ORDER;
	if (chain->readable + chain->writable + left > most_bytes)
		return VIRTQUEUE_TOO_LONG;
	if (left && gpa + (left - 1) < gpa)
		return VIRTQUEUE_BAD_ADDRESS;
	while (left) {
		uint64_t there = 0;
		uint8_t *host = look_up(memory, gpa, left, writable, &there);
		uint32_t at = chain->reads + chain->writes;

		if (!host)
			return VIRTQUEUE_BAD_ADDRESS;
		if (at == chain->room)
			return VIRTQUEUE_TOO_LONG;
		chain->iov[at].iov_base = host;
		chain->iov[at].iov_len = there;
		if (writable) {
			chain->writes++;
			chain->writable += there;
		} else {
			chain->reads++;
			chain->readable += there;
		}
		gpa += there;
		left -= there;
	}
	return 0;
}

int virtio_chain_add_table(struct virtio_chain *chain, const struct virtio_memory *memory,
			   uint64_t most_bytes, const struct virtio_desc *desc, bool packed)
{
	uint32_t count = desc->length / VIRTIO_DESC_BYTES, at = 0;

	/* Its WRITE flag is to be ignored (2.7.5.3.2). */
	if (!count || desc->length % VIRTIO_DESC_BYTES)
		return VIRTQUEUE_BAD_INDIRECT;
	if (count > VIRTIO_CHAIN_IOVECS)
		return VIRTQUEUE_TOO_LONG;
	for (uint32_t seen = 0; seen < count; seen++) {
		uint64_t gpa = desc->address + (uint64_t)at * VIRTIO_DESC_BYTES;
		/* One by one: the table may go on in the next region. */
		const uint8_t *from = virtio_translate(memory, gpa, VIRTIO_DESC_BYTES, 1, false);
		struct virtio_desc entry;
		int fault;

		if (!from || gpa < desc->address)
			return VIRTQUEUE_BAD_ADDRESS;
		virtio_load_desc(&entry, from, packed);
		if (entry.flags & VIRTIO_DESC_INDIRECT)
			return VIRTQUEUE_NESTED;
		fault = virtio_chain_add(chain, memory, most_bytes, &entry);
		if (fault)
			return fault;
		if (packed) {
			at++;	/* all entries in order, whatever else their flags say (2.8.7) */
			continue;
		}
		if (!(entry.flags & VIRTIO_DESC_NEXT))
			return 0;
		if (entry.next >= count)
			return VIRTQUEUE_BAD_INDEX;
		at = entry.next;
	}
	return packed ? 0 : VIRTQUEUE_LOOP;
}

/* Copies between the chain's iovecs [first, end) and one buffer. */
static size_t copy(const struct virtio_chain *chain, uint32_t first, uint32_t end, uint64_t offset,
		   void *to, const void *from, size_t size)
{
	size_t done = 0;

	for (uint32_t i = first; i < end && done < size; i++) {
		const struct iovec *iov = &chain->iov[i];
		size_t part;

		if (offset >= iov->iov_len) {
			offset -= iov->iov_len;
			continue;
		}
		part = iov->iov_len - offset;
		if (part > size - done)
			part = size - done;
		if (to)
			memcpy((uint8_t *)to + done, (uint8_t *)iov->iov_base + offset, part);
		else
			memcpy((uint8_t *)iov->iov_base + offset, (const uint8_t *)from + done, part);
		done += part;
		offset = 0;
	}
	/* The compiler may not read guest memory again in place of the copy. */
	__asm__ volatile("" : : "r"(to) : "memory");
	return done;
}

size_t virtio_chain_read(const struct virtio_chain *chain, uint64_t offset, void *to, size_t size)
{
	return copy(chain, 0, chain->reads, offset, to, NULL, size);
}

size_t virtio_chain_write(const struct virtio_chain *chain, uint64_t offset, const void *from,
			  size_t size)
{
	return copy(chain, chain->reads, chain->reads + chain->writes, offset, NULL, from, size);
}

int virtio_chain_slice(const struct virtio_chain *chain, bool writable, uint64_t offset,
		       uint64_t size, struct iovec *out, uint32_t room)
{
	uint32_t first = writable ? chain->reads : 0, n = 0;
	uint32_t end = writable ? chain->reads + chain->writes : chain->reads;
	uint64_t bytes = writable ? chain->writable : chain->readable;

	if (offset > bytes || size > bytes - offset)
		return -1;
	for (uint32_t i = first; i < end && size; i++) {
		const struct iovec *iov = &chain->iov[i];

		if (offset >= iov->iov_len) {
			offset -= iov->iov_len;
			continue;
		}
		if (n == room)
			return -1;
		out[n].iov_base = (uint8_t *)iov->iov_base + offset;
		out[n].iov_len = iov->iov_len - offset < size ? iov->iov_len - offset : size;
		size -= out[n++].iov_len;
		offset = 0;
	}
	return (int)n;
}
