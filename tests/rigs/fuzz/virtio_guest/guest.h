/* SPDX-License-Identifier: Apache-2.0 */
/* A guest for fuzzing virtio devices: memory in a few regions, and what may touch it. */
#ifndef GUEST_H
#define GUEST_H

#include "input.h"
#include "queue.h"

#define PAGE 4096

/* ----------------------------------------------------------------- memory */

/*
 * Two regions that follow each other for the guest and nowhere else, one that is read-only, and a
 * gap between. ASan watches the edges of each.
 */
enum { LOW_GPA = 0, LOW_SIZE = 5 * PAGE, HIGH_GPA = LOW_SIZE, HIGH_SIZE = 2 * PAGE,
       ROM_GPA = 0x10000, ROM_SIZE = PAGE };

extern struct virtio_memory memory;

/* All of it zero. */
void make_memory(void);
/* An address of the guest's that is worth trying. */
uint64_t interesting_address(void);
uint32_t interesting_length(void);
/* Writes what lies in the guest's memory, and leaves out the rest. */
void poke(uint64_t gpa, const void *bytes, size_t count);
/* Arbitrary bytes anywhere. */
void poke_anything(void);
/* Whether the guest has all of it at this host address, and lets devices write it. */
bool is_guest(const void *at, size_t bytes, bool writable);
bool inside(const void *at, size_t bytes, const void *start, uint64_t size);
/* The iovecs of a chain that was taken, of a queue of this device's bounds. */
void check_chain(const struct virtio_chain *chain, uint64_t most_bytes);

/* ------------------------------------------------------------ interference */

/* Asked at each access of guest memory by the traced sources, while it is not NULL. */
extern void (*on_access)(uint8_t *at, size_t bytes, bool store);
/* virtio_chain_read(), of a chain that perhaps has been written meanwhile. */
size_t changing_chain_read(const struct virtio_chain *chain, uint64_t offset, void *to,
			   size_t size);
extern bool is_changing;
/* Before a load: perhaps the guest has written other bytes there. */
void interfere(uint8_t *at, size_t bytes);

/* ------------------------------------------------------------------ driver */

struct driver {
	bool packed, indirect;
	uint32_t size;
	uint64_t descriptors, driver, device; /* GPAs */
	uint64_t table; /* of 16 descriptors, for an indirect chain */
	uint16_t next;
	bool wrap;
};

struct buffer {
	uint64_t gpa;
	uint32_t length;
	uint16_t flags;
	uint16_t next;
};

/* Places for a ring; its indirect table is behind them. Returns the GPA behind all of it. */
uint64_t place_ring(struct driver *driver, uint64_t gpa, uint32_t size, uint64_t features);
/* Makes a chain available; buffers' next and NEXT flags are set unless the chain is raw. */
void offer(struct driver *driver, struct buffer *buffers, uint32_t count, bool as_table, bool raw);
/* Of an honest driver: whether the device has used entry at, counted from the ring's beginning. */
bool is_used(const struct driver *driver, uint16_t at, uint16_t *id, uint32_t *written);

#define FEATURE_INDIRECT (1ull << 28)
#define FEATURE_EVENT_IDX (1ull << 29)
#define FEATURE_PACKED (1ull << 34)

#endif
