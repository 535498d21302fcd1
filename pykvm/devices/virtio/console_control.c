/* A console's control messages. */
#include "console_ports.h"

#include <string.h>

struct message {
	uint32_t port;
	uint16_t event;
	uint16_t value;
	union {
		uint16_t size[2];
		char name[CONSOLE_NAME_BYTES];
	};
};

static size_t describe(const struct console *console, uint32_t number, int event,
		       struct message *message)
{
	const struct port *port = &console->ports[number];
	size_t size = offsetof(struct message, size);

	*message = (struct message){ .port = number, .event = (uint16_t)event, .value = 1 };
	if (event == PORT_OPEN)
		message->value = !(port->state & CONSOLE_ENDED);
	if (event == RESIZE) {
		/* Columns first (5.3.6.2). Linux had them swapped until its stable releases of 2025. */
		message->size[0] = (uint16_t)console->told_size;
		message->size[1] = (uint16_t)(console->told_size >> 16);
		size += sizeof(message->size);
	}
	if (event == PORT_NAME) {
		memcpy(message->name, port->is.name, CONSOLE_NAME_BYTES);
		size += strlen(port->is.name);
	}
	return size;
}

void console_send_control(struct console *console, struct virtio_loop *loop)
{
	struct virtqueue *queue = virtio_loop_queue(loop, CONTROL_RX);
	struct iovec iov[VIRTIO_CHAIN_IOVECS];
	struct virtio_chain chain = { .iov = iov, .room = VIRTIO_CHAIN_IOVECS };
	int taken = 1;

	if (!queue || !console_is_multiport(console))
		return;
	for (uint32_t number = 0; number < console->count; number++) {
		struct port *port = &console->ports[number];

		for (int event = 0; event < MESSAGES; event++) {
			struct message message;
			size_t size;

			if (!(port->pending >> event & 1))
				continue;
			while (!(taken = virtqueue_take(queue, &chain)) &&
			       virtqueue_enable_kicks(queue))
				;
			if (taken <= 0)
				goto out;
			size = describe(console, number, event, &message);
			virtqueue_put(queue, &chain,
				      virtio_chain_write(&chain, 0, &message, size));
			port->pending &= (uint16_t)~(1u << event);
		}
	}
out:
	virtqueue_flush(queue);
	if (taken < 0)
		virtio_loop_fail(loop, virtqueue_reason(queue->broken));
}

/* The driver begins anew. */
void console_forget_driver(struct console *console)
{
	for (uint32_t number = 0; number < console->count; number++) {
		struct port *port = &console->ports[number];

		port->pending = 0;
		port->closing = false;
		console_change(port, CONSOLE_OPENED, 0);
	}
}

int64_t console_take_control(struct virtio_device *device, struct virtio_loop *loop, uint32_t index,
			    struct virtio_chain *chain)
{
	struct console *console = (struct console *)device;
	struct message message;
	struct port *port;

	(void)index;
	if (virtio_chain_read(chain, 0, &message, offsetof(struct message, size)) <
	    offsetof(struct message, size))
		return 0;
	if (message.event == DEVICE_READY) {
		console_forget_driver(console);
		for (uint32_t number = 0; message.value == 1 && number < console->count; number++)
			console->ports[number].pending = 1 << DEVICE_ADD;
		return 0;
	}
	if (message.port >= console->count)
		return 0;
	port = &console->ports[message.port];
	if (message.event == PORT_READY && message.value == 1) {
		port->pending |= 1 << PORT_OPEN;
		if (port->is.is_console)
			port->pending |= 1 << CONSOLE_PORT;
		if (port->is.is_console && console->device.features & CONSOLE_F_SIZE && console->told_size)
			port->pending |= 1 << RESIZE;
		if (port->is.name[0])
			port->pending |= 1 << PORT_NAME;
	} else if (message.event == PORT_OPEN && message.value) {
		port->closing = false;
		console_change(port, CONSOLE_CLOSED, CONSOLE_OPENED);
		virtio_loop_again(loop, RX_OF(message.port));
		virtio_loop_tell(loop);
	} else if (message.event == PORT_OPEN && port->state & CONSOLE_OPENED) {
		port->closing = true;
		console_serve_output(console, loop, message.port);
	}
	return 0;
}
