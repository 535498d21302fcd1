/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The virtual switch's memory and its call, for everyone who touches them: the switch itself
 * (guest/switch/switch.c), the guests, the host's administration and the tests.
 *
 * Window of a port (mapped in that guest and in the switch; both write it):
 *
 *   0x0000  struct switch_window_info  geometry, written by the host for the guest's benefit only
 *   0x0400  tx_length[tx_slots]        bytes of the frame in each transmit slot
 *   0x1000  lane[source]               head (switch) and tail (guest) of the lane from each port
 *   0x3000  transmit slots             tx_slots frames, SWITCH_SLOT_BYTES apart
 *   ...     lanes, by source port      lane_slots of struct switch_slot each
 *
 * To send, a guest writes frames into transmit slots, their lengths into tx_length, and calls
 * elisa_serve(SWITCH_SEND(port, flags), first slot, count). The frames are copied before the call
 * returns, so the slots are free again at once. It returns how many frames it has dealt with
 * (delivered, dropped or filtered; fewer than count only with SWITCH_WAIT), or a negative errno.
 *
 * To receive, a guest looks at lane[source] of every source, without any call: frames tail up to
 * head (not included, load-acquire) are ready in slots index & (lane_slots - 1); it stores tail
 * (store-release) when it is done with them. Both count frames and wrap at 2^32.
 */
#ifndef SWITCH_H
#define SWITCH_H

#include <stdint.h>

#define SWITCH_MAX_PORTS 64
#define SWITCH_MAX_BURST 256 /* frames of one call */
#define SWITCH_MAX_TX_SLOTS 256
#define SWITCH_MAX_LANE_SLOTS 4096
#define SWITCH_SLOT_BYTES 2048
#define SWITCH_MIN_FRAME 14 /* an Ethernet header */
#define SWITCH_DEFAULT_FRAME 1514
#define SWITCH_MAX_FRAME 2040 /* a slot less its 8-byte header */

/*
 * VLAN tags: 802.1Q customer and 802.1ad service tags, stacked in any order. A frame may be 4 bytes
 * longer than its port's limit for each (IEEE 802.3, 3.2.7), as far as it fits into a slot. Linux
 * looks for no more than eight either (VLAN_MAX_DEPTH in include/linux/if_vlan.h).
 */
#define SWITCH_TAG_BYTES 4
#define SWITCH_MAX_TAGS 8
#define SWITCH_CUSTOMER_TAG 0x8100
#define SWITCH_SERVICE_TAG 0x88a8
#define SWITCH_ANY_VLAN 0xfff /* no frame's own: IEEE 802.1Q reserves it (table 9-2) */

/*
 * Group addresses of the link, 01-80-C2-00-00-00 to -0F, first byte lowest: spanning tree, pause,
 * LACP, LLDP and others end at the next bridge (IEEE 802.1Q, table 8-1).
 */
#define SWITCH_LINK_LOCAL 0x0000c28001ULL
#define SWITCH_LINK_LOCAL_SHIFT 40 /* of the four bits that differ */

/* a0 of the call: operation in bits 0-7, the caller's port in 8-15, flags from bit 16 */
#define SWITCH_OP_SEND 1
/* Stop before a frame whose only receiver's lane is full, instead of dropping it. */
#define SWITCH_WAIT (1 << 16)
#define SWITCH_SEND(port, flags) (SWITCH_OP_SEND | (uint64_t)(port) << 8 | (uint64_t)(flags))

#define SWITCH_WINDOW_MAGIC 0x57495645u /* "EVIW" */
#define SWITCH_SHARED_MAGIC 0x53495645u /* "EVIS" */
#define SWITCH_VERSION 3

/* ------------------------------------------------------------------ windows */

struct switch_window_info {
	uint32_t magic;
	uint32_t version;
	uint32_t port;        /* the port that this window belongs to */
	uint32_t ports;       /* lanes 0 to ports - 1 exist; the port's own one stays empty */
	uint32_t tx_slots;    /* a power of two, at most SWITCH_MAX_TX_SLOTS */
	uint32_t lane_slots;  /* a power of two */
	uint32_t frame_limit; /* longest frame in bytes without tags, up to SWITCH_MAX_FRAME */
	uint32_t reserved;
	uint64_t lanes_offset; /* of lane 0's first slot in the window */
	uint64_t lane_bytes;   /* from one lane's first slot to the next one's */
};

