/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An Ethernet learning switch as a shared object. This one source runs in a sub context, behind
 * VMCALL in the VMM, inside a guest with everything mapped, and natively in the tests.
 *
 * Three rules keep hostile guests and stopped vCPUs from harming anyone else:
 *
 *  - What lies in a window changes at any moment. A value is read once into a local, checked, and
 *    only the local is used; the header that was looked up is the header that is delivered, its
 *    outermost tag included. Positions are masked or compared with what `shared` says, which no
 *    guest can write. Of the bytes behind the header only further tags decide anything: how much
 *    longer than usual the frame may be. It fits into a slot in any case.
 *  - Nobody waits for anybody. Every lane and every counter has one writer, the source port's
 *    call; table entries are replaced in one compare-and-swap that may fail. A call that stops
 *    for ever in the middle leaves frames unpublished, and its own counters open: what is asked
 *    for is counted first, then what became of it, so that the difference was lost with the call.
 *  - A call is bounded: SWITCH_MAX_BURST frames, at most SWITCH_MAX_PORTS - 1 copies of each.
 */

/* The sub context leaves the vector registers to the guest, and all builds shall run one code. */
#pragma GCC target("general-regs-only")

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "elisa_memory.h"
#include "elisa_nospec.h"
#include "elisa_object.h"
#include "switch.h"

/* For the order of stores that this vCPU may stop between; processors keep it by themselves. */
#define COMPILER_BARRIER() __atomic_signal_fence(__ATOMIC_SEQ_CST)

#define LIKELY(condition) __builtin_expect(!!(condition), 1)
#define UNLIKELY(condition) __builtin_expect(!!(condition), 0)

/* A word at any address that may alias anything: frames need not start on 8 bytes. */
typedef uint64_t word __attribute__((may_alias, aligned(1)));

/*
 * From here on `rep movsq`. It starts slowly, so plain 8-byte moves win for small frames; once
 * started it moves whole cache lines. They break even between 704 and 768 bytes on the processor
 * it was measured on (benchmarks/native_switch.py, fast short `rep movsb`), and an emulator that
 * counts instructions counts one for 8 bytes and not three and a half for 16.
 */
#define STRING_MOVE_BYTES 768

/* The first 16 bytes of a frame. */
struct header {
	uint64_t low;  /* destination in bits 0-47, first two bytes of the source above */
	uint64_t high; /* the source's other four bytes, type, the outermost tag or payload */
};

struct call {
	struct switch_shared *shared;
	struct switch_port *port;
	const struct elisa_env *env;
	uint64_t enabled;
	uint32_t id;
};

/* What resolve() says when it is not a port number. */
enum { FLOOD = SWITCH_MAX_PORTS, NOWHERE };

/* -------------------------------------------------------------------- tags */

/* `type` is in network byte order. */
static inline bool is_tag(uint16_t type)
{
	return type == __builtin_bswap16(SWITCH_CUSTOMER_TAG) ||
	       type == __builtin_bswap16(SWITCH_SERVICE_TAG);
}

/* Masks for header.high: without a tag's priority and drop bit; without the payload. */
#define TAGGED_BITS 0xff0fffffffffffffULL
#define UNTAGGED_BITS 0x0000ffffffffffffULL

/* What a header says of its frame, and of all frames of a run that it begins. */
struct format {
	uint64_t bits;     /* of header.high: source, type and VLAN */
	uint32_t vlan;
	uint32_t shortest; /* frame in bytes */
	uint32_t spread;   /* from there to the longest frame with no further tags */
};

