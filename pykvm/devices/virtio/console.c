#include "console_ports.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#define MOST_BYTES	(4u << 20)	/* in a chain */

static struct port *port_of(struct console *console, uint32_t queue)
{
	uint32_t port = queue < 2 ? 0 : queue / 2 - 1;

	return port < console->count ? &console->ports[port] : NULL;
}

/* ------------------------------------------------------------------- input */

static void end_input(struct console *console, struct virtio_loop *loop, struct port *port)
{
	console_change(port, 0, CONSOLE_ENDED);
	port->pending |= 1 << PORT_OPEN;
	console_send_control(console, loop);	/* after the last bytes: the guest reads them before */
	virtio_loop_tell(loop);
}

static bool wants_input(const struct port *port)
{
	return port->is.input >= 0 && port->state & CONSOLE_OPENED && !port->closing &&
	       !(port->state & CONSOLE_ENDED);
}

/* Waits until the descriptor has more; a regular file always has. */
static void wait_for_input(struct virtio_loop *loop, struct port *port, uint32_t queue)
{
	if (virtio_loop_watch(loop, port->is.input, EPOLLIN))
		virtio_loop_again(loop, queue);
	else
		port->input_waits = true;
}

static void serve_input(struct console *console, struct virtio_loop *loop, uint32_t number)
{
	struct port *port = &console->ports[number];
	struct virtqueue *queue = virtio_loop_queue(loop, RX_OF(number));
	struct pollfd wait = { .fd = port->is.input, .events = POLLIN };
	struct iovec iov[VIRTIO_CHAIN_IOVECS];
	struct virtio_chain chain = { .iov = iov, .room = VIRTIO_CHAIN_IOVECS };
	int taken = 0;

	if (!queue || !wants_input(port) || port->input_waits)
		return;
	/* One buffer at a time: other ports have their turn in between. */
	while (!(taken = virtqueue_take(queue, &chain)) && virtqueue_enable_kicks(queue))
		;
	if (taken > 0) {
		ssize_t n = -1;

		errno = EAGAIN;
		if (poll(&wait, 1, 0) > 0)
			n = readv(port->is.input, chain.iov + chain.reads, (int)chain.writes);
		if (n > 0) {
			virtqueue_put(queue, &chain, (uint64_t)n);
			virtqueue_flush(queue);
			virtio_loop_again(loop, RX_OF(number));
		} else if (n == 0 && !chain.writable) {
			virtqueue_put(queue, &chain, 0);	/* a buffer without room */
			virtqueue_flush(queue);
			virtio_loop_again(loop, RX_OF(number));
		} else {
			virtqueue_untake(queue, &chain);
			if (n < 0 && (errno == EAGAIN || errno == EINTR))
				wait_for_input(loop, port, RX_OF(number));
			else	/* a terminal that is gone has an error */
				end_input(console, loop, port);
		}
	} else if (taken < 0) {
		virtio_loop_fail(loop, virtqueue_reason(queue->broken));
	}
}

/* -------------------------------------------------------------------- loop */

static void nudged(struct virtio_device *device, struct virtio_loop *loop)
{
	struct console *console = (struct console *)device;
	uint32_t size = __atomic_load_n(&console->size, __ATOMIC_ACQUIRE);

	if (size == console->told_size)
		return;
	console->told_size = size;
	for (uint32_t number = 0; number < console->count; number++) {
		struct port *port = &console->ports[number];

		if (port->is.is_console && device->features & CONSOLE_F_SIZE && port->state & CONSOLE_OPENED)
			port->pending |= 1 << RESIZE;
	}
	console_send_control(console, loop);
}

/* Whether a queue has not been used: its driver is a new one. */
static bool is_fresh(const struct virtqueue *queue)
{
	return !queue || (!queue->next && !queue->used);
}

static void begin(struct virtio_device *device, struct virtio_loop *loop)
{
	struct console *console = (struct console *)device;

	console->told_size = __atomic_load_n(&console->size, __ATOMIC_ACQUIRE);
	if (!console_is_multiport(console)) {
		console_forget_driver(console);
		console_change(&console->ports[0], CONSOLE_CLOSED, CONSOLE_OPENED);
	} else if (is_fresh(virtio_loop_queue(loop, CONTROL_TX))) {
		console_forget_driver(console);
	}
	for (uint32_t number = 0; number < console->count; number++) {
		if (is_fresh(virtio_loop_queue(loop, TX_OF(number))))
			console->ports[number].done = 0;
	}
}

