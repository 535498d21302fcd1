/*
 * Handlers: C functions that serve exits of a vCPU inside the run loop, without Python.
 *
 * A device in C includes this header alone. cffi reads it too, so outside the marked parts it
 * holds plain declarations only.
 */
#ifndef PYKVM_HANDLERS_H
#define PYKVM_HANDLERS_H

/* not for cffi { */
#include <stddef.h>
#include <stdint.h>
#include <linux/kvm.h>
/* } */

/* What the numbers of a handler's range are. */
#define PYKVM_PORTS		0	/* I/O ports */
#define PYKVM_MMIO		1	/* guest physical addresses */
#define PYKVM_HYPERCALLS	2	/* hypercall numbers */
#define PYKVM_SPACES		3

/* One access to a range of ports or of guest physical memory. */
struct pykvm_access {
	uint64_t offset;	/* from the range's first port or address, bytes */
	uint32_t size;		/* of one access: 1, 2, 4 or 8 bytes */
	uint32_t count;		/* accesses at this place, one after the other (INS, OUTS) */
	uint32_t is_write;
	uint8_t *data;		/* size * count bytes that the guest writes, or reads back */
};

/* Returns 1 when the access is served, 0 to leave the exit to Python. */
typedef int (*pykvm_access_fn)(void *context, const struct pykvm_access *access);

/* args: RBX, RCX, RDX, RSI and two zeros. Returns what becomes the guest's RAX. */
typedef uint64_t (*pykvm_hypercall_fn)(void *context, const uint64_t args[6]);

/*
 * A handler may be called by several vCPUs at once. It never changes a table of handlers: a
 * change waits until no handler of the old table runs.
 */
struct pykvm_handler {
	uint32_t space;		/* PYKVM_PORTS, PYKVM_MMIO or PYKVM_HYPERCALLS */
	uint64_t first, last;	/* the range, both ends included */
	void *function;		/* pykvm_access_fn or pykvm_hypercall_fn */
	void *context;
};

/* A hypercall that returns 0: the cheapest exit that leaves the kernel. */
uint64_t pykvm_null_hypercall(void *context, const uint64_t args[6]);

/* not for cffi { */
struct pykvm_table;

/* handlers: sorted by space and first, without overlaps; they are copied. NULL: no memory. */
struct pykvm_table *pykvm_table_new(const struct pykvm_handler *handlers, size_t count);

/* Returns 1 if the exit in run is served, 0 if it is for Python. */
int pykvm_table_serve(const struct pykvm_table *table, struct kvm_run *run);
/* } */

#endif
