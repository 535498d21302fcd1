/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzes the switch with everything that guests control: the contents of all windows, at every
 * single moment, the arguments of calls, and the order in which calls, deaths and the host's own
 * steps happen. Built by tests/rigs/switch/fuzz/fuzzer.py with libFuzzer; docs/fuzzing.md explains it.
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
#include <string.h>

#include "fuzzer.h"

static uint64_t moment; /* grows with each call and each port that is taken away */
static uint64_t disabled_at[PORTS];
static bool dead[PORTS]; /* killed, and not given up by the host yet */

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
		.vcpus = 1,
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
	active->enabled = 0;
	active->began = ++moment;
	active->accesses = 0;
	active->overtaken = false;
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
			REQUIRE(shared->port[id].copies == start->port[id].copies);
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

/* Addresses that meet again and again: a few stations, groups, and a full line of the table. */
static uint64_t station(uint8_t number)
{
	static const uint64_t odd[] = {0, SWITCH_MAC_MASK, 1, 0x800000000002, 0x5e0001, 2};
	static const uint64_t link[] = {0xc28001, 0x0e0000c28001, 0x100000c28001};
	static uint64_t crowd[2 * SWITCH_TABLE_WAYS];

	for (uint64_t at = 0, address = 2; !crowd[2 * SWITCH_TABLE_WAYS - 1]; address += 256) {
		if (switch_station_line(switch_station(shared, address, 0)) == 7)
			crowd[at++] = address;
	}
	if (number < 0x60)
		return 0x02 | (uint64_t)(number & 7) << 40;
	if (number < 0xc0)
		return crowd[number % (2 * SWITCH_TABLE_WAYS)];
	return number < 0xf0 ? odd[number % 6] : link[number % 3];
}

/* No tag, or tags of a few VLANs, as the input wants it. */
static void write_tags(uint8_t *at)
{
	static const uint8_t types[][2] = {{0x08, 0x00}, {0x81, 0x00}, {0x88, 0xa8}, {0x88, 0xb5}};
	static const uint8_t vlans[][2] = {{0, 0}, {0, 1}, {0xa0, 1}, {0x0f, 0xff}};
	uint8_t what = (uint8_t)take_number(1);

	for (uint8_t tags = 1 + (what >> 4); tags; tags--, at += SWITCH_TAG_BYTES) {
		poke(at, types[what & 3], 2);
		poke(at + 2, vlans[what >> 2 & 3], 2);
	}
	poke(at, types[0], 2);
}

static void write_frame(uint32_t port, bool with_tags)
{
	uint32_t slot = take_number(1) & (tx_slots - 1);
	uint32_t length = (uint32_t)take_number(2);
	uint64_t destination = station((uint8_t)take_number(1));
	uint64_t source = station((uint8_t)take_number(1));
	uint8_t *at = (uint8_t *)window_of(port) + switch_tx_offset(slot);

	poke(at, &destination, 6);
	poke(at + 6, &source, 6);
	if (with_tags)
		write_tags(at + 12);
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
		switch_port_left(shared, windows, window_size, port);
		dead[port] = false;
		check_sums(port);
		for (uint32_t to = 0; to < ports; to++) { /* the host has finished its deliveries */
			struct switch_window *should =
				(struct switch_window *)(expected + to * window_size);

			if (to != port && shared->enabled >> to & 1)
				should->lane[port].head = window_of(to)->lane[port].head;
		}
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

void operation(void)
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
		write_frame(port, (what & 15) == 7);
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
	set_input(data, size);
	make_switch((uint8_t)take_number(1));
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
