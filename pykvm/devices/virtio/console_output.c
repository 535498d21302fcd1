/* A console's output: from a guest's buffers to descriptors. */
#include "console_ports.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#define MOST_KEPT	(16u << 20)	/* of a port's output, when the device stops */
#define PART		4096		/* what a pipe takes without waiting, when it is ready */

void console_drop(struct port *port)
{
	free(port->kept);
	port->kept = NULL;
	port->kept_size = port->kept_done = 0;
}

/* Bytes that are out; 0: not now; -1: nobody reads any more. */
static ssize_t write_some(const struct port *port, const struct iovec *iov, int count)
{
	struct iovec part = iov[0];
	struct pollfd wait = { .fd = port->is.output, .events = POLLOUT };
	ssize_t n;

	if (!(fcntl(port->is.output, F_GETFL) & O_NONBLOCK)) {
		if (poll(&wait, 1, 0) == 0)
			return 0;
		if (part.iov_len > PART)
			part.iov_len = PART;
		iov = &part;
		count = 1;
	}
	n = writev(port->is.output, iov, count);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	return n;
}

static void no_reader(struct virtio_loop *loop, struct port *port)
{
	console_change(port, 0, CONSOLE_NO_READER);
	console_drop(port);
	if (loop)
		virtio_loop_tell(loop);
}

/* Returns whether nothing is kept any more. */
static bool write_kept(struct virtio_loop *loop, struct port *port)
{
	while (port->kept_done < port->kept_size) {
		struct iovec rest = {
			.iov_base = port->kept + port->kept_done,
			.iov_len = port->kept_size - port->kept_done,
		};
		ssize_t n = write_some(port, &rest, 1);

		if (n == 0)
			return false;
		if (n < 0) {
			no_reader(loop, port);
			return true;
		}
		port->kept_done += (size_t)n;
	}
	console_drop(port);
	return true;
}

/* Returns whether the whole chain is out, or nobody wants it. */
static bool write_chain(struct virtio_loop *loop, struct port *port, struct virtio_chain *chain)
{
	struct iovec iov[64];

	while (port->done < chain->readable && !(port->state & CONSOLE_NO_READER)) {
		uint64_t left = chain->readable - port->done;
		int n = -1;
		ssize_t out;

		while (n < 0) {	/* fewer bytes, until they lie in few enough pieces */
			n = virtio_chain_slice(chain, false, port->done, left, iov, 64);
			left = left / 2 ? left / 2 : 1;
		}
		out = write_some(port, iov, n);
		if (out == 0)
			return false;
		if (out < 0)
			no_reader(loop, port);
		else
			port->done += (uint64_t)out;
	}
	port->done = 0;
	return true;
}

static void wait_for_reader(struct virtio_loop *loop, struct port *port, uint32_t queue)
{
	if (virtio_loop_watch(loop, port->is.output, EPOLLOUT))
		virtio_loop_again(loop, queue);
	else
		port->output_waits = true;
}

static int64_t take_output(struct virtio_device *device, struct virtio_loop *loop, uint32_t index,
			   struct virtio_chain *chain)
{
	struct console *console = (struct console *)device;
	struct port *port = &console->ports[index < 2 ? 0 : index / 2 - 1];

	if (write_chain(loop, port, chain))
		return 0;
	wait_for_reader(loop, port, index);
	return VIRTIO_NOT_NOW;
}

void console_serve_output(struct console *console, struct virtio_loop *loop, uint32_t number)
{
	struct port *port = &console->ports[number];
	struct virtqueue *queue = virtio_loop_queue(loop, TX_OF(number));

	if (port->output_waits)
		return;
	if (!write_kept(loop, port)) {
		wait_for_reader(loop, port, TX_OF(number));
		return;
	}
	virtio_loop_serve(loop, TX_OF(number), take_output);
	if (!port->closing || port->output_waits || (queue && virtqueue_enable_kicks(queue)))
		return;
	port->closing = false;
	console_change(port, CONSOLE_OPENED, CONSOLE_CLOSED);
	virtio_loop_tell(loop);
}

/* Keeps what a driver that resets the device, or goes away, has written before. */
void console_keep_output(struct virtio_loop *loop, struct port *port, struct virtqueue *queue)
{
	struct iovec iov[VIRTIO_CHAIN_IOVECS];
	struct virtio_chain chain = { .iov = iov, .room = VIRTIO_CHAIN_IOVECS };

	while (queue && virtqueue_take(queue, &chain) > 0) {
		if (!write_kept(loop, port) || !write_chain(loop, port, &chain)) {
			size_t more = chain.readable - port->done;
			uint8_t *kept = NULL;

			if (port->kept_size + more <= MOST_KEPT)
				kept = realloc(port->kept, port->kept_size + more);
			if (!kept) {
				virtqueue_untake(queue, &chain);
				return;
			}
			port->kept = kept;
			port->kept_size += virtio_chain_read(&chain, port->done,
							     kept + port->kept_size, more);
			port->done = 0;
		}
		virtqueue_put(queue, &chain, 0);
	}
}

uint64_t console_flush(struct virtio_device *device, uint32_t number, int milliseconds)
{
	struct port *port = &((struct console *)device)->ports[number];
	struct pollfd wait = { .fd = port->is.output, .events = POLLOUT };

	while (port->kept && !write_kept(NULL, port)) {
		if (poll(&wait, 1, milliseconds) <= 0)
			break;
	}
	return port->kept_size - port->kept_done;
}
