/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Send bursts of equal frames to one station, phase by phase, and take what arrives meanwhile.
 *
 * param[0]  path (enum path)
 * param[1]  hypercall number for PATH_VMCALL
 * param[2]  frames to receive before it stops
 * param[3]  polls without progress after which it gives up
 * param[4]  own address, param[5] address of the station to send to (first byte lowest)
 * input     struct phase, each 16 bytes
 * samples   struct send_sample of each call
 * marks     2n before phase n, 2n + 1 after it
 * result[0] frames sent, [1] received, [2] samples, [3] bytes received, [4] calls that the
 *           receiver had no room for, in whole or in part
 * status    0, or 1 if it gave up
 */
#include "frames.h"

struct phase {
	uint32_t frame_bytes;
	uint32_t burst;  /* frames of one call */
	uint32_t bursts; /* each takes one call, or more if the receiver has no room */
	uint32_t reserved;
};

static struct port port;
static uint64_t bytes_received;

static void count_frame(uint32_t source, const uint8_t *frame, uint32_t length)
{
	(void)source;
	(void)frame;
	bytes_received += length;
}

static void make_frame(uint8_t *frame, uint32_t length)
{
	for (uint32_t i = 0; i < 6; i++) {
		frame[i] = (uint8_t)(boot_info->param[5] >> 8 * i);
		frame[6 + i] = (uint8_t)(boot_info->param[4] >> 8 * i);
	}
	frame[12] = 0x88; /* EtherType of local experiments, IEEE 802 */
	frame[13] = 0xb5;
	for (uint32_t i = SWITCH_MIN_FRAME; i < length; i++)
		frame[i] = (uint8_t)i;
}

uint32_t guest_main(void)
{
	static uint8_t frame[SWITCH_MAX_FRAME];
	const struct phase *phase = (const struct phase *)boot_info->input;
	uint64_t phases = boot_info->input_size / sizeof(*phase);
	uint64_t expected = boot_info->param[2], idle_limit = boot_info->param[3];
	uint64_t idle = 0, sent = 0, received = 0, samples = 0, waited = 0;
	uint64_t sample_room = boot_info->samples_size / sizeof(struct send_sample);
	struct send_sample *sample = (struct send_sample *)boot_info->samples;

	port_open(&port, (enum path)boot_info->param[0], boot_info->param[1]);
	touch_for_writing(boot_info->samples, boot_info->samples_size);
	for (uint64_t n = 0; n < phases; n++) {
		uint64_t bursts = phase[n].bursts;

		ASSERT(phase[n].frame_bytes >= SWITCH_MIN_FRAME);
		ASSERT(phase[n].frame_bytes <= SWITCH_MAX_FRAME);
		ASSERT(phase[n].burst > 0 && phase[n].burst <= port.tx_slots);
		make_frame(frame, phase[n].frame_bytes);
		mark((uint32_t)(2 * n));
		while (idle < idle_limit && (bursts || port.pending)) {
			struct send_sample done;
			uint64_t arrived;

			if (!port.pending) {
				while (port.pending < phase[n].burst)
					port_queue(&port, frame, phase[n].frame_bytes);
				bursts--;
			}
			done = port_send(&port);
			waited += done.sent < done.wanted;
			sent += done.sent;
			if (done.sent && samples < sample_room)
				sample[samples++] = done;
			arrived = port_receive(&port, count_frame);
			received += arrived;
			idle = done.sent || arrived ? 0 : idle + 1;
		}
		mark((uint32_t)(2 * n + 1));
	}
	while (idle < idle_limit && received < expected) {
		uint64_t arrived = port_receive(&port, count_frame);

		received += arrived;
		idle = arrived ? 0 : idle + 1;
	}
	boot_info->result[0] = sent;
	boot_info->result[1] = received;
	boot_info->result[2] = samples;
	boot_info->result[3] = bytes_received;
	boot_info->result[4] = waited;
	return idle >= idle_limit;
}
