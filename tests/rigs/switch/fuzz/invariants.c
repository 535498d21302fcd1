/* SPDX-License-Identifier: Apache-2.0 */
/* What must hold whatever guests do. */
#include <string.h>

#include "fuzzer.h"

bool touched[PORTS];

enum { UNKNOWN = SWITCH_MAX_PORTS };

/* Written from switch.h's descriptions of tags and of the table, not from switch.c. */

static uint32_t type_at(const uint8_t *frame, uint32_t tag)
{
	const uint8_t *at = frame + 12 + tag * SWITCH_TAG_BYTES;

	return (uint32_t)at[0] << 8 | at[1];
}

static bool is_tag(uint32_t type)
{
	return type == 0x8100 || type == 0x88a8;
}

static uint32_t vlan_of(const uint8_t *frame)
{
	return is_tag(type_at(frame, 0)) ? (uint32_t)(frame[14] & 15) << 8 | frame[15] : 0;
}

/*
 * The outermost tag is delivered as it was judged. Those behind it may have changed in between,
 * unless the input leaves the windows alone.
 */
static bool has_valid_length(const struct active *active, const struct switch_slot *slot)
{
	uint32_t tags = 0, shortest = 14;

	if (is_tag(type_at(slot->frame, 0))) {
		shortest = 18;
		while (tags < 8 && is_tag(type_at(slot->frame, tags)))
			tags++;
		if (active->mode & MODE_LOADS || active->overtaken)
			tags = 8;
	}
	return slot->length >= shortest && slot->length <= SWITCH_MAX_FRAME &&
	       slot->length <= frame_limit + 4 * tags;
}

static uint32_t known_on(const struct switch_shared *state, uint64_t address, uint32_t vlan,
			 bool pinned)
{
	uint64_t station = switch_station(state, address, vlan);
	const uint64_t *line = state->table[switch_station_line(station)];

	for (uint32_t way = 0; way < SWITCH_TABLE_WAYS; way++) {
		uint64_t age = ((state->epoch & 63) - (line[way] >> 6 & 63)) & 63;

		if (!(line[way] >> 13 & 1) || (line[way] >> 12 & 1) != pinned)
			continue;
		if (line[way] >> 14 != switch_station_rest(station) >> 14)
			continue;
		if (!pinned && age > state->max_age)
			return UNKNOWN;
		return line[way] & 63;
	}
	return UNKNOWN;
}

static uint32_t pinned_port(const struct switch_shared *state, uint64_t address)
{
	return known_on(state, address, 0xfff, true);
}

static uint32_t known_port(const struct switch_shared *state, uint64_t address, uint32_t vlan)
{
	uint32_t pin = pinned_port(state, address);

	return pin == UNKNOWN ? known_on(state, address, vlan, false) : pin;
}

static bool is_link_local(uint64_t destination)
{
	return (destination & 0xffffffffff) == 0xc28001 && destination >> 40 < 16 &&
	       !(group_forward_mask >> (destination >> 40) & 1);
}

void check_sums(uint32_t id)
{
	const struct switch_port *port = &shared->port[id];
	uint64_t copies = 0;

	for (uint32_t to = 0; to < SWITCH_MAX_PORTS; to++) {
		const struct switch_lane *lane = &shared->lane[id][to];

		copies += lane->delivered + lane->full + lane->bad_tail;
	}
	REQUIRE(port->copies == copies + port->lost);
	REQUIRE(port->lost <= port->cut * SWITCH_MAX_BURST);
	REQUIRE(port->frames == port->unicast + port->broadcast + port->multicast + port->unknown +
					port->too_short + port->too_long + port->same_port +
					port->no_receiver + port->spoofed + port->bad_source +
					port->link_local);
}

/*
 * Whether a frame may have been sent to everybody though its destination was known to be behind the
 * caller, and is: a port's stations displace each other, so that an earlier frame of the call may
 * have had it forgotten, and a later one known again.
 */
static bool was_displaced(const struct active *active, const struct switch_shared *before,
			  uint64_t destination, uint32_t was, uint32_t is)
{
	uint64_t frames = shared->port[active->id].frames - before->port[active->id].frames;

	return was == active->id && is == active->id && frames >= 2 &&
	       pinned_port(before, destination) == UNKNOWN;
}

void check_delivered(const struct active *active, const struct switch_shared *before, uint32_t to)
{
	const uint8_t *base = (uint8_t *)window_of(to);
	const struct switch_lane *lane = &shared->lane[active->id][to];
	uint64_t first = before->lane[active->id][to].delivered - lane->start;
	uint64_t last = lane->delivered - lane->start;

	REQUIRE(last - first <= SWITCH_MAX_BURST);
	if (first == last)
		return;
	REQUIRE(to < ports && to != active->id);
	REQUIRE(active->enabled >> to & 1);
	/* Room by the last tail that the call has seen; what lay there before is the receiver's. */
	REQUIRE((uint32_t)last - active->used[to] <= lane_slots);
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

		REQUIRE(has_valid_length(active, slot));
		memcpy(&destination, slot->frame, 6);
		memcpy(&source, slot->frame + 6, 6);
		REQUIRE(source && !(source & 1));
		REQUIRE(!is_link_local(destination));
		if (active->overtaken)
			continue; /* addresses may have come and gone in between */
		was = pinned_port(before, source);
		is = pinned_port(shared, source);
		REQUIRE(was == UNKNOWN || was == active->id || is != was);
		if (destination & 1)
			continue;
		was = known_port(before, destination, vlan_of(slot->frame));
		is = known_port(shared, destination, vlan_of(slot->frame));
		REQUIRE(was == UNKNOWN || was == to || is == UNKNOWN || is == to ||
			was_displaced(active, before, destination, was, is));
	}
}

void check_windows(uint64_t callers)
{
	for (uint32_t port = 0; port < ports; port++) {
		const uint8_t *is = windows + port * window_size;
		uint8_t *should = expected + port * window_size;
		uint64_t lanes = switch_lane_offset(tx_slots, lane_slots, 0);
		uint64_t bytes = (uint64_t)lane_slots * SWITCH_SLOT_BYTES;

		for (uint32_t source = 0; source < ports; source++) {
			uint64_t at = lanes + source * bytes;

			if (callers >> source & 1 && source != port) {
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
