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

struct serial;

/* output, interrupt: descriptors, the second an eventfd; -1: none. NULL: no memory. */
struct serial *serial_new(int output, int interrupt);
void serial_free(struct serial *serial);

/*
 * Output that waits for a reader is given up at the next signal of its thread, and no further
 * output waits. Any thread; takes no lock.
 */
void serial_stop(struct serial *serial);

/*
 * Bytes for the guest; returns how many it takes now: none before it asks for interrupts of received
 * bytes, and later what there is room for. Any thread.
 */
size_t serial_feed(struct serial *serial, const char *data, size_t size);

/* The end of what the guest has written, at most size bytes; returns their number. */
size_t serial_tail(struct serial *serial, char *out, size_t size);

int serial_access(void *context, const struct pykvm_access *access);

#endif
