/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzes the switch with everything that guests control: the contents of all windows, at every
 * single moment, the arguments of calls, and the order in which calls, deaths and the host's own
 * steps happen. Built by tests/switch/fuzz/build.py with libFuzzer; docs/fuzzing.md explains it.
 *
 * switch.c is compiled with -fsanitize-coverage=trace-loads,trace-stores, so the compiler calls
 * __sanitizer_cov_loadN before every load and __sanitizer_cov_storeN before every store:
 *
 *  - Before a load from a window the input may put other bytes there. So no two reads of the same
 *    place need to agree, which is more than the fastest hostile guest can do.
 *  - Before any access the input may let another port's call or a step of the host run to its end
 *    (a vCPU that stops here and goes on later), or leave the call for ever (one that is killed).
 *  - Each access is compared with the few places that a call of this port has any business with.
 *
 * After each call the counters must add up, what was delivered must have been for that port, and
 * every byte of every window outside the caller's lanes must be as it was. Anything else aborts.
 */
#include <setjmp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "elisa_memory.h"
#include "elisa_object.h"
#include "switch.h"

#include "admin.h"

#define PORTS 5       /* most ports of one run */
#define SLOTS 8       /* most transmit slots, and slots of a lane */
#define DEPTH 3       /* calls inside each other */
#define OPERATIONS 96 /* of one input */
/* Accesses of a copy: two for each of the bytes that are moved one by one, or for eight. */
#define STRING_MOVE_MOST 600

#define REQUIRE(condition) ((condition) ? (void)0 : broken(__LINE__, #condition))

static void broken(int line, const char *condition)
{
	fprintf(stderr, "window_fuzzer.c:%d: invariant broken: %s\n", line, condition);
	abort();
}

/* ------------------------------------------------------------------- input */

static const uint8_t *input;
static size_t input_left;

static void take(void *to, size_t bytes)
{
	size_t there = bytes < input_left ? bytes : input_left;

	memset(to, 0, bytes);
	memcpy(to, input, there);
	input += there;
	input_left -= there;
}

static uint64_t take_number(size_t bytes)
{
	uint64_t number = 0;

	take(&number, bytes);
	return number;
}

/* ------------------------------------------------------------------ memory */

static struct switch_shared *shared;
static uint8_t *windows;
static uint8_t *expected; /* what the windows must hold outside the lanes of calls under way */
static uint64_t window_size;
static uint32_t ports, tx_slots, lane_slots, frame_limit;

static struct switch_window *window_of(uint32_t port)
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

/* A guest writes into its window. */
static void poke(uint8_t *at, const void *bytes, size_t count)
{
	memcpy(at, bytes, count);
	memcpy(expected + (at - windows), bytes, count);
}

static void expect_window(uint32_t port)
{
	memcpy(expected + port * window_size, windows + port * window_size, window_size);
}

/* --------------------------------------------------------- calls under way */

struct active {
	uint32_t id;
	uint64_t enabled;   /* at the beginning */
	uint64_t began;     /* moment */
	uint64_t accesses;  /* of memory, so far */
	uint64_t most;      /* that the call may make */
	uint32_t tail[PORTS]; /* last value read of each receiver's tail */
	uint8_t mode;       /* which accesses ask the input for interference */
	jmp_buf killed;
};

enum { MODE_LOADS = 1, MODE_SHARED = 2, MODE_NESTED = 4 };

static struct active actives[DEPTH];
static int depth; /* calls under way */
static uint64_t moment;
static uint64_t disabled_at[PORTS];
static bool dead[PORTS];    /* killed, and not given up by the host yet */
static bool touched[PORTS]; /* its guest wrote the window during the outermost call */

static void operation(void);

/* Which places a call may load from and store to. */

static bool inside(const uint8_t *at, size_t bytes, const void *start, uint64_t size)
{
	return at >= (const uint8_t *)start && at + bytes <= (const uint8_t *)start + size;
}

static bool may_load(const struct active *active, const uint8_t *at, size_t bytes)
{
	struct switch_window *own = window_of(active->id);

	if (inside(at, bytes, own->tx_length, tx_slots * sizeof(own->tx_length[0])) ||
	    inside(at, bytes, own->tx_frame, tx_slots * SWITCH_SLOT_BYTES))
		return true;
	for (uint32_t port = 0; port < ports; port++) {
		if (port != active->id && active->enabled >> port & 1 &&
		    inside(at, bytes, &window_of(port)->lane[active->id].tail, 4))
			return true;
	}
	return false;
}