/* Two cache lines, so that sender and receiver do not take one from each other at every frame. */
struct switch_lane_control {
	_Alignas(64) uint32_t head; /* written by the switch only; it never reads it back */
	_Alignas(64) uint32_t tail; /* written by the receiving guest */
};

struct switch_slot {
	uint32_t length; /* bytes of frame */
	uint32_t reserved;
	uint8_t frame[SWITCH_MAX_FRAME];
};

struct switch_window {
	union {
		struct switch_window_info info;
		uint8_t info_bytes[0x400];
	};
	union {
		uint32_t tx_length[SWITCH_MAX_TX_SLOTS];
		uint8_t tx_length_bytes[0xc00];
	};
	struct switch_lane_control lane[SWITCH_MAX_PORTS];
	uint8_t tx_frame[]; /* transmit slots, then lanes */
};

static inline uint64_t switch_tx_offset(uint32_t slot)
{
	return sizeof(struct switch_window) + (uint64_t)slot * SWITCH_SLOT_BYTES;
}

static inline uint64_t switch_lane_offset(uint32_t tx_slots, uint32_t lane_slots, uint32_t source)
{
	return switch_tx_offset(tx_slots) + (uint64_t)source * lane_slots * SWITCH_SLOT_BYTES;
}

/* In bytes, a multiple of 4096. */
static inline uint64_t switch_window_size(uint32_t ports, uint32_t tx_slots, uint32_t lane_slots)
{
	return (switch_lane_offset(tx_slots, lane_slots, ports) + 4095) & ~(uint64_t)4095;
}

/* ------------------------------------------------------------ shared memory */

/*
 * Of one port, written only by that port's own calls, and by the host when the port's vCPU can
 * never run again. All of them grow from the switch's creation on. When no call is under way:
 *   frames = unicast + broadcast + multicast + unknown
 *            + too_short + too_long + same_port + no_receiver + spoofed
 *            + bad_source + link_local
 *   copies = delivered + full + bad_tail, summed over the lanes from this port, + lost
 *
 * A call that is cut short by its vCPU's end leaves the first two sums open; the host closes them
 * (pykvm/switch/admin.c, switch_port_left). Of the frames of that call, those that a counter names
 * were dealt with, those in `lost` were on their way to a lane and can never be seen there, and the
 * rest was never looked at. Only `bytes`, here and of lanes, can then be off by one run of frames.
 */
struct switch_port {
	_Alignas(64) uint64_t sequence; /* odd while a call is inside the switch */
	uint64_t calls;
	uint64_t frames;    /* dealt with */
	uint64_t bytes;     /* of the frames dealt with that were not too short or too long */
	uint64_t unicast;   /* to the port on which their destination was learned */
	uint64_t broadcast;
	uint64_t multicast;
	uint64_t unknown;   /* flooded, because the destination was not learned or too old */
	uint64_t copies;    /* that these four kinds asked for */
	uint64_t too_short;   /* no room for addresses, type and the tag that the type announces */
	uint64_t too_long;    /* longer than the limit and its tags allow */
	uint64_t same_port;   /* filtered: the destination is on the sender's own port */
	uint64_t no_receiver; /* no other port is enabled, or the learned one no longer is */
	uint64_t spoofed;     /* the source is pinned to another port */
	uint64_t bad_source;  /* a group address or zero, which no station has */
	uint64_t link_local;  /* filtered: for the link's own protocols, which end here */
	uint64_t waited;      /* calls that SWITCH_WAIT ended early */
	uint64_t cut;         /* calls that never ended because their vCPU did */
	uint64_t lost;        /* copies that such calls had asked for and not published */
	uint64_t not_learned; /* sources for which this port had no room left in the table */
	/* Calls refused as a whole */
	uint64_t foreign_port; /* the guest named a port that is not its own */
	uint64_t bad_request;  /* unknown operation or flag, or too many frames */
	uint64_t port_down;    /* the port is not enabled */
};

/*
 * Of one source and one destination, written only by the source port's calls. One store both
 * publishes frames and counts them, so that a call which stops between any two instructions
 * leaves no frame that was delivered and not counted, or the other way round.
 */
struct switch_lane {
	/* Frames that were ever put in; less `start`, the authoritative head: the window's copy can
	 * be forged by the guest. */
	_Alignas(64) uint64_t delivered;
	uint64_t bytes;    /* delivered */
	uint64_t full;     /* dropped: the receiver has not made room */
	uint64_t bad_tail; /* dropped: the receiver's tail is no position of this lane */
	uint64_t start;    /* `delivered` when the receiver's window was emptied, by the host */
};

