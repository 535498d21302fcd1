/*
 * A virtio memory balloon: pages that a guest does without go back to the host, those in the balloon
 * and those that it reports as free. Source: VIRTIO 1.2, 5.5.
 *
 * cffi reads this header too, so outside the marked parts it holds plain declarations only.
 */
#ifndef PYKVM_VIRTIO_BALLOON_H
#define PYKVM_VIRTIO_BALLOON_H

/* not for cffi { */
#include "loop.h"
/* } */

#define BALLOON_STATISTICS	16	/* tags that are kept (5.5.6.4) */

struct balloon_counters {
	uint64_t inflated;	/* pages that were put into the balloon */
	uint64_t deflated;	/* pages that were taken out, as the guest says */
	uint64_t reported;	/* bytes that were reported as free */
	uint64_t refused;	/* pages or reports that are no memory of the guest's */
};

/*
 * ram: what may be given back, mapped files of anonymous memory that outlive the device; the table
 * is copied. Other memory that the guest has is shared with others. NULL: no memory.
 */
struct virtio_device *balloon_new(const struct virtio_memory *ram);
void balloon_free(struct virtio_device *device);

/* Which queue has statistics, and which one reports; -1: none. Before the start. */
void balloon_set_queues(struct virtio_device *device, int statistics, int reporting);

/* ---- any thread ---- */

void balloon_read_counters(const struct virtio_device *device, struct balloon_counters *out);

/* Asks the guest for statistics at the next virtio_loop_nudge(). */
void balloon_ask(struct virtio_device *device);

/* Copies what the guest has told last; a bit of the result for each tag that it has told. */
uint32_t balloon_statistics(const struct virtio_device *device, uint64_t *values);

#endif