static bool may_store(const struct active *active, const uint8_t *at, size_t bytes)
{
	if (inside(at, bytes, &shared->port[active->id], sizeof(shared->port[0])))
		return true;
	for (uint32_t port = 0; port < ports; port++) {
		struct switch_window *window = window_of(port);

		if (port == active->id || !(active->enabled >> port & 1))
			continue;
		if (inside(at, bytes, &shared->lane[active->id][port], sizeof(shared->lane[0][0])) ||
		    inside(at, bytes, &window->lane[active->id].head, 4) ||
		    inside(at, bytes,
			   (uint8_t *)window + switch_lane_offset(tx_slots, lane_slots, active->id),
			   (uint64_t)lane_slots * SWITCH_SLOT_BYTES))
			return true;
	}
	return false;
}

/* Of `shared`, a call reads the geometry, the table, and its own port and lanes. */
static bool may_load_shared(const struct active *active, const uint8_t *at, size_t bytes)
{
	return inside(at, bytes, shared, __builtin_offsetof(struct switch_shared, port)) ||
	       inside(at, bytes, &shared->port[active->id], sizeof(shared->port[0])) ||
	       inside(at, bytes, shared->table, sizeof(shared->table)) ||
	       inside(at, bytes, shared->lane[active->id], sizeof(shared->lane[0]));
}

static void interfere(struct active *active, uint8_t *at, size_t bytes, bool window)
{
	uint8_t what, fresh[16];

	if (!input_left || !(active->mode & (window ? MODE_LOADS : MODE_SHARED)))
		return;
	what = (uint8_t)take_number(1);
	if (what < 0x60)
		return;
	if (what < 0xc0 && window) {
		take(fresh, bytes);
		poke(at, fresh, bytes);
	} else if (what < 0xe0 && window) {
		memcpy(fresh, at, bytes);
		fresh[what & (bytes - 1)] ^= (uint8_t)(1 << (what >> 2 & 7));
		poke(at, fresh, bytes);
	} else if (what < 0xfc && active->mode & MODE_NESTED) {
		operation();
	} else if (what >= 0xfc) {
		longjmp(active->killed, 1);
	}
}

static void on_access(uint8_t *at, size_t bytes, bool store)
{
	struct active *active = depth ? &actives[depth - 1] : 0;
	bool in_windows = inside(at, 1, windows, ports * window_size);
	bool in_shared = inside(at, 1, shared, sizeof(*shared));

	if (!active || (!in_windows && !in_shared))
		return; /* the stack, or a constant */
	REQUIRE(++active->accesses <= active->most);
	if (store) {
		REQUIRE(may_store(active, at, bytes));
		interfere(active, at, bytes, false);
	} else if (in_shared) {
		REQUIRE(may_load_shared(active, at, bytes));
		interfere(active, at, bytes, false);
	} else {
		uint64_t offset = (uint64_t)(at - windows);

		REQUIRE(may_load(active, at, bytes));
		interfere(active, at, bytes, true);
		if (offset / window_size != active->id)
			memcpy(&active->tail[offset / window_size], at, 4);
	}
}

void __sanitizer_cov_load1(uint8_t *at) { on_access(at, 1, false); }
void __sanitizer_cov_load2(uint16_t *at) { on_access((uint8_t *)at, 2, false); }
void __sanitizer_cov_load4(uint32_t *at) { on_access((uint8_t *)at, 4, false); }
void __sanitizer_cov_load8(uint64_t *at) { on_access((uint8_t *)at, 8, false); }
void __sanitizer_cov_load16(__int128 *at) { on_access((uint8_t *)at, 16, false); }
void __sanitizer_cov_store1(uint8_t *at) { on_access(at, 1, true); }
void __sanitizer_cov_store2(uint16_t *at) { on_access((uint8_t *)at, 2, true); }
void __sanitizer_cov_store4(uint32_t *at) { on_access((uint8_t *)at, 4, true); }
void __sanitizer_cov_store8(uint64_t *at) { on_access((uint8_t *)at, 8, true); }
void __sanitizer_cov_store16(__int128 *at) { on_access((uint8_t *)at, 16, true); }

/* -------------------------------------------------------------- invariants */

enum { UNKNOWN = SWITCH_MAX_PORTS };

