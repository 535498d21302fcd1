/*
 * A virtio console: ports whose bytes go between a guest and file descriptors. Source: VIRTIO 1.2,
 * 5.3.
 *
 * Without the feature MULTIPORT a driver has port 0 alone. Input is read into the guest's buffers
 * when it has some, and output is taken from them when the descriptor takes it: nothing lies in
 * between, so nothing is lost, and a writer waits for its reader as with a pipe. What is available
 * when the device stops is kept for the next start, or for console_flush().
 *
 * cffi reads this header too, so outside the marked parts it holds plain declarations only.
 */
#ifndef PYKVM_VIRTIO_CONSOLE_H
#define PYKVM_VIRTIO_CONSOLE_H

/* not for cffi { */
#include "loop.h"
/* } */

#define CONSOLE_NAME_BYTES	32

struct console_port {
	char name[CONSOLE_NAME_BYTES];	/* "": none */
	int input;			/* descriptors, which stay the caller's; -1: none */
	int output;
	bool is_console;		/* rather than a plain stream of bytes */
};

/* Bits of console_state(). */
#define CONSOLE_OPENED		1	/* the guest has the port open */
#define CONSOLE_CLOSED		2	/* it had, and all that it has written is out */
#define CONSOLE_ENDED		4	/* the input has ended, and the guest is told */
#define CONSOLE_NO_READER	8	/* the output takes nothing any more: it is dropped */

/* NULL: errno. */
struct virtio_device *console_new(const struct console_port *ports, uint32_t count);
void console_free(struct virtio_device *device);

/* Any thread; virtio_loop_nudge() afterwards. */
void console_resize(struct virtio_device *device, uint16_t columns, uint16_t rows);
uint32_t console_state(const struct virtio_device *device, uint32_t port);

/* While it is stopped: what is known of ports after a snapshot. */
void console_set_state(struct virtio_device *device, uint32_t port, uint32_t state);

/* Writes what is kept of a port, while it is stopped, for so long; returns how much is left. */
uint64_t console_flush(struct virtio_device *device, uint32_t port, int milliseconds);

#endif
