/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest as a process of its own: it maps the switch's memory, sends and receives as fast as it
 * can with the native build of the switch, looks at every byte that arrives, and can be killed at
 * any instruction. What it did so far stands in a record that outlives it.
 *
 * guest SWITCH_FD RECORDS_FD PORT INCARNATION WINDOWS_OFFSET
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "elisa_memory.h"
#include "elisa_object.h"
#include "switch.h"

#define MOST_FRAMES 32

/* tests/rigs/switch/fire/processes.py holds the same. */
struct record {
	uint64_t stop;        /* written by the test: finish */
	uint64_t incarnation;
	uint64_t rounds;      /* calls and looks at all lanes that are finished */
	uint64_t submitted;   /* frames of all calls, the one under way included */
	uint64_t dealt;       /* frames of finished calls that the switch has dealt with */
	uint64_t received;    /* all of the following */
	uint64_t error;       /* line of this file at which something was wrong, else 0 */
	uint64_t unused;
	uint64_t sent_to[SWITCH_MAX_PORTS]; /* of those dealt with: to that port or to everybody */
	uint64_t received_from[SWITCH_MAX_PORTS];
};

struct frame {
	uint8_t destination[6], source[6];
	uint16_t type;
	uint16_t length;
	uint32_t incarnation;
	uint64_t sequence; /* grows by one with each frame of a sender */
	uint8_t from, to;  /* ports; 0xff for everybody */
	uint8_t rest[];
} __attribute__((packed));

static struct elisa_env env;
static struct record *record;
static struct switch_window *window;
static uint32_t ports, tx_slots, lane_slots;
static uint64_t sequence;
static uint64_t random_state;

#define REQUIRE(condition) ((condition) ? (void)0 : wrong(__LINE__))

static void wrong(uint32_t line)
{
	record->error = line;
	exit(3);
}

static uint32_t random_below(uint32_t limit)
{
	random_state = random_state * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)((random_state >> 33) % limit);
}

static uint64_t filler(uint8_t from, uint32_t incarnation, uint64_t number, uint64_t at)
{
	return (number << 24 ^ (uint64_t)incarnation << 8 ^ from) * 0x9E3779B97F4A7C15u + at * 0x0101;
}

/* The bytes behind the head of a frame: written, or compared. */
static int fill(const struct frame *head, uint8_t *rest, uint32_t bytes, int compare)
{
	for (uint32_t at = 0; at < bytes; at += 8) {
		uint64_t word = filler(head->from, head->incarnation, head->sequence, at);
		uint32_t count = bytes - at < 8 ? bytes - at : 8;

		if (!compare)
			memcpy(rest + at, &word, count);
		else if (memcmp(rest + at, &word, count))
			return 0;
	}
	return 1;
}

/*
 * Stations: number 0 of a port is pinned there, so that frames for it are never flooded, and
 * number 1 is learned anew whenever the port has got another guest.
 */
static void address(uint8_t *octets, uint8_t port, uint8_t number)
{
	memset(octets, port == 0xff ? 0xff : 0, 6);
	if (port != 0xff) {
		octets[0] = 2;
		octets[4] = number;
		octets[5] = port;
	}
}

static uint8_t compose(uint32_t slot)
{
	uint32_t length = random_below(4) ? 60 + random_below(200) : 60 + random_below(1455);
	struct frame *frame = (struct frame *)((uint8_t *)window + switch_tx_offset(slot));
	uint8_t to = 0xff;

	if (random_below(4)) {
		to = (uint8_t)random_below(ports - 1);
		to += to >= env.id;
	}
	address(frame->destination, to, 0);
	address(frame->source, (uint8_t)env.id, to == 0xff);
	frame->type = 0xb588;
	frame->length = (uint16_t)length;
	frame->incarnation = (uint32_t)record->incarnation;
	frame->sequence = ++sequence;
	frame->from = (uint8_t)env.id;
	frame->to = to;
	fill(frame, frame->rest, length - sizeof(*frame), 0);
	window->tx_length[slot] = length;
	return to;
}

