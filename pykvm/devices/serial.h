/*
 * A serial port: the registers of a 16550A (National Semiconductor PC16550D, section 8), without
 * the time that bytes take on a wire. Output goes to a file descriptor from inside the run loop.
 *
 * cffi reads this header too, so outside the marked parts it holds plain declarations only.
 */
#ifndef PYKVM_SERIAL_H
#define PYKVM_SERIAL_H

/* not for cffi { */
#include <stddef.h>
#include <stdint.h>
#include "handlers.h"
/* } */

#define SERIAL_PORTS	8
#define SERIAL_INPUT	4096

struct serial;

/* What a guest sees of a port; the end of what it has written is not part of it. */
struct serial_state {
	uint8_t ier, fcr, lcr, mcr, scr, overrun, sent;
	uint16_t divisor;
	uint16_t count;			/* of bytes that the guest has not read yet */
	uint8_t input[SERIAL_INPUT];	/* the oldest first */
};

/* output, interrupt: descriptors, the second an eventfd; -1: none. NULL: no memory. */
struct serial *serial_new(int output, int interrupt);
void serial_free(struct serial *serial);

/*
 * Output that waits for a reader is given up at the next signal of its thread, and no further
 * output waits. Any thread; takes no lock.
 */
void serial_stop(struct serial *serial);

/*
 * Sends what the guest writes to further sockets too, as long as they have room: nobody waits for
 * them. 0, or -ENOSPC: there are SERIAL_WATCHERS. Any thread; unwatch before the socket is closed.
 */
#define SERIAL_WATCHERS	4
int serial_watch(struct serial *serial, int socket);
void serial_unwatch(struct serial *serial, int socket);

/*
 * Bytes for the guest; returns how many it takes now: none before it asks for interrupts of received
 * bytes, and later what there is room for. Any thread.
 */
size_t serial_feed(struct serial *serial, const char *data, size_t size);

/* The end of what the guest has written, at most size bytes; returns their number. */
size_t serial_tail(struct serial *serial, char *out, size_t size);

/*
 * Copies the state out, or in. The latter raises the interrupt again if there is something to tell,
 * because a pulse may have been lost on the way. Not while a vCPU runs. -1: no such state.
 */
void serial_save(struct serial *serial, struct serial_state *state);
int serial_restore(struct serial *serial, const struct serial_state *state);

int serial_access(void *context, const struct pykvm_access *access);

#endif