/*
 * Station table: lines of eight 64-bit words, one word per station, so that an entry is read and
 * replaced in one piece and needs no lock. A station is an address on a VLAN (IEEE 802.1Q's
 * independent learning). Of its 59 bits (12 of the VLAN, 47 of the address without the group bit,
 * which is 0) a word has room for 50, so the table is quotiented: the station's bits are multiplied
 * by an odd number modulo 2^59, which can be undone; the product's first nine bits name the line,
 * and the word holds the other 50. A word is 0 when empty, else
 *   bits 0-5 port, 6-11 epoch, 12 pinned, 13 one, 14-63 rest of the station.
 *
 * The VLAN is that of the outermost tag, and 0 for frames without a tag or with a priority tag
 * (VLAN 0). A pinned address counts on every VLAN: its word is that of SWITCH_ANY_VLAN, and it is
 * looked up before all others.
 */
#define SWITCH_TABLE_LINES 512
#define SWITCH_TABLE_WAYS 8
/* Fresh entries of one port in a line: no single guest can crowd the others out of the table. */
#define SWITCH_TABLE_SHARE 2
#define SWITCH_MAC_MASK 0xffffffffffffULL
#define SWITCH_ENTRY_EPOCH_SHIFT 6
#define SWITCH_ENTRY_EPOCH_MASK 0x3fu
#define SWITCH_ENTRY_PINNED (1ULL << 12)
#define SWITCH_ENTRY_VALID (1ULL << 13)
#define SWITCH_ENTRY_REST_SHIFT 14
#define SWITCH_MAX_AGE 50 /* epochs; below 64 less some, so that an old entry cannot look new */

struct switch_shared {
	/* Written once by the host */
	_Alignas(64) uint32_t magic;
	uint32_t version;
	uint32_t ports;
	uint32_t tx_slots;
	uint32_t lane_slots;
	uint32_t frame_limit;
	uint32_t max_age;   /* epochs without a frame after which a station is forgotten */
	uint32_t group_forward_mask; /* bit n: 01-80-C2-00-00-0n is forwarded all the same */
	uint64_t hash_seed; /* odd and random, so that guests cannot aim at a line of the table */
	/* Written by the host at run time */
	_Alignas(64) uint64_t enabled; /* bit p: port p sends and receives */
	uint64_t epoch;
	uint64_t pins; /* pinned addresses; while there are none, nobody looks for them */
	struct switch_port port[SWITCH_MAX_PORTS];
	_Alignas(64) uint64_t table[SWITCH_TABLE_LINES][SWITCH_TABLE_WAYS];
	struct switch_lane lane[SWITCH_MAX_PORTS][SWITCH_MAX_PORTS]; /* [source][destination] */
};

/* A station's bits, mixed: of the product the line, and its rest where an entry has it. */
static inline uint64_t switch_station(const struct switch_shared *shared, uint64_t address,
				      uint32_t vlan)
{
	return ((uint64_t)vlan << 52 | address << 4) * shared->hash_seed;
}

static inline uint32_t switch_station_line(uint64_t station)
{
	return (uint32_t)(station >> 55);
}

static inline uint64_t switch_station_rest(uint64_t station)
{
	return station << 9; /* the lowest five bits of a station are 0: its address has no group bit */
}

/* Whether an entry is the station's; another entry of it will do for `rest`. */
static inline int switch_entry_is(uint64_t entry, uint64_t rest)
{
	return (entry ^ rest) >> SWITCH_ENTRY_REST_SHIFT == 0 && entry != 0;
}

static inline uint32_t switch_entry_port(uint64_t entry)
{
	return entry & (SWITCH_MAX_PORTS - 1);
}

_Static_assert(sizeof(struct switch_slot) == SWITCH_SLOT_BYTES, "a slot is one stride");
_Static_assert(sizeof(struct switch_window) == 0x3000, "transmit slots start at 0x3000");
_Static_assert(sizeof(struct switch_lane_control) == 128, "two cache lines");
_Static_assert(sizeof(struct switch_lane) == 64, "one cache line");
_Static_assert(SWITCH_TABLE_LINES == 1 << 9, "switch_station_line takes nine bits");
_Static_assert(SWITCH_MAX_PORTS == 1 << SWITCH_ENTRY_EPOCH_SHIFT, "a port takes the first bits");

#endif