static void send_some(void)
{
	uint32_t count = 1 + random_below(MOST_FRAMES), first = random_below(tx_slots);
	uint64_t flags = random_below(4) ? 0 : SWITCH_WAIT, result;
	uint8_t to[MOST_FRAMES];

	for (uint32_t at = 0; at < count; at++)
		to[at] = compose((first + at) & (tx_slots - 1));
	record->submitted += count;
	result = elisa_serve(SWITCH_SEND(env.id, flags), first, count, &env);
	REQUIRE(result <= count);
	REQUIRE(result == count || flags);
	for (uint32_t at = 0; at < result; at++) {
		for (uint32_t port = 0; port < ports; port++) {
			if (port != env.id && (to[at] == port || to[at] == 0xff))
				record->sent_to[port]++;
		}
	}
	record->submitted -= count - result;
	record->dealt += result;
}

static void receive_from(uint32_t source)
{
	static uint32_t last_incarnation[SWITCH_MAX_PORTS];
	static uint64_t last_sequence[SWITCH_MAX_PORTS];
	struct switch_lane_control *lane = &window->lane[source];
	uint8_t *slots = (uint8_t *)window + switch_lane_offset(tx_slots, lane_slots, source);
	uint32_t head = LOAD_ACQUIRE(lane->head);
	uint32_t tail = lane->tail;

	REQUIRE(head - tail <= lane_slots);
	for (; tail != head; tail++) {
		struct switch_slot *slot = (struct switch_slot *)slots + (tail & (lane_slots - 1));
		struct frame *frame = (struct frame *)slot->frame;
		uint8_t expected[6];

		REQUIRE(slot->length >= 60 && slot->length == frame->length);
		REQUIRE(frame->from == source && frame->type == 0xb588);
		REQUIRE(frame->to == env.id || frame->to == 0xff);
		address(expected, frame->to, 0);
		REQUIRE(!memcmp(frame->destination, expected, 6));
		address(expected, frame->from, frame->to == 0xff);
		REQUIRE(!memcmp(frame->source, expected, 6));
		REQUIRE(fill(frame, frame->rest, slot->length - (uint32_t)sizeof(*frame), 1));
		/* In order, none twice, and nothing of a sender that is gone after its successor's. */
		REQUIRE(frame->incarnation >= last_incarnation[source]);
		REQUIRE(frame->incarnation > last_incarnation[source] ||
			frame->sequence > last_sequence[source]);
		last_incarnation[source] = frame->incarnation;
		last_sequence[source] = frame->sequence;
		record->received_from[source]++;
		record->received++;
	}
	STORE_RELEASE(lane->tail, tail);
}

static void *map(int fd, uint64_t *size)
{
	struct stat stat;
	void *memory;

	if (fstat(fd, &stat))
		exit(4);
	*size = (uint64_t)stat.st_size;
	memory = mmap(0, *size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		exit(4);
	return memory;
}

int main(int count, char **arguments)
{
	uint64_t size, offset;
	uint8_t *memory;

	if (count != 6)
		return 2;
	memory = map(atoi(arguments[1]), &size);
	offset = strtoull(arguments[5], 0, 0);
	ports = ((struct switch_shared *)memory)->ports;
	tx_slots = ((struct switch_shared *)memory)->tx_slots;
	lane_slots = ((struct switch_shared *)memory)->lane_slots;
	env = (struct elisa_env){
		.shared = (uint64_t)memory,
		.shared_size = offset,
		.windows = (uint64_t)memory + offset,
		.window_size = switch_window_size(ports, tx_slots, lane_slots),
		.id = (uint32_t)atoi(arguments[3]),
		.guests = ports,
		.vcpus = 1,
	};
	window = (struct switch_window *)(env.windows + env.id * env.window_size);
	record = (struct record *)map(atoi(arguments[2]), &size) + env.id;
	memset((uint8_t *)record + 8, 0, sizeof(*record) - 8);
	record->incarnation = strtoull(arguments[4], 0, 0);
	random_state = record->incarnation << 8 | env.id;
	while (!READ_ONCE(record->stop)) {
		send_some();
		for (uint32_t source = 0; source < ports; source++)
			receive_from(source);
		WRITE_ONCE(record->rounds, record->rounds + 1);
	}
	return 0;
}