static inline struct format format_of(const struct switch_shared *shared, struct header header)
{
	uint32_t longest = shared->frame_limit + SWITCH_TAG_BYTES;

	if (LIKELY(!is_tag((uint16_t)(header.high >> 32))))
		return (struct format){ UNTAGGED_BITS, 0, SWITCH_MIN_FRAME,
					shared->frame_limit - SWITCH_MIN_FRAME };
	if (longest > SWITCH_MAX_FRAME)
		longest = SWITCH_MAX_FRAME;
	return (struct format){
		.bits = TAGGED_BITS,
		.vlan = (uint32_t)(header.high >> 40 & 0xf00) | (uint32_t)(header.high >> 56),
		.shortest = SWITCH_MIN_FRAME + SWITCH_TAG_BYTES,
		.spread = longest - (SWITCH_MIN_FRAME + SWITCH_TAG_BYTES),
	};
}

/* Whether a tagged frame above the limit has enough further tags for its length. */
static __attribute__((noinline)) bool has_tags_for(const struct switch_shared *shared,
						   const uint8_t *frame, uint32_t length)
{
	const uint16_t *type = (const uint16_t *)(frame + 12);
	uint32_t longest = shared->frame_limit + SWITCH_TAG_BYTES;

	for (unsigned int tags = 1; length > longest; tags++) {
		type += SWITCH_TAG_BYTES / sizeof(*type);
		if (tags == SWITCH_MAX_TAGS || !is_tag(READ_ONCE(*type)))
			return false;
		longest += SWITCH_TAG_BYTES;
	}
	return true;
}

/* ----------------------------------------------------------- station table */

static bool is_fresh(const struct switch_shared *shared, uint64_t entry, uint64_t epoch)
{
	uint64_t age = (epoch - (entry >> SWITCH_ENTRY_EPOCH_SHIFT)) & SWITCH_ENTRY_EPOCH_MASK;

	return (entry & SWITCH_ENTRY_VALID) && age <= shared->max_age;
}

/*
 * Write `wanted`, an entry for a station of the calling port, over the same station's older entry,
 * or into a free or stale way, or over another one of this port. A failed compare-and-swap means
 * that another port's call just wrote this entry; the next call of this one tries again.
 */
static __attribute__((noinline)) void learn(const struct call *call, uint64_t *line,
					    uint64_t wanted, uint64_t epoch)
{
	uint64_t *place = 0, *own = 0;
	uint64_t place_entry = 0, own_entry = 0;
	unsigned int owned = 0;

	for (unsigned int way = 0; way < SWITCH_TABLE_WAYS; way++) {
		uint64_t entry = READ_ONCE(line[way]);

		if (entry & SWITCH_ENTRY_PINNED)
			continue;
		if (switch_entry_is(entry, wanted)) {
			place = &line[way];
			place_entry = entry;
			owned = 0;
			break;
		}
		if (!is_fresh(call->shared, entry, epoch)) {
			if (!place) {
				place = &line[way];
				place_entry = entry;
			}
		} else if (switch_entry_port(entry) == call->id) {
			own = &line[way];
			own_entry = entry;
			owned++;
		}
	}
	if (!place || owned >= SWITCH_TABLE_SHARE) {
		if (!own) {
			call->port->not_learned++;
			return;
		}
		place = own;
		place_entry = own_entry;
	}
	__atomic_compare_exchange_n(place, &place_entry, wanted, false, __ATOMIC_RELAXED,
				    __ATOMIC_RELAXED);
}

/* The station's line of the table. The number is in bounds by itself, but lest it is spilled. */
static inline uint64_t *line_of(struct switch_shared *shared, uint64_t station)
{
	return shared->table[elisa_mask_nospec(switch_station_line(station), SWITCH_TABLE_LINES)];
}

/* Note that the station is behind the calling port. */
static inline void note_source(const struct call *call, uint64_t station)
{
	struct switch_shared *shared = call->shared;
	uint64_t *line = line_of(shared, station);
	uint64_t epoch = READ_ONCE(shared->epoch) & SWITCH_ENTRY_EPOCH_MASK;
	uint64_t wanted = switch_station_rest(station) | SWITCH_ENTRY_VALID |
			  epoch << SWITCH_ENTRY_EPOCH_SHIFT | call->id;

	/* Mostly it is known already, and in this epoch too. */
	if (READ_ONCE(line[0]) != wanted)
		learn(call, line, wanted, epoch);
}

