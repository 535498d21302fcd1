/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Time interrupts. The local APIC's timer, whose deadline the guest knows, expires while work.c is
 * working, in the sub context or called directly, and has a given amount of work left.
 *
 * param[0]  interrupts for each amount of work and each way
 * param[1]  ticks from arming the timer to its deadline: enough to have started work by then
 * input     amounts of work left at the deadline, in ticks, 64 bits each
 * samples   struct sample of each interrupt: for each amount, those of the direct call, then
 *           those of the object
 * marks     2n before and 2n + 1 after part n: each amount has two parts, in the same order
 * result[0] samples
 */
#include "events.h"
#include "runtime.h"

#define VECTOR 0x55
#define MOST_TURNS (1ull << 32)

struct sample {
	uint64_t deadline;
	uint64_t begun;    /* before the call */
	uint64_t expected; /* when it would be over if nothing interrupted it */
	uint64_t handler;  /* time and place of the interrupt */
	uint64_t rip;
	uint64_t reserved;
};

/* Duration of a call. */
struct pace {
	uint64_t call; /* without work, in ticks */
	uint64_t turn; /* of one turn of work, in 1024ths of a tick */
};

static struct event event; /* the last one: the record has room for nothing else */

static void work(uint64_t turns, bool direct)
{
	uint64_t done = direct ? elisa_serve(turns, 0, 0, &boot_info->direct)
			       : object_call(turns, 0, 0,
					     (uint32_t)boot_info->attachment[0].gate_slot);

	ASSERT_EQUAL(done, turns);
}

/* Return the least time of several calls, because only the host can interrupt these. */
static uint64_t least_time(uint64_t turns, bool direct)
{
	uint64_t least = -1ull;

	for (int i = 0; i < 16; i++) {
		uint64_t begun = time_stamp(), took;

		work(turns, direct);
		took = time_stamp() - begun;
		least = took < least ? took : least;
	}
	return least;
}

static struct pace find_pace(bool direct)
{
	const uint64_t turns = 1 << 14;
	struct pace pace = {.call = least_time(0, direct)};

	pace.turn = (least_time(turns, direct) - pace.call) * 1024 / turns;
	ASSERT(pace.turn);
	return pace;
}

static void measure(struct sample *sample, uint64_t left, bool direct, const struct pace *pace)
{
	uint64_t seen = events_taken(), patience = MOST_TURNS, turns;
	uint64_t deadline = time_stamp() + boot_info->param[1];
	int64_t length;

	events_arm_timer(deadline, VECTOR);
	sample->deadline = deadline;
	sample->begun = time_stamp();
	length = (int64_t)(deadline + left - pace->call - sample->begun);
	turns = length > 0 ? (uint64_t)length * 1024 / pace->turn : 0;
	work(turns, direct);
	while (events_taken() == seen && patience)
		patience--;
	ASSERT_EQUAL(events_taken(), seen + 1);
	ASSERT_EQUAL(event.vector, VECTOR);
	sample->expected = sample->begun + pace->call + turns * pace->turn / 1024;
	sample->handler = event.time;
	sample->rip = event.rip;
}

uint32_t guest_main(void)
{
	const uint64_t *left = (const uint64_t *)boot_info->input;
	uint64_t amounts = boot_info->input_size / sizeof(*left), count = boot_info->param[0];
	struct sample *sample = (struct sample *)boot_info->samples;

	ASSERT(amounts * 2 * count * sizeof(*sample) <= boot_info->samples_size);
	ASSERT(boot_info->attachment[0].gate_slot);
	touch_for_writing(boot_info->samples, amounts * 2 * count * sizeof(*sample));
	events_open(&event, 1);
	for (uint32_t part = 0; part < 2 * amounts; part++) {
		bool direct = part % 2 == 0;
		struct pace pace = find_pace(direct);
		struct sample first;

		measure(&first, left[part / 2], direct, &pace); /* load what first use needs */
		mark(2 * part);
		for (uint64_t i = 0; i < count; i++)
			measure(sample++, left[part / 2], direct, &pace);
		mark(2 * part + 1);
	}
	boot_info->result[0] = 2 * amounts * count;
	return 0;
}
