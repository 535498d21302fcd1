/* SPDX-License-Identifier: Apache-2.0 */
/* The switch that is fuzzed, and its windows. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fuzzer.h"

/* ------------------------------------------------------------------ memory */

struct switch_shared *shared;
uint8_t *windows;
uint8_t *expected; /* what the windows must hold outside the lanes of calls under way */
uint64_t window_size;
uint32_t ports, tx_slots, lane_slots, frame_limit, group_forward_mask;

struct switch_window *window_of(uint32_t port)
{
	return (struct switch_window *)(windows + port * window_size);
}

static void allocate(void)
{
	uint64_t most = PORTS * switch_window_size(PORTS, SLOTS, SLOTS);

	/* ASan watches the edges of both; between windows the hooks and the comparison do. */
	shared = aligned_alloc(4096, (sizeof(*shared) + 4095) & ~4095ul);
	windows = aligned_alloc(4096, most);
	expected = aligned_alloc(4096, most);
	REQUIRE(shared && windows && expected);
}

void poke(uint8_t *at, const void *bytes, size_t count)
{
	memcpy(at, bytes, count);
	memcpy(expected + (at - windows), bytes, count);
}

void expect_window(uint32_t port)
{
	memcpy(expected + port * window_size, windows + port * window_size, window_size);
}
bool inside(const uint8_t *at, size_t bytes, const void *start, uint64_t size)
{
	return at >= (const uint8_t *)start && at + bytes <= (const uint8_t *)start + size;
}

void make_switch(uint8_t geometry)
{
	static const uint32_t limits[] = {SWITCH_DEFAULT_FRAME, 64, SWITCH_MAX_FRAME, SWITCH_MIN_FRAME};

	if (!shared)
		allocate();
	ports = 2 + (geometry & 3);
	tx_slots = 1u << (geometry >> 2 & 3);
	lane_slots = 1u << (geometry >> 4 & 3);
	frame_limit = limits[geometry >> 6];
	group_forward_mask = ports == 3 ? 1 << 14 : 0; /* LLDP */
	window_size = switch_window_size(ports, tx_slots, lane_slots);
	switch_initialise(shared, ports, tx_slots, lane_slots, frame_limit, 2,
			  group_forward_mask, HASH_SEED);
	memset(windows, 0, ports * window_size);
	memset(expected, 0, ports * window_size);
}
