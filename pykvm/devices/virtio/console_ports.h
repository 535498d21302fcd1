/* What the sources of the console share: its ports, output and control messages. */
#ifndef PYKVM_VIRTIO_CONSOLE_PORTS_H
#define PYKVM_VIRTIO_CONSOLE_PORTS_H

#include "console.h"

#define CONSOLE_F_SIZE		(1u << 0)
#define CONSOLE_F_MULTIPORT	(1u << 1)

/* Queues: {receive, transmit} of port 0, of control, of port 1, ... as the driver sees them. */
#define CONTROL_RX	2
#define CONTROL_TX	3
#define RX_OF(port)	((port) ? 2 * (port) + 2 : 0)
#define TX_OF(port)	(RX_OF(port) + 1)

struct port {
	struct console_port is;
	bool closing;		/* the guest has closed it; its output is not all out */
	bool input_waits;	/* epoll watches the descriptor */
	bool output_waits;
	uint16_t pending;	/* messages to send: bits by event */
	uint32_t state;		/* atomic; written by the loop */
	uint64_t done;		/* bytes of the next chain that are out */
	uint8_t *kept;		/* what goes out before it */
	size_t kept_size, kept_done;
};

struct console {
	struct virtio_device device;
	uint32_t count;
	uint32_t size;		/* atomic: columns, and rows << 16 */
	uint32_t told_size;
	struct port ports[];
};

static inline bool console_is_multiport(const struct console *console)
{
	return console->device.features & CONSOLE_F_MULTIPORT;
}

static inline void console_change(struct port *port, uint32_t clear, uint32_t set)
{
	__atomic_store_n(&port->state, (port->state & ~clear) | set, __ATOMIC_RELEASE);
}

/* ---- console_output.c ---- */

void console_serve_output(struct console *console, struct virtio_loop *loop, uint32_t number);
void console_keep_output(struct virtio_loop *loop, struct port *port, struct virtqueue *queue);
void console_drop(struct port *port);

/* ---- console_control.c ---- */

/* Events of control messages (5.3.6.2). */
enum {
	DEVICE_READY, DEVICE_ADD, DEVICE_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN,
	PORT_NAME, MESSAGES
};

int64_t console_take_control(struct virtio_device *device, struct virtio_loop *loop, uint32_t index,
			     struct virtio_chain *chain);
void console_send_control(struct console *console, struct virtio_loop *loop);
void console_forget_driver(struct console *console);

#endif
