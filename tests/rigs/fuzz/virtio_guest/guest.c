/* SPDX-License-Identifier: Apache-2.0 */
#include "guest.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ----------------------------------------------------------------- memory */

static struct virtio_region regions[] = {
	{ .gpa = LOW_GPA, .size = LOW_SIZE },
	{ .gpa = HIGH_GPA, .size = HIGH_SIZE },
	{ .gpa = ROM_GPA, .size = ROM_SIZE, .read_only = true },
};

#define REGIONS (sizeof(regions) / sizeof(regions[0]))

struct virtio_memory memory = { .count = REGIONS, .regions = regions };

void make_memory(void)
{
	for (size_t i = 0; i < REGIONS; i++) {
		if (!regions[i].host)
			regions[i].host = aligned_alloc(PAGE, regions[i].size);
		REQUIRE(regions[i].host);
		memset(regions[i].host, 0, regions[i].size);
	}
}

bool inside(const void *at, size_t bytes, const void *start, uint64_t size)
{
	return (const uint8_t *)at >= (const uint8_t *)start &&
	       (const uint8_t *)at + bytes <= (const uint8_t *)start + size;
}

bool is_guest(const void *at, size_t bytes, bool writable)
{
	for (size_t i = 0; i < REGIONS; i++) {
		if (inside(at, bytes, regions[i].host, regions[i].size))
			return !writable || !regions[i].read_only;
	}
	return false;
}

uint64_t interesting_address(void)
{
	static const uint64_t places[] = {
		0, 0x3000, 0x3800, HIGH_GPA - 8, HIGH_GPA - 16, HIGH_GPA, HIGH_GPA + 0x800,
		HIGH_GPA + HIGH_SIZE - 16, HIGH_GPA + HIGH_SIZE, ROM_GPA, ROM_GPA + ROM_SIZE - 8,
		1ull << 32, 0 - 8ull, 0 - 4096ull,
	};
	uint8_t what = (uint8_t)take_number(1);

	if (what < 0xf0)
		return places[what % (sizeof(places) / sizeof(places[0]))] + (what >> 6) * 4;
	return take_number(what & 1 ? 8 : 2);
}

uint32_t interesting_length(void)
{
	static const uint32_t lengths[] = { 0, 1, 8, 16, 32, 512, 513, 4096, 0x7ffff000, ~0u };
	uint8_t what = (uint8_t)take_number(1);

	if (what < 0xf0)
		return lengths[what % (sizeof(lengths) / sizeof(lengths[0]))];
	return (uint32_t)take_number(what & 1 ? 4 : 2);
}

void poke(uint64_t gpa, const void *bytes, size_t count)
{
	const uint8_t *from = bytes;

	for (size_t done = 0; done < count; done++) {
		for (size_t i = 0; i < REGIONS; i++) {
			if (gpa + done - regions[i].gpa < regions[i].size)
				regions[i].host[gpa + done - regions[i].gpa] = from[done];
		}
	}
}

void poke_anything(void)
{
	uint8_t bytes[64];
	uint64_t at = take_number(2);
	size_t count = 1 + (take_number(1) & 63);

	take(bytes, count);
	poke(at, bytes, count);
}

void check_chain(const struct virtio_chain *chain, uint64_t most_bytes)
{
	uint64_t sums[2] = { 0, 0 };

	REQUIRE(chain->reads + chain->writes <= chain->room);
	for (uint32_t i = 0; i < chain->reads + chain->writes; i++) {
		bool writable = i >= chain->reads;

		REQUIRE(chain->iov[i].iov_len);
		REQUIRE(is_guest(chain->iov[i].iov_base, chain->iov[i].iov_len, writable));
		sums[writable] += chain->iov[i].iov_len;
	}
	REQUIRE(sums[0] == chain->readable && sums[1] == chain->writable);
	REQUIRE(sums[0] + sums[1] <= most_bytes);
}

/* ------------------------------------------------------------ interference */

void (*on_access)(uint8_t *at, size_t bytes, bool store);

void interfere(uint8_t *at, size_t bytes)
{
	uint8_t what, fresh[16];

	if (!input_left || bytes > sizeof(fresh))
		return;
	what = (uint8_t)take_number(1);
	if (what < 0xa0)
		return;
	if (what < 0xd0) {
		take(fresh, bytes);
		memcpy(at, fresh, bytes);
	} else {
		at[what & (bytes - 1)] ^= (uint8_t)(1 << (what >> 2 & 7));
	}
}

bool is_changing;

size_t changing_chain_read(const struct virtio_chain *chain, uint64_t offset, void *to,
			   size_t size)
{
	uint8_t what = is_changing ? (uint8_t)take_number(1) : 0;
	struct iovec piece;

	if (what >= 0x80 && size &&
	    virtio_chain_slice(chain, false, offset + what % size, 1, &piece, 1) == 1)
		*(uint8_t *)piece.iov_base = (uint8_t)take_number(1);
	return virtio_chain_read(chain, offset, to, size);
}

