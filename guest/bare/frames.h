/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest's end of the virtual switch. It sends by one of three paths, and receives by polling its
 * lanes, which takes no call (guest/include/switch.h).
 */
#ifndef FRAMES_H
#define FRAMES_H

#include "runtime.h"
#include "switch.h"

enum path {
	PATH_VMFUNC, /* the switch in its sub context */
	PATH_VMCALL, /* the switch in the VMM, by hypercall KVM_HC_ELISA_USER + n */
	PATH_DIRECT, /* the switch linked into this guest, everything mapped */
};

struct port {
	struct switch_window *window;
	enum path path;
	uint32_t gate_slot;
	uint64_t hypercall;
	uint32_t id;
	uint32_t ports;
	uint32_t tx_slots;
	uint32_t lane_slots;
	uint32_t first;   /* transmit slot of the first frame not yet sent */
	uint32_t pending; /* number of frames from there on */
	uint32_t tail[SWITCH_MAX_PORTS];
};

/* One send call, as stored in boot_info->samples. */
struct send_sample {
	uint64_t cycles; /* of the time-stamp counter, reading it included */
	uint32_t wanted; /* frames in the call */
	uint32_t sent;   /* frames that the switch dealt with */
};

/* Open the port of attachment 0. The hypercall number is for PATH_VMCALL. */
void port_open(struct port *port, enum path path, uint64_t hypercall_number);

/* Append a frame to the pending ones. Slots are free again only when all of these are sent. */
void port_queue(struct port *port, const void *frame, uint32_t length);

/* Send the pending frames in one call. Those that the receiver has no room for stay pending. */
struct send_sample port_send(struct port *port);

/*
 * Pass every frame that is ready to `take`, and give its slot back; return their number. Nobody
 * changes a frame until its slot is given back.
 */
typedef void (*take_frame)(uint32_t source, const uint8_t *frame, uint32_t length);
uint32_t port_receive(struct port *port, take_frame take);

#endif
