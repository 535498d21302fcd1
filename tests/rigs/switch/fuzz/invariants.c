/* SPDX-License-Identifier: Apache-2.0 */
/* What must hold whatever guests do. */
#include <string.h>

#include "fuzzer.h"

bool touched[PORTS];

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
					port->no_receiver + port->spoofed);
}

void check_delivered(const struct active *active, const struct switch_shared *before,
			    uint32_t to)
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

		REQUIRE(slot->length >= SWITCH_MIN_FRAME && slot->length <= frame_limit);
		memcpy(&destination, slot->frame, 6);
		memcpy(&source, slot->frame + 6, 6);
		if (active->overtaken)
			continue; /* addresses may have come and gone in between */
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
