/* SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "elisa_memory.h"
#include "elisa_object.h"
#include "switch.h"

#include "admin.h"

void switch_initialise(struct switch_shared *shared, uint32_t ports, uint32_t tx_slots,
		       uint32_t lane_slots, uint32_t frame_limit, uint32_t max_age,
		       uint32_t group_forward_mask, uint64_t hash_seed)
{
	memset(shared, 0, sizeof(*shared));
	shared->version = SWITCH_VERSION;
	shared->ports = ports;
	shared->tx_slots = tx_slots;
	shared->lane_slots = lane_slots;
	shared->frame_limit = frame_limit;
	shared->max_age = max_age;
	shared->group_forward_mask = group_forward_mask;
	shared->hash_seed = hash_seed | 1;
	STORE_RELEASE(shared->magic, SWITCH_SHARED_MAGIC); /* readers of counters look at it */
}

/* Remove the entries that `wanted` picks, unless a call replaces them at the same moment. */
static void sweep(struct switch_shared *shared, int (*wanted)(uint64_t entry, uint64_t argument),
		  uint64_t argument)
{
	for (uint32_t line = 0; line < SWITCH_TABLE_LINES; line++) {
		for (uint32_t way = 0; way < SWITCH_TABLE_WAYS; way++) {
			uint64_t *place = &shared->table[line][way];
			uint64_t entry = READ_ONCE(*place);

			if (entry && wanted(entry, argument))
				__atomic_compare_exchange_n(place, &entry, 0, 0, __ATOMIC_RELAXED,
							    __ATOMIC_RELAXED);
		}
	}
}

static int is_behind(uint64_t entry, uint64_t port)
{
	return !(entry & SWITCH_ENTRY_PINNED) && switch_entry_port(entry) == port;
}

void switch_disable_port(struct switch_shared *shared, uint32_t port)
{
	__atomic_fetch_and(&shared->enabled, ~(1ULL << port), __ATOMIC_SEQ_CST);
	sweep(shared, is_behind, port);
}

/*
 * Close the sums of a call that was cut short, and publish what it had delivered. A call counts a
 * frame's kind, then the copies that it asks for, then what becomes of each, so what is missing
 * at the end of this line was lost with it.
 */
static void settle(struct switch_shared *shared, uint8_t *windows, uint64_t window_size,
		   uint32_t source)
{
	struct switch_port *port = &shared->port[source];
	uint64_t published = 0;

	for (uint32_t to = 0; to < shared->ports; to++) {
		struct switch_window *window = (struct switch_window *)(windows + to * window_size);
		const struct switch_lane *lane = &shared->lane[source][to];

		published += lane->delivered + lane->full + lane->bad_tail;
		if (to != source && shared->enabled >> to & 1)
			STORE_RELEASE(window->lane[source].head,
				      (uint32_t)(lane->delivered - lane->start));
	}
	port->lost = port->copies - published;
	port->frames = port->unicast + port->broadcast + port->multicast + port->unknown +
		       port->too_short + port->too_long + port->same_port + port->no_receiver +
		       port->spoofed + port->bad_source + port->link_local;
	port->cut++;
}

void switch_port_left(struct switch_shared *shared, uint8_t *windows, uint64_t window_size,
		      uint32_t port)
{
	uint64_t sequence = READ_ONCE(shared->port[port].sequence);

	if (sequence & 1) {
		settle(shared, windows, window_size, port);
		STORE_RELEASE(shared->port[port].sequence, sequence + 1);
	}
}

uint64_t switch_port_inside(const struct switch_shared *shared, uint32_t port)
{
	uint64_t sequence = __atomic_load_n(&shared->port[port].sequence, __ATOMIC_SEQ_CST);

	return sequence & 1 ? sequence : 0;
}

void switch_enable_port(struct switch_shared *shared, uint8_t *windows, uint64_t window_size,
			uint32_t port)
{
	struct switch_window *window = (struct switch_window *)(windows + port * window_size);

	switch_port_left(shared, windows, window_size, port);
	sweep(shared, is_behind, port); /* what its last calls learned after the port was disabled */
	memset(window, 0, window_size);
	window->info = (struct switch_window_info){
		.magic = SWITCH_WINDOW_MAGIC,
		.version = SWITCH_VERSION,
		.port = port,
		.ports = shared->ports,
		.tx_slots = shared->tx_slots,
		.lane_slots = shared->lane_slots,
		.frame_limit = shared->frame_limit,
		.lanes_offset = switch_lane_offset(shared->tx_slots, shared->lane_slots, 0),
		.lane_bytes = (uint64_t)shared->lane_slots * SWITCH_SLOT_BYTES,
	};
	/* Lanes from this port go on where they are: their receivers are running. */
	for (uint32_t source = 0; source < shared->ports; source++)
		shared->lane[source][port].start = shared->lane[source][port].delivered;
	__atomic_fetch_or(&shared->enabled, 1ULL << port, __ATOMIC_SEQ_CST);
}