static void kicked(struct virtio_device *device, struct virtio_loop *loop, uint32_t index)
{
	struct console *console = (struct console *)device;
	struct port *port = port_of(console, index);

	if (index == CONTROL_RX) {
		console_send_control(console, loop);
	} else if (index == CONTROL_TX) {
		virtio_loop_serve(loop, index, console_take_control);
		console_send_control(console, loop);
	} else if (port && index & 1) {
		console_serve_output(console, loop, (uint32_t)(port - console->ports));
	} else if (port) {
		serve_input(console, loop, (uint32_t)(port - console->ports));
	}
}

static void ready(struct virtio_device *device, struct virtio_loop *loop, int fd, uint32_t events)
{
	struct console *console = (struct console *)device;

	(void)events;
	virtio_loop_watch(loop, fd, 0);	/* it is watched again when it has to be waited for */
	for (uint32_t number = 0; number < console->count; number++) {
		struct port *port = &console->ports[number];

		if (port->is.input == fd) {
			port->input_waits = false;
			serve_input(console, loop, number);
		} else if (port->is.output == fd) {
			port->output_waits = false;
			console_serve_output(console, loop, number);
		}
	}
}

static void drain(struct virtio_device *device, struct virtio_loop *loop)
{
	struct console *console = (struct console *)device;

	for (uint32_t number = 0; number < console->count; number++) {
		struct port *port = &console->ports[number];

		port->input_waits = port->output_waits = false;
		console_keep_output(loop, port, virtio_loop_queue(loop, TX_OF(number)));
	}
}

/* ------------------------------------------------------------- for Python */

void console_free(struct virtio_device *device)
{
	struct console *console = (struct console *)device;

	for (uint32_t number = 0; console && number < console->count; number++) {
		struct port *port = &console->ports[number];

		if (port->is.input >= 0)
			close(port->is.input);
		if (port->is.output >= 0)
			close(port->is.output);
		console_drop(port);
	}
	free(console);
}

struct virtio_device *console_new(const struct console_port *ports, uint32_t count)
{
	struct console *console = calloc(1, sizeof(*console) + count * sizeof(console->ports[0]));
	bool failed = false;

	if (!console)
		return NULL;
	console->device.most_bytes = MOST_BYTES;
	console->device.begin = begin;
	console->device.kicked = kicked;
	console->device.ready = ready;
	console->device.nudged = nudged;
	console->device.drain = drain;
	console->count = count;
	for (uint32_t number = 0; number < count; number++) {
		struct port *port = &console->ports[number];

		/* Copies: epoll takes a descriptor once, and these may be the same. */
		port->is = ports[number];
		port->is.name[CONSOLE_NAME_BYTES - 1] = 0;
		if (port->is.input >= 0)
			port->is.input = fcntl(port->is.input, F_DUPFD_CLOEXEC, 0);
		if (port->is.output >= 0)
			port->is.output = fcntl(port->is.output, F_DUPFD_CLOEXEC, 0);
		if ((ports[number].input >= 0 && port->is.input < 0) ||
		    (ports[number].output >= 0 && port->is.output < 0))
			failed = true;
		if (port->is.output < 0)
			port->state = CONSOLE_NO_READER;
	}
	if (failed) {
		int error = errno;

		console_free(&console->device);
		errno = error;
		return NULL;
	}
	return &console->device;
}

void console_resize(struct virtio_device *device, uint16_t columns, uint16_t rows)
{
	struct console *console = (struct console *)device;

	__atomic_store_n(&console->size, columns | (uint32_t)rows << 16, __ATOMIC_RELEASE);
}

uint32_t console_state(const struct virtio_device *device, uint32_t port)
{
	return __atomic_load_n(&((const struct console *)device)->ports[port].state,
			       __ATOMIC_ACQUIRE);
}

void console_set_state(struct virtio_device *device, uint32_t port, uint32_t state)
{
	console_change(&((struct console *)device)->ports[port], CONSOLE_OPENED | CONSOLE_CLOSED,
		  state & (CONSOLE_OPENED | CONSOLE_CLOSED));
}
