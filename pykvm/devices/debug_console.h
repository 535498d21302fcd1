/*
 * A debug console: what the guest writes to its ports is collected in a buffer of fixed size.
 *
 * cffi reads this header too, so outside the marked parts it holds plain declarations only.
 */
#ifndef PYKVM_DEBUG_CONSOLE_H
#define PYKVM_DEBUG_CONSOLE_H

/* not for cffi { */
#include "handlers.h"
/* } */

struct debug_console;

/* size: bytes of the buffer, more than 0. NULL: no memory. */
struct debug_console *debug_console_new(size_t size);
void debug_console_free(struct debug_console *console);

/* Takes up to size bytes out of the buffer, oldest first; returns how many. */
size_t debug_console_read(struct debug_console *console, char *out, size_t size);

/* Bytes that were lost because the buffer was full. */
uint64_t debug_console_dropped(struct debug_console *console);

/* A pykvm_access_fn with the console as its context; input is left to Python. */
int debug_console_access(void *console, const struct pykvm_access *access);

#endif
