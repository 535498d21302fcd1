/* SPDX-License-Identifier: Apache-2.0 */
/* What happens at each load and store of the switch: interference, and the rules for them. */
#include <string.h>

#include "fuzzer.h"

struct active actives[DEPTH];
int depth;

/* Which places a call may load from and store to. */

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
		for (int at = 0; at < depth; at++)
			actives[at].overtaken = true;
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
		for (uint32_t port = 0; port < ports; port++) {
			if (at == (uint8_t *)&shared->lane[active->id][port].delivered)
				active->used[port] = active->tail[port];
		}
	} else if (in_shared) {
		REQUIRE(may_load_shared(active, at, bytes));
		interfere(active, at, bytes, false);
		if (at == (uint8_t *)&shared->enabled)
			active->enabled = shared->enabled;
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