/* The port behind which the station is, or FLOOD. */
static uint32_t look_up(struct switch_shared *shared, uint64_t station)
{
	const uint64_t *line = line_of(shared, station);
	uint64_t rest = switch_station_rest(station), epoch = READ_ONCE(shared->epoch);

	for (unsigned int way = 0; way < SWITCH_TABLE_WAYS; way++) {
		uint64_t entry = READ_ONCE(line[way]);

		if (switch_entry_is(entry, rest))
			return is_fresh(shared, entry, epoch) ? switch_entry_port(entry) : FLOOD;
	}
	return FLOOD;
}

/* The port to which `address` is pinned, or FLOOD. */
static uint32_t look_up_pin(struct switch_shared *shared, uint64_t address)
{
	uint64_t station = switch_station(shared, address, SWITCH_ANY_VLAN);
	const uint64_t *line = line_of(shared, station);
	uint64_t rest = switch_station_rest(station);

	for (unsigned int way = 0; way < SWITCH_TABLE_WAYS; way++) {
		uint64_t entry = READ_ONCE(line[way]);

		if (switch_entry_is(entry, rest) && entry & SWITCH_ENTRY_PINNED)
			return switch_entry_port(entry);
	}
	return FLOOD;
}

/* Whether a group address is for the link only, and not let through by the host. */
static inline bool is_link_local(const struct switch_shared *shared, uint64_t destination)
{
	return (destination & ~(0xfULL << SWITCH_LINK_LOCAL_SHIFT)) == SWITCH_LINK_LOCAL &&
	       !(shared->group_forward_mask >> (destination >> SWITCH_LINK_LOCAL_SHIFT) & 1);
}

/*
 * Where frames with these addresses go on this VLAN: a port, FLOOD or NOWHERE. In the first two
 * cases `kind` is the counter for them; for NOWHERE the frame has been counted under its reason.
 */
static __attribute__((noinline)) uint32_t resolve(const struct call *call, struct header header,
						  uint32_t vlan, uint64_t **kind)
{
	struct switch_shared *shared = call->shared;
	struct switch_port *port = call->port;
	uint64_t destination = header.low & SWITCH_MAC_MASK;
	uint64_t source = header.low >> 48 | (header.high & 0xffffffff) << 16;
	uint64_t others = call->enabled & ~(1ULL << call->id);
	bool pins = READ_ONCE(shared->pins);
	uint32_t found = pins ? look_up_pin(shared, source) : FLOOD;

	if ((source & 1) || source == 0) {
		port->bad_source++;
		return NOWHERE;
	}
	if (found == FLOOD) {
		note_source(call, switch_station(shared, source, vlan));
	} else if (found != call->id) {
		port->spoofed++;
		return NOWHERE;
	}
	found = FLOOD;
	if (destination == SWITCH_MAC_MASK) {
		*kind = &port->broadcast;
	} else if (destination & 1) {
		if (is_link_local(shared, destination)) {
			port->link_local++;
			return NOWHERE;
		}
		*kind = &port->multicast;
	} else {
		if (pins)
			found = look_up_pin(shared, destination);
		if (found == FLOOD)
			found = look_up(shared, switch_station(shared, destination, vlan));
		*kind = found == FLOOD ? &port->unknown : &port->unicast;
	}
	if (found == call->id) {
		port->same_port++;
		return NOWHERE;
	}
	if (found == FLOOD ? !others : !(others >> found & 1)) {
		port->no_receiver++;
		return NOWHERE;
	}
	if (found == FLOOD && (others & (others - 1)) == 0)
		return (uint32_t)__builtin_ctzll(others); /* one receiver: no different from unicast */
	return found;
}

/* ------------------------------------------------------------------- lanes */

struct open_lane {
	struct switch_lane *lane;
	struct switch_lane_control *control;
	uint8_t *slots;
	uint64_t delivered; /* before */
	uint32_t head;      /* position of the next frame */
	uint32_t room;      /* frames that can be delivered */
	bool bad_tail;      /* no room because the receiver's tail makes no sense */
};