/* Written from switch.h's description of the table, not from switch.c. */
static uint32_t known_port(const struct switch_shared *state, uint64_t address, bool only_pinned)
{
	const uint64_t *line = state->table[switch_table_line(state, address)];

	for (uint32_t way = 0; way < SWITCH_TABLE_WAYS; way++) {
		uint64_t age = (state->epoch - (line[way] >> SWITCH_ENTRY_EPOCH_SHIFT)) &
			       SWITCH_ENTRY_EPOCH_MASK;
		bool pinned = line[way] & SWITCH_ENTRY_PINNED;

		if (!(line[way] & SWITCH_ENTRY_VALID) || (line[way] & SWITCH_MAC_MASK) != address)
			continue;
		if (!pinned && (only_pinned || age > state->max_age))
			return UNKNOWN;
		return line[way] >> SWITCH_ENTRY_PORT_SHIFT & (SWITCH_MAX_PORTS - 1);
	}
	return UNKNOWN;
}

static void check_sums(uint32_t id)
{
	const struct switch_port *port = &shared->port[id];
	uint64_t copies = 0;

	for (uint32_t to = 0; to < SWITCH_MAX_PORTS; to++) {
		const struct switch_lane *lane = &shared->lane[id][to];

		copies += lane->delivered + lane->full + lane->bad_tail;
	}
	REQUIRE(port->copies == copies);
	REQUIRE(port->frames == port->unicast + port->broadcast + port->multicast + port->unknown +
					port->too_short + port->too_long + port->same_port +
					port->no_receiver + port->spoofed);
}

/* Of a call that has ended: what is new in the lane is for this receiver, from this sender. */
static void check_delivered(const struct active *active, const struct switch_shared *before,
			    uint32_t to)
{
	const uint8_t *base = (uint8_t *)window_of(to);
	uint64_t first = before->lane[active->id][to].head;
	uint64_t last = shared->lane[active->id][to].head;

	REQUIRE(last - first <= SWITCH_MAX_BURST);
	if (first == last)
		return;
	REQUIRE(to < ports && to != active->id);
	REQUIRE(active->enabled >> to & 1);
	/* Room by the last tail that the call has seen; what lay there before is the receiver's. */
	REQUIRE((uint32_t)last - active->tail[to] <= lane_slots);
	if (touched[to])
		return; /* the receiver wrote over its own lane */
	REQUIRE(((const struct switch_window *)base)->lane[active->id].head == (uint32_t)last);
	if (last - first > lane_slots)
		first = last - lane_slots; /* the receiver pretended to take some in between */
	for (uint64_t at = first; at < last; at++) {
		const struct switch_slot *slot =
			(const struct switch_slot *)(base + switch_lane_offset(tx_slots, lane_slots,
									       active->id)) +
			(at & (lane_slots - 1));
		uint64_t destination = 0, source = 0;
		uint32_t was, is;

		REQUIRE(slot->length >= SWITCH_MIN_FRAME && slot->length <= frame_limit);
		memcpy(&destination, slot->frame, 6);
		memcpy(&source, slot->frame + 6, 6);
		if (!(source & 1)) {
			was = known_port(before, source, true);
			is = known_port(shared, source, true);
			REQUIRE(was == UNKNOWN || was == active->id || is != was);
		}
		if (destination & 1)
			continue;
		was = known_port(before, destination, false);
		is = known_port(shared, destination, false);
		REQUIRE(was == UNKNOWN || was == to || is == UNKNOWN || is == to);
	}
}

/* Every byte of every window that no call under way may write. */
static void check_windows(uint64_t lanes_of)
{
	for (uint32_t port = 0; port < ports; port++) {
		const uint8_t *is = windows + port * window_size;
		uint8_t *should = expected + port * window_size;
		uint64_t lanes = switch_lane_offset(tx_slots, lane_slots, 0);
		uint64_t bytes = (uint64_t)lane_slots * SWITCH_SLOT_BYTES;

		for (uint32_t source = 0; source < ports; source++) {
			uint64_t at = lanes + source * bytes;

			if (lanes_of >> source & 1 && source != port) {
				memcpy(should + at, is + at, bytes);
				((struct switch_window *)should)->lane[source].head =
					((const struct switch_window *)is)->lane[source].head;
			} else {
				REQUIRE(memcmp(should + at, is + at, bytes) == 0);
			}
		}
		REQUIRE(memcmp(should, is, lanes) == 0);
	}
}

/* -------------------------------------------------------------- operations */

static bool is_active(uint32_t port)
{
	for (int at = 0; at < depth; at++) {
		if (actives[at].id == port)
			return true;
	}
	return false;
}

static struct switch_shared before[DEPTH];