static void access(void *at, size_t bytes, bool store)
{
	if (on_access && is_guest(at, 1, false))
		on_access(at, bytes, store);
}

void __sanitizer_cov_load1(uint8_t *at) { access(at, 1, false); }
void __sanitizer_cov_load2(uint16_t *at) { access(at, 2, false); }
void __sanitizer_cov_load4(uint32_t *at) { access(at, 4, false); }
void __sanitizer_cov_load8(uint64_t *at) { access(at, 8, false); }
void __sanitizer_cov_load16(__int128 *at) { access(at, 16, false); }
void __sanitizer_cov_store1(uint8_t *at) { access(at, 1, true); }
void __sanitizer_cov_store2(uint16_t *at) { access(at, 2, true); }
void __sanitizer_cov_store4(uint32_t *at) { access(at, 4, true); }
void __sanitizer_cov_store8(uint64_t *at) { access(at, 8, true); }
void __sanitizer_cov_store16(__int128 *at) { access(at, 16, true); }

/* ------------------------------------------------------------------ driver */

uint64_t place_ring(struct driver *driver, uint64_t gpa, uint32_t size, uint64_t features)
{
	*driver = (struct driver){
		.packed = features & FEATURE_PACKED,
		.indirect = features & FEATURE_INDIRECT,
		.size = size,
		.descriptors = gpa,
		.wrap = true,
	};
	/* Gaps of 64 bytes: what is read or written behind a part is seen. */
	driver->driver = gpa + 16 * size + 64;
	driver->device = (driver->driver + 6 + 2 * size + 64 + 3) & ~3ull;
	driver->table = (driver->device + 6 + 8 * size + 64 + 15) & ~15ull;
	return driver->table + 16 * 16;
}

static void poke_number(uint64_t gpa, uint64_t number, size_t bytes)
{
	poke(gpa, &number, bytes);
}

static void write_descriptor(uint64_t gpa, const struct buffer *buffer, bool packed)
{
	poke_number(gpa, buffer->gpa, 8);
	poke_number(gpa + 8, buffer->length, 4);
	poke_number(gpa + (packed ? 14 : 12), buffer->flags, 2);
	poke_number(gpa + (packed ? 12 : 14), buffer->next, 2);
}

void offer(struct driver *driver, struct buffer *buffers, uint32_t count, bool as_table, bool raw)
{
	struct buffer table = { driver->table, count * 16, VIRTIO_DESC_INDIRECT, 0 };
	uint16_t place = driver->next % driver->size;

	for (uint32_t i = 0; i < count && !raw; i++) {
		buffers[i].next = (uint16_t)(as_table ? i + 1 : (place + i + 1) % driver->size);
		buffers[i].flags |= i + 1 < count ? VIRTIO_DESC_NEXT : 0;
		if (driver->packed)
			buffers[i].next = driver->next;
	}
	if (as_table) {
		for (uint32_t i = 0; i < count; i++)
			write_descriptor(driver->table + 16 * i, &buffers[i], driver->packed);
		buffers = &table;
		count = 1;
	}
	for (uint32_t i = 0; i < count; i++) {
		struct buffer entry = buffers[i];
		uint64_t at = driver->descriptors + 16 * ((place + i) % driver->size);

		if (driver->packed)
			entry.flags |= driver->wrap ? 0x0080 : 0x8000;
		write_descriptor(at, &entry, driver->packed);
		if (driver->packed && (place + i + 1) % driver->size == 0)
			driver->wrap = !driver->wrap;
	}
	if (driver->packed) {
		driver->next = (uint16_t)((place + count) % driver->size);
	} else {
		poke_number(driver->driver + 4 + 2 * place, place, 2);
		poke_number(driver->driver + 2, ++driver->next, 2);
	}
}

static uint64_t peek(uint64_t gpa, size_t bytes)
{
	uint64_t number = 0;

	for (size_t i = 0; i < REGIONS; i++) {
		if (gpa - regions[i].gpa < regions[i].size)
			memcpy(&number, regions[i].host + (gpa - regions[i].gpa), bytes);
	}
	return number;
}

bool is_used(const struct driver *driver, uint16_t at, uint16_t *id, uint32_t *written)
{
	uint64_t entry = driver->device + 4 + 8 * (at % driver->size);
	uint64_t desc = driver->descriptors + 16 * (at % driver->size);
	uint16_t flags;

	if (!driver->packed) {
		*id = (uint16_t)peek(entry, 4);
		*written = (uint32_t)peek(entry + 4, 4);
		return (uint16_t)(peek(driver->device + 2, 2) - at - 1) < 0x8000;
	}
	flags = (uint16_t)peek(desc + 14, 2);
	*id = (uint16_t)peek(desc + 12, 2);
	*written = (uint32_t)peek(desc + 8, 4);
	return !!(flags & 0x80) == !!(flags & 0x8000) &&
	       !!(flags & 0x80) == !((at / driver->size) & 1);
}