static inline struct switch_window *window_of(const struct call *call, uint32_t port)
{
	return (struct switch_window *)(call->env->windows + port * call->env->window_size);
}

/* What resolve() said, when it was a port number. */
static inline uint32_t masked_port(uint32_t port)
{
	return (uint32_t)elisa_mask_nospec(port, SWITCH_MAX_PORTS);
}

/* Set the two pointers; again where they may have been in memory since. */
static inline void find_lane(struct open_lane *open, const struct call *call, uint32_t destination)
{
	open->lane = &call->shared->lane[call->id][destination];
	open->control = &window_of(call, destination)->lane[call->id];
}

static inline struct open_lane open_lane(const struct call *call, uint32_t destination)
{
	const struct switch_shared *shared = call->shared;
	struct open_lane open;
	uint32_t used;

	find_lane(&open, call, destination);
	open.slots = (uint8_t *)open.control - call->id * sizeof(*open.control) -
		     offsetof(struct switch_window, lane) +
		     switch_lane_offset(shared->tx_slots, shared->lane_slots, call->id);

	open.delivered = open.lane->delivered;
	open.head = (uint32_t)(open.delivered - open.lane->start);
	/* Acquire: the receiver has read the slots that it gives back before we overwrite them. */
	used = open.head - LOAD_ACQUIRE(open.control->tail);
	open.bad_tail = used > shared->lane_slots;
	open.room = open.bad_tail ? 0 : shared->lane_slots - used;
	return open;
}

/*
 * Publish what was put into the lane. The order matters to a receiver that looks at any moment and
 * when this vCPU stops at any instruction: frame and length, our own count, then the receiver's
 * head, which the host repeats if it was not reached.
 */
static inline void close_lane(const struct open_lane *open, uint32_t frames, uint64_t bytes)
{
	struct switch_lane *lane = open->lane;

	lane->bytes += bytes;
	STORE_RELEASE(lane->delivered, open->delivered + frames);
	STORE_RELEASE(open->control->head, open->head + frames);
}

/* The copy has been counted before, under `copies`. */
static inline void count_refused(const struct open_lane *open)
{
	COMPILER_BARRIER();
	*(open->bad_tail ? &open->lane->bad_tail : &open->lane->full) += 1;
}

/* The slot of a position in the caller's ring of transmit slots, and the frame in a slot. */
static inline uint32_t transmit_slot(const struct switch_shared *shared, uint32_t position)
{
	return (uint32_t)elisa_mask_nospec(position, shared->tx_slots);
}

static inline const uint8_t *transmit_frame(const struct switch_window *window, uint32_t index)
{
	return window->tx_frame + (uint64_t)index * SWITCH_SLOT_BYTES;
}

/* A length that was checked, in bounds also where the check is mispredicted. */
static inline uint64_t masked_length(uint32_t length)
{
	return elisa_mask_nospec(length, SWITCH_SLOT_BYTES);
}

/*
 * Of a frame that is too short for put_frame's overlapping moves, or long enough for a string move:
 * what comes behind the header's first 8 bytes. `high` are the next ones. It takes few registers, so
 * that none of its caller's masked pointers has to go to memory for the call.
 */
static __attribute__((noinline)) void put_odd_frame(uint8_t *to, const uint8_t *from, uint64_t high,
						    uint64_t length)
{
	if (length >= STRING_MOVE_BYTES) {
		*(word *)(to + length - 8) = *(const word *)(from + length - 8);
		*(word *)(to + 8) = high;
		to += 16;
		from += 16;
		length = (length - 16) / 8;
		__asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(length) : : "memory");
		return;
	}
	for (uint64_t at = 8; at < length; at++) {
		to[at] = at < 16 ? (uint8_t)high : ((const volatile uint8_t *)from)[at];
		high >>= 8;
	}
}

