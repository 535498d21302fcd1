/* SPDX-License-Identifier: Apache-2.0 */
#include "frames.h"

void port_open(struct port *port, enum path path, uint64_t hypercall_number)
{
	const struct boot_attachment *attachment = &boot_info->attachment[0];
	struct switch_window *window = (struct switch_window *)attachment->window;

	ASSERT(window);
	ASSERT_EQUAL(window->info.magic, SWITCH_WINDOW_MAGIC);
	ASSERT_EQUAL(window->info.version, SWITCH_VERSION);
	*port = (struct port){
		.window = window,
		.path = path,
		.gate_slot = (uint32_t)attachment->gate_slot,
		.hypercall = hypercall_number,
		.id = window->info.port,
		.ports = window->info.ports,
		.tx_slots = window->info.tx_slots,
		.lane_slots = window->info.lane_slots,
	};
	ASSERT(port->ports <= SWITCH_MAX_PORTS && port->id < port->ports);
	ASSERT(path != PATH_VMFUNC || port->gate_slot);
	for (uint32_t source = 0; source < port->ports; source++)
		port->tail[source] = window->lane[source].tail;
	touch(attachment->window, attachment->window_size);
	if (path == PATH_DIRECT) {
		const struct elisa_env *env = &boot_info->direct;

		touch(env->shared, env->shared_size);
		touch(env->windows, env->window_size * env->guests);
	}
}

void port_queue(struct port *port, const void *frame, uint32_t length)
{
	uint32_t slot = port->first + port->pending;

	ASSERT(slot < port->tx_slots);
	memcpy((uint8_t *)port->window + switch_tx_offset(slot), frame, length);
	port->window->tx_length[slot] = length;
	port->pending++;
}

struct send_sample port_send(struct port *port)
{
	uint64_t request = SWITCH_SEND(port->id, SWITCH_WAIT);
	uint64_t first = port->first, count = port->pending, sent, start, end;

	/* Each branch reads the counter itself, so that choosing the path is not measured. */
	switch (port->path) {
	case PATH_VMFUNC:
		start = time_stamp();
		sent = object_call(request, first, count, port->gate_slot);
		end = time_stamp();
		break;
	case PATH_VMCALL:
		start = time_stamp();
		sent = hypercall(port->hypercall, request, first, count);
		end = time_stamp();
		break;
	default:
		start = time_stamp();
		sent = elisa_serve(request, first, count, &boot_info->direct);
		end = time_stamp();
		break;
	}
	if (sent > count)
		fail(__FILE__, __LINE__, "frames dealt with <= frames wanted", sent, count);
	port->first += (uint32_t)sent;
	port->pending -= (uint32_t)sent;
	if (!port->pending)
		port->first = 0;
	return (struct send_sample){end - start, (uint32_t)count, (uint32_t)sent};
}

uint32_t port_receive(struct port *port, take_frame take)
{
	uint8_t *base = (uint8_t *)port->window;
	uint32_t received = 0;

	for (uint32_t source = 0; source < port->ports; source++) {
		struct switch_lane_control *lane = &port->window->lane[source];
		uint8_t *slots = base + switch_lane_offset(port->tx_slots, port->lane_slots, source);
		uint32_t head = LOAD_ACQUIRE(lane->head);
		uint32_t tail = port->tail[source];

		if (tail == head)
			continue;
		while (tail != head) {
			const struct switch_slot *slot = (const struct switch_slot *)
				(slots + (uint64_t)(tail & (port->lane_slots - 1)) * SWITCH_SLOT_BYTES);

			take(source, slot->frame, slot->length);
			tail++;
			received++;
		}
		port->tail[source] = tail;
		STORE_RELEASE(lane->tail, tail);
	}
	return received;
}