static void call(uint32_t id, uint8_t mode, uint64_t a0, uint64_t a1, uint64_t a2)
{
	struct elisa_env env = {
		.shared = (uint64_t)shared,
		.shared_size = sizeof(*shared),
		.windows = (uint64_t)windows,
		.window_size = window_size,
		.id = id,
		.guests = ports,
	};
	struct active *active = &actives[depth];
	struct switch_shared *start = &before[depth];
	uint64_t burst = a2 < tx_slots ? a2 : tx_slots;
	uint64_t calls_under_way = 0, result;

	if (depth == DEPTH || dead[id] || is_active(id))
		return; /* one vCPU per port, and it has to be alive */
	if (!depth)
		memset(touched, 0, sizeof(touched));
	memcpy(start, shared, sizeof(*shared));
	active->id = id;
	active->enabled = shared->enabled;
	active->began = ++moment;
	active->accesses = 0;
	/* T24: lookups of a frame, and its copy to everybody by single bytes, twice over. */
	active->most = 100 + burst * (200 + ports * (50 + 2 * STRING_MOVE_MOST));
	active->mode = mode;
	memset(active->tail, 0, sizeof(active->tail));
	depth++;
	if (setjmp(active->killed)) {
		depth = (int)(active - actives);
		dead[id] = true;
	} else {
		result = elisa_serve(a0, a1, a2, &env);
		depth--;
		check_sums(id);
		REQUIRE(!(shared->port[id].sequence & 1));
		if (result > SWITCH_MAX_BURST) {
			REQUIRE(result == ELISA_ERROR(ELISA_EPERM) ||
				result == ELISA_ERROR(ELISA_EINVAL) ||
				result == ELISA_ERROR(ELISA_ENETDOWN));
			REQUIRE(shared->port[id].frames == start->port[id].frames);
			REQUIRE(memcmp(shared->lane[id], start->lane[id],
				       sizeof(shared->lane[id])) == 0);
		} else {
			REQUIRE(result <= a2 && a2 <= tx_slots);
			REQUIRE(result == a2 || a0 & SWITCH_WAIT);
			REQUIRE(shared->port[id].frames - start->port[id].frames == result);
		}
		for (uint32_t to = 0; to < SWITCH_MAX_PORTS; to++)
			check_delivered(active, start, to);
	}
	for (int at = 0; at < depth; at++)
		calls_under_way |= 1ull << actives[at].id;
	check_windows(calls_under_way | 1ull << id);
}

static uint64_t station(uint8_t number)
{
	static const uint64_t odd[] = {0, SWITCH_MAC_MASK, 1, 0x800000000002, 0x5e0001, 2};

	return number < 0x80 ? 0x02 | (uint64_t)(number & 7) << 40 : odd[number % 6];
}

static void write_frame(uint32_t port)
{
	uint32_t slot = take_number(1) & (tx_slots - 1);
	uint32_t length = (uint32_t)take_number(2);
	uint64_t destination = station((uint8_t)take_number(1));
	uint64_t source = station((uint8_t)take_number(1));
	uint8_t *at = (uint8_t *)window_of(port) + switch_tx_offset(slot);

	poke(at, &destination, 6);
	poke(at + 6, &source, 6);
	poke((uint8_t *)&window_of(port)->tx_length[slot], &length, 4);
}

static void write_window(uint32_t port)
{
	uint64_t at = take_number(3) % window_size;
	uint64_t count = take_number(1) + 1;
	uint8_t bytes[256];

	take(bytes, count);
	poke(windows + port * window_size + at, bytes,
	     count < window_size - at ? count : window_size - at);
}

/* All of a window at once, from the same few bytes. */
static void fill_window(uint32_t port)
{
	uint8_t bytes[64];
	size_t count = 1 + (take_number(1) & 63);

	take(bytes, count);
	for (uint64_t at = 0; at < window_size; at += count)
		poke(windows + port * window_size + at, bytes,
		     count < window_size - at ? count : window_size - at);
}

static void receive(uint32_t port, uint32_t source, bool honest)
{
	struct switch_lane_control *lane = &window_of(port)->lane[source];
	uint32_t tail = honest ? lane->head : (uint32_t)take_number(4);
	static uint8_t frames[SLOTS * SWITCH_MAX_FRAME];
	static uint32_t lengths[SLOTS];

	if (honest) /* the host's own reader of a window must stand anything too */
		switch_window_take(shared, (uint8_t *)window_of(port), source, frames, lengths, SLOTS);
	poke((uint8_t *)&lane->tail, &tail, 4);
}

