/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Send one side of a conversation through the switch, and log every frame that arrives.
 *
 * param[0]  path (enum path)
 * param[1]  hypercall number for PATH_VMCALL
 * param[2]  rounds: how often to send the whole input
 * param[3]  frames to receive before it stops
 * param[4]  frames of one burst
 * param[5]  polls without progress after which it gives up
 * input     frames: 32-bit length, 32 bits unused, then the bytes, padded to 8
 * log       frames in the same form, the unused word holding the source port
 * samples   struct send_sample of each call
 * marks     0 before the first frame, 1 after the last
 * result[0] frames sent, [1] received, [2] samples, [3] bytes of log, [4] calls that the receiver
 *           had no room for, in whole or in part
 * status    0, or 1 if it gave up
 */
#include "frames.h"

struct record {
	uint32_t length;
	uint32_t source;
	uint8_t frame[];
};

static uint64_t log_used;

static uint64_t record_bytes(uint32_t length)
{
	return (sizeof(struct record) + length + 7) & ~7ull;
}

static void log_frame(uint32_t source, const uint8_t *frame, uint32_t length)
{
	struct record *record = (struct record *)(boot_info->log + log_used);

	ASSERT(length <= SWITCH_MAX_FRAME);
	ASSERT(log_used + record_bytes(length) <= boot_info->log_size);
	record->length = length;
	record->source = source;
	memcpy(record->frame, frame, length);
	log_used += record_bytes(length);
}

uint32_t guest_main(void)
{
	static struct port port;
	uint64_t rounds = boot_info->param[2], expected = boot_info->param[3];
	uint64_t burst = boot_info->param[4], idle_limit = boot_info->param[5];
	uint64_t at = 0, idle = 0, sent = 0, received = 0, samples = 0, waited = 0;
	uint64_t log_needed = expected * record_bytes(SWITCH_DEFAULT_FRAME);
	uint64_t sample_room = boot_info->samples_size / sizeof(struct send_sample);
	struct send_sample *sample = (struct send_sample *)boot_info->samples;

	port_open(&port, (enum path)boot_info->param[0], boot_info->param[1]);
	ASSERT(burst > 0 && burst <= port.tx_slots);
	touch_for_writing(boot_info->samples, boot_info->samples_size);
	touch_for_writing(boot_info->log, log_needed < boot_info->log_size ? log_needed
									   : boot_info->log_size);
	touch(boot_info->input, boot_info->input_size);
	if (!boot_info->input_size)
		rounds = 0;
	mark(0);
	while (idle < idle_limit && (rounds || port.pending || received < expected)) {
		uint64_t arrived;

		idle++;
		if (!port.pending) {
			while (rounds && port.pending < burst) {
				const struct record *record =
					(const struct record *)(boot_info->input + at);

				port_queue(&port, record->frame, record->length);
				at += record_bytes(record->length);
				if (at >= boot_info->input_size) {
					at = 0;
					rounds--;
					break; /* so that every round has the same bursts */
				}
			}
		}
		if (port.pending) {
			struct send_sample done = port_send(&port);

			waited += done.sent < done.wanted;
			sent += done.sent;
			if (done.sent)
				idle = 0;
			if (done.sent && samples < sample_room)
				sample[samples++] = done;
		}
		arrived = port_receive(&port, log_frame);
		received += arrived;
		if (arrived)
			idle = 0;
	}
	mark(1);
	boot_info->result[0] = sent;
	boot_info->result[1] = received;
	boot_info->result[2] = samples;
	boot_info->result[3] = log_used;
	boot_info->result[4] = waited;
	return idle >= idle_limit;
}