/*
 * The one copy of a frame. Exactly `length` bytes: rounding up would hand the receiver leftovers
 * of older frames in the sender's slot. The header comes from the caller, not from the window.
 */
static inline void put_frame(struct switch_slot *slot, const uint8_t *from, struct header header,
			     uint64_t length)
{
	uint8_t *to = slot->frame;
	uint64_t at = 16, last = length - 16;

	slot->length = (uint32_t)length;
	((word *)to)[0] = header.low;
	if (UNLIKELY((uint32_t)length - 32 >= STRING_MOVE_BYTES - 32)) {
		put_odd_frame(to, from, header.high, length);
		return;
	}
	((word *)to)[1] = header.high;
	for (; at < last; at += 16) {
		uint64_t first = *(const word *)(from + at), second = *(const word *)(from + at + 8);

		*(word *)(to + at) = first;
		*(word *)(to + at + 8) = second;
	}
	/* The last 16 bytes, over some of the others unless these came out even. */
	*(word *)(to + last) = *(const word *)(from + last);
	*(word *)(to + last + 8) = *(const word *)(from + last + 8);
}

static __attribute__((noinline)) void flood(const struct call *call, uint32_t position,
					    struct header header, uint32_t length)
{
	struct switch_window *window = window_of(call, call->id);
	uint64_t others = call->enabled & ~(1ULL << call->id);
	uint32_t slot_mask = call->shared->lane_slots - 1;

	for (; others; others &= others - 1) {
		struct open_lane open = open_lane(call, (uint32_t)__builtin_ctzll(others));
		uint64_t slot = (uint64_t)(open.head & slot_mask) * SWITCH_SLOT_BYTES;

		call->port->copies++;
		if (!open.room) {
			count_refused(&open);
			continue;
		}
		put_frame((struct switch_slot *)(open.slots + slot),
			  transmit_frame(window, transmit_slot(call->shared, position)), header,
			  masked_length(length));
		close_lane(&open, 1, length);
	}
}

/* -------------------------------------------------------------------- send */

static inline uint32_t smaller(uint32_t a, uint32_t b)
{
	return a < b ? a : b;
}

/* What all frames of a run have in common. */
struct run {
	struct header header; /* of the first one */
	struct format format;
};

struct put {
	uint64_t frames;
	uint64_t bytes;
};

/*
 * Put a run into a lane: frames with the same addresses, type and VLAN, which go there without
 * looking anything up, up to `most`. One that differs, or has no usual length, ends the run; nothing
 * that was read of it here is kept. A function of its own, with the run in memory, so that the
 * masked pointers and lengths stay in registers.
 */
static __attribute__((noinline)) struct put put_run(struct switch_slot *slot, const uint8_t *frame,
						    const uint32_t *lengths, uint32_t most,
						    uint32_t length, const struct run *run)
{
	struct header header = run->header;
	uint32_t left = most;
	uint64_t masked, bytes = 0;

	for (;;) {
		masked = masked_length(length);
		put_frame(slot, frame, header, masked);
		bytes += masked;
		if (--left == 0)
			break;
		frame += SWITCH_SLOT_BYTES;
		slot++;
		lengths++;
		length = READ_ONCE(*lengths);
		if (UNLIKELY(length - run->format.shortest > run->format.spread))
			break;
		header.low = READ_ONCE(((const word *)frame)[0]);
		header.high = READ_ONCE(((const word *)frame)[1]);
		if (UNLIKELY(header.low != run->header.low ||
			     ((header.high ^ run->header.high) & run->format.bits)))
			break;
	}
	return (struct put){ most - left, bytes };
}