static void disable(uint32_t port, bool gone)
{
	switch_disable_port(shared, port);
	disabled_at[port] = ++moment;
	if (gone && !is_active(port)) {
		switch_port_left(shared, port);
		dead[port] = false;
	}
}

static void enable(uint32_t port)
{
	/* The host's rule: no call is inside that began while the port was enabled. */
	for (int at = 0; at < depth; at++) {
		if (actives[at].began < disabled_at[port])
			return;
	}
	for (uint32_t other = 0; other < ports; other++) {
		if (other != port && dead[other])
			return; /* killed inside, and not given up */
	}
	if (shared->enabled >> port & 1 || dead[port] || is_active(port))
		return;
	switch_enable_port(shared, windows, window_size, port);
	expect_window(port);
	touched[port] = true;
}

static void operation(void)
{
	uint8_t what = (uint8_t)take_number(1);
	uint32_t port = (uint32_t)take_number(1) % ports;
	uint64_t address;

	switch (what & 15) {
	case 0: case 1: case 2: case 3: {
		uint8_t mode = (uint8_t)take_number(1);
		uint64_t first = take_number(1), count = take_number(1) % (tx_slots + 2);

		call(port, mode, SWITCH_SEND(port, mode & 8 ? SWITCH_WAIT : 0), first, count);
		return;
	}
	case 4: {
		uint8_t mode = (uint8_t)take_number(1);
		uint64_t a0 = take_number(8), a1 = take_number(8), a2 = take_number(8);

		call(port, mode, a0, a1, a2);
		return;
	}
	case 5: case 6: case 7:
		write_frame(port);
		return;
	case 8:
		touched[port] = true;
		write_window(port);
		return;
	case 9:
		touched[port] = true;
		fill_window(port);
		return;
	case 10:
		receive(port, (uint32_t)take_number(1) % ports, true);
		return;
	case 11:
		receive(port, (uint32_t)take_number(1) % ports, false);
		return;
	case 12:
		disable(port, what & 16);
		return;
	case 13:
		enable(port);
		return;
	case 14:
		for (uint32_t ticks = 1 + (what >> 4); ticks; ticks--)
			switch_tick(shared);
		return;
	default:
		address = station((uint8_t)take_number(1));
		if (address == 0 || address & 1)
			return; /* pykvm.switch.switch.parse_address refuses these */
		if (what & 16)
			switch_unpin(shared, address);
		else
			switch_pin(shared, address, port);
		return;
	}
}

/* Whatever happened: ports come back, and frames get through again. */
static void check_service(void)
{
	uint8_t frame[64] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 9, 0x88, 0xb5};
	static uint8_t frames[SWITCH_MAX_FRAME];
	uint32_t length = 0;

	for (uint32_t port = 0; port < ports; port++)
		disable(port, true);
	for (uint32_t port = 0; port < ports; port++)
		enable(port);
	check_sums(0);
	if (frame_limit < sizeof(frame))
		return;
	switch_window_put((uint8_t *)window_of(0), 0, frame, sizeof(frame));
	expect_window(0);
	call(0, 0, SWITCH_SEND(0, 0), 0, 1);
	REQUIRE(switch_window_take(shared, (uint8_t *)window_of(1), 0, frames, &length, 1) == 1);
	REQUIRE(length == sizeof(frame) && memcmp(frame, frames, length) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const uint32_t limits[] = {SWITCH_DEFAULT_FRAME, 64, SWITCH_MAX_FRAME, SWITCH_MIN_FRAME};
	uint8_t geometry;

	if (!shared)
		allocate();
	input = data;
	input_left = size;
	geometry = (uint8_t)take_number(1);
	ports = 2 + (geometry & 3);
	tx_slots = 1u << (geometry >> 2 & 3);
	lane_slots = 1u << (geometry >> 4 & 3);
	frame_limit = limits[geometry >> 6];
	window_size = switch_window_size(ports, tx_slots, lane_slots);
	switch_initialise(shared, ports, tx_slots, lane_slots, frame_limit, 2, 0x9E3779B97F4A7C15);
	memset(windows, 0, ports * window_size);
	memset(expected, 0, ports * window_size);
	memset(dead, 0, sizeof(dead));
	memset(disabled_at, 0, sizeof(disabled_at));
	depth = 0;
	moment = 0;
	for (uint32_t port = 0; port < ports; port++)
		enable(port);
	for (int count = 0; count < OPERATIONS && input_left; count++)
		operation();
	check_service();
	return 0;
}