static int is_too_old(uint64_t entry, uint64_t argument)
{
	uint64_t epoch = argument >> 32, max_age = (uint32_t)argument;
	uint64_t age = (epoch - (entry >> SWITCH_ENTRY_EPOCH_SHIFT)) & SWITCH_ENTRY_EPOCH_MASK;

	return !(entry & SWITCH_ENTRY_PINNED) && age > max_age;
}

void switch_tick(struct switch_shared *shared)
{
	uint64_t epoch = shared->epoch + 1;

	STORE_RELEASE(shared->epoch, epoch);
	/* Before an entry's eight bits of epoch come round again. */
	sweep(shared, is_too_old, (epoch & SWITCH_ENTRY_EPOCH_MASK) << 32 | shared->max_age);
}

/* While there are none, calls do not look for pins. */
static void count_pins(struct switch_shared *shared)
{
	uint64_t pins = 0;

	for (uint32_t line = 0; line < SWITCH_TABLE_LINES; line++) {
		for (uint32_t way = 0; way < SWITCH_TABLE_WAYS; way++)
			pins += (READ_ONCE(shared->table[line][way]) & SWITCH_ENTRY_PINNED) != 0;
	}
	STORE_RELEASE(shared->pins, pins);
}

int switch_pin(struct switch_shared *shared, uint64_t address, uint32_t port)
{
	uint64_t station = switch_station(shared, address, SWITCH_ANY_VLAN);
	uint64_t *line = shared->table[switch_station_line(station)];
	int result = -1;

	switch_unpin(shared, address);
	for (uint32_t way = 0; way < SWITCH_TABLE_WAYS; way++) {
		if (READ_ONCE(line[way]) & SWITCH_ENTRY_PINNED)
			continue;
		/* Over what a call may have learned just now: calls never replace a pin. */
		STORE_RELEASE(line[way], switch_station_rest(station) | port |
						 SWITCH_ENTRY_PINNED | SWITCH_ENTRY_VALID);
		result = 0;
		break;
	}
	count_pins(shared);
	return result;
}

void switch_unpin(struct switch_shared *shared, uint64_t address)
{
	for (uint32_t vlan = 0; vlan <= SWITCH_ANY_VLAN; vlan++) {
		uint64_t station = switch_station(shared, address, vlan);
		uint64_t *line = shared->table[switch_station_line(station)];

		for (uint32_t way = 0; way < SWITCH_TABLE_WAYS; way++) {
			uint64_t entry = READ_ONCE(line[way]);

			if (switch_entry_is(entry, switch_station_rest(station)))
				__atomic_compare_exchange_n(&line[way], &entry, 0, 0, __ATOMIC_RELAXED,
							    __ATOMIC_RELAXED);
		}
	}
	count_pins(shared);
}

uint64_t switch_hypercall(void *env, const uint64_t args[6])
{
	return elisa_serve(args[0], args[1], args[2], env);
}

void switch_window_put(uint8_t *window, uint32_t slot, const uint8_t *frame, uint32_t length)
{
	uint32_t bytes = length > SWITCH_SLOT_BYTES ? SWITCH_SLOT_BYTES : length;

	memcpy(window + switch_tx_offset(slot), frame, bytes);
	((struct switch_window *)window)->tx_length[slot] = length; /* also one that is too long */
}

uint32_t switch_window_take(const struct switch_shared *shared, uint8_t *window, uint32_t source,
			    uint8_t *frames, uint32_t *lengths, uint32_t limit)
{
	struct switch_window *own = (struct switch_window *)window;
	uint32_t lane_slots = shared->lane_slots;
	const uint8_t *slots = window + switch_lane_offset(shared->tx_slots, lane_slots, source);
	uint32_t tail = own->lane[source].tail;
	uint32_t head = LOAD_ACQUIRE(own->lane[source].head);
	uint32_t taken = 0;

	for (; tail != head && taken < limit; tail++, taken++) {
		const struct switch_slot *slot =
			(const struct switch_slot *)slots + (tail & (lane_slots - 1));
		uint32_t length = READ_ONCE(slot->length);

		if (length > SWITCH_MAX_FRAME) /* not from the switch: somebody wrote the window */
			length = SWITCH_MAX_FRAME;
		memcpy(frames, slot->frame, length);
		frames += length;
		lengths[taken] = length;
	}
	STORE_RELEASE(own->lane[source].tail, tail);
	return taken;
}