/* Send `count` frames from slot `first` on; how many were dealt with. */
static uint32_t send(const struct call *call, uint32_t first, uint32_t count, bool wait)
{
	const struct switch_shared *shared = call->shared;
	struct switch_port *port = call->port;
	struct switch_window *window = window_of(call, call->id);
	uint32_t done = 0;

	while (done < count) {
		uint32_t index = transmit_slot(shared, first + done);
		const uint8_t *frame = transmit_frame(window, index);
		uint32_t length = READ_ONCE(window->tx_length[index]);
		struct open_lane open;
		struct switch_slot *slot;
		uint32_t to, at, most;
		uint64_t *kind;
		struct run run;
		struct put put;

		run.header.low = READ_ONCE(((const word *)frame)[0]);
		run.header.high = READ_ONCE(((const word *)frame)[1]);
		run.format = format_of(shared, run.header);
		/* Less the shortest, so that one unsigned comparison refuses both ends. */
		if (UNLIKELY(length - run.format.shortest > run.format.spread) &&
		    (length < run.format.shortest || length > SWITCH_MAX_FRAME ||
		     run.format.bits == UNTAGGED_BITS || !has_tags_for(shared, frame, length))) {
			*(length < run.format.shortest ? &port->too_short : &port->too_long) += 1;
			done++;
			continue;
		}
		to = resolve(call, run.header, run.format.vlan, &kind);
		/* The calls may have put into memory what was masked: from here on it is not used. */
		if (to >= FLOOD) {
			if (to == FLOOD) {
				*kind += 1;
				flood(call, first + done, run.header, length);
			}
			port->bytes += length;
			done++;
			continue;
		}

		open = open_lane(call, masked_port(to));
		if (!open.room) {
			if (wait && !open.bad_tail) {
				port->waited++;
				break;
			}
			port->copies++;
			*kind += 1;
			port->bytes += length;
			find_lane(&open, call, masked_port(to));
			count_refused(&open);
			done++;
			continue;
		}
		/* A run ends where a ring wraps. */
		at = open.head & (shared->lane_slots - 1);
		slot = (struct switch_slot *)open.slots + at;
		index = transmit_slot(shared, first + done);
		most = smaller(smaller(count - done, open.room),
			       smaller(shared->lane_slots - at, shared->tx_slots - index));
		put = put_run(slot, transmit_frame(window, index), &window->tx_length[index], most,
			      length, &run);
		port->copies += put.frames;
		*kind += put.frames;
		port->bytes += put.bytes;
		find_lane(&open, call, masked_port(to));
		close_lane(&open, (uint32_t)put.frames, put.bytes);
		done += (uint32_t)put.frames;
	}
	port->frames += done;
	return done;
}

uint64_t elisa_serve(uint64_t a0, uint64_t a1, uint64_t a2, const struct elisa_env *env)
{
	struct switch_shared *shared = (struct switch_shared *)env->shared;
	struct call call = { .shared = shared, .env = env, .id = env->id };
	uint64_t sequence, result;

	call.port = &shared->port[call.id];
	call.port->calls++;
	if (UNLIKELY((a0 >> 8 & 0xff) != call.id)) {
		call.port->foreign_port++;
		return ELISA_ERROR(ELISA_EPERM);
	}
	if (UNLIKELY((a0 & ~(uint64_t)(0xff00 | SWITCH_WAIT)) != SWITCH_OP_SEND ||
		     a2 > SWITCH_MAX_BURST || a2 > shared->tx_slots)) {
		call.port->bad_request++;
		return ELISA_ERROR(ELISA_EINVAL);
	}
	/*
	 * The host takes a port away by clearing its bit and then waiting until no sequence is odd
	 * that was odd before. So the bit must be read after the sequence can be seen: a full
	 * barrier, which the exchange is.
	 */
	sequence = call.port->sequence | 1;
	__atomic_exchange_n(&call.port->sequence, sequence, __ATOMIC_SEQ_CST);
	call.enabled = READ_ONCE(shared->enabled);
	if (LIKELY(call.enabled >> call.id & 1)) {
		result = send(&call, (uint32_t)a1, (uint32_t)a2, a0 & SWITCH_WAIT);
	} else {
		call.port->port_down++;
		result = ELISA_ERROR(ELISA_ENETDOWN);
	}
	STORE_RELEASE(call.port->sequence, sequence + 1);
	return result;
}
