/* Tables of handlers: sorted, searched by bisection, and never changed while they are in use. */
#include "handlers.h"

#include <stdlib.h>
#include <string.h>

struct pykvm_table {
	/* Handlers of space s are those from start[s] to before start[s + 1]. */
	size_t start[PYKVM_SPACES + 1];
	struct pykvm_handler handlers[];
};

struct pykvm_table *pykvm_table_new(const struct pykvm_handler *handlers, size_t count)
{
	struct pykvm_table *table = malloc(sizeof(*table) + count * sizeof(*handlers));
	size_t next = 0;

	if (!table)
		return NULL;
	memcpy(table->handlers, handlers, count * sizeof(*handlers));
	for (uint32_t space = 0; space <= PYKVM_SPACES; space++) {
		while (next < count && handlers[next].space < space)
			next++;
		table->start[space] = next;
	}
	return table;
}

static const struct pykvm_handler *find(const struct pykvm_table *table, uint32_t space,
					uint64_t first, uint64_t last)
{
	size_t low = table->start[space], high = table->start[space + 1];

	while (low < high) {
		size_t middle = low + (high - low) / 2;
		const struct pykvm_handler *handler = &table->handlers[middle];

		if (first < handler->first)
			high = middle;
		else if (first > handler->last)
			low = middle + 1;
		else
			return last <= handler->last ? handler : NULL;
	}
	return NULL;
}

static int serve_access(const struct pykvm_table *table, uint32_t space, uint64_t place,
			struct pykvm_access *access)
{
	const struct pykvm_handler *handler = find(table, space, place, place + access->size - 1);

	if (!handler)
		return 0;
	access->offset = place - handler->first;
	return ((pykvm_access_fn)handler->function)(handler->context, access);
}

static int serve_port(const struct pykvm_table *table, struct kvm_run *run)
{
	struct pykvm_access access = {
		.size = run->io.size,
		.count = run->io.count,
		.is_write = run->io.direction == KVM_EXIT_IO_OUT,
		.data = (uint8_t *)run + run->io.data_offset,
	};

	return serve_access(table, PYKVM_PORTS, run->io.port, &access);
}

static int serve_mmio(const struct pykvm_table *table, struct kvm_run *run)
{
	struct pykvm_access access = {
		.size = run->mmio.len,
		.count = 1,
		.is_write = run->mmio.is_write,
		.data = run->mmio.data,
	};

	return serve_access(table, PYKVM_MMIO, run->mmio.phys_addr, &access);
}

static int serve_hypercall(const struct pykvm_table *table, struct kvm_run *run)
{
	uint64_t number = run->hypercall.nr;
	const struct pykvm_handler *handler = find(table, PYKVM_HYPERCALLS, number, number);

	if (!handler)
		return 0;
	run->hypercall.ret = ((pykvm_hypercall_fn)handler->function)(
		handler->context, (const uint64_t *)run->hypercall.args);
	return 1;
}

int pykvm_table_serve(const struct pykvm_table *table, struct kvm_run *run)
{
	switch (run->exit_reason) {
	case KVM_EXIT_IO:
		return serve_port(table, run);
	case KVM_EXIT_MMIO:
		return serve_mmio(table, run);
	case KVM_EXIT_HYPERCALL:
		return serve_hypercall(table, run);
	default:
		return 0;
	}
}

uint64_t pykvm_null_hypercall(void *context, const uint64_t args[6])
{
	(void)context;
	(void)args;
	return 0;
}
