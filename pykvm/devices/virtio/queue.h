/*
 * Virtqueues, the device's side: split and packed rings, indirect descriptors, event index.
 * Source: VIRTIO 1.2, 2.6 to 2.8.
 *
 * How a device uses one (loop.h has the thread that calls it):
 *
 *	do {
 *		virtqueue_disable_kicks(queue);
 *		while ((taken = virtqueue_take(queue, &chain)) > 0) {
 *			... read and write the chain's iovecs, now or later ...
 *			virtqueue_put(queue, &chain, written);
 *		}
 *		virtqueue_flush(queue);
 *	} while (taken == 0 && virtqueue_enable_kicks(queue));
 *
 * taken < 0: the driver has broken the queue, queue->broken says how, and nothing more is taken from
 * it; what was taken before may still be put. A device that cannot use a chain yet (no packet, no
 * input) gives it back with virtqueue_untake() and takes it again later. Chains are put in any
 * order. A request that makes no sense to the device but is a valid chain does not break the queue:
 * it is put, with a status or with nothing written.
 *
 * A queue is used by one thread at a time; a device with several takes a lock of its own.
 *
 * cffi reads this header too, so outside the marked parts it holds plain declarations only.
 */
#ifndef PYKVM_VIRTIO_QUEUE_H
#define PYKVM_VIRTIO_QUEUE_H

/* not for cffi { */
#include "chain.h"
/* } */

#define VIRTQUEUE_MAX_SIZE	32768

/* pykvm.devices.virtio.device.Ring, and what belongs to all rings of a device. */
struct virtqueue_setup {
	uint64_t descriptors;		/* GPAs */
	uint64_t driver;
	uint64_t device;
	uint64_t features;		/* that the driver has accepted */
	uint64_t most_bytes;		/* in a chain; 0: VIRTIO_CHAIN_BYTES */
	uint32_t size;
	uint32_t base;			/* as VHOST_SET_VRING_BASE takes it */
	int kick;			/* eventfds; -1: none */
	int call;
};

struct virtqueue {
	const struct virtio_memory *memory;
	uint8_t *descriptors;		/* host addresses */
	uint8_t *driver;
	uint8_t *device;
	uint64_t most_bytes;
	uint32_t size;
	bool packed;
	bool indirect;
	bool event_idx;
	bool asked;			/* whether the driver was asked if it wants to be told */
	bool next_wrap;			/* packed: the wrap counters */
	bool used_wrap;
	uint16_t next;			/* available entry to take next */
	uint16_t used;			/* used entry to write next */
	uint16_t in_flight;		/* entries of the ring that are taken and not flushed */
	uint16_t unpublished;		/* entries that are put and not flushed */
	uint16_t first_flags;		/* packed: of the first of them, which publishes all */
	uint16_t first;
	int broken;			/* enum virtqueue_fault */
	int kick;
	int call;
};

/* Returns 0 or an enum virtqueue_fault. The memory table must outlive the queue. */
int virtqueue_init(struct virtqueue *queue, const struct virtio_memory *memory,
		   const struct virtqueue_setup *setup);

/* 1: chain is filled in; 0: nothing is available; -1: the queue is broken. */
int virtqueue_take(struct virtqueue *queue, struct virtio_chain *chain);

/* Takes the last virtqueue_take() back; nothing may have been taken or put since. */
void virtqueue_untake(struct virtqueue *queue, const struct virtio_chain *chain);

/* written: bytes, from the beginning of those to write. The driver sees it after the flush. */
void virtqueue_put(struct virtqueue *queue, const struct virtio_chain *chain, uint64_t written);

/* Publishes what was put, and writes the call eventfd if the driver wants it: then returns true. */
bool virtqueue_flush(struct virtqueue *queue);

/* Hints that kicks are not needed now, or are; the latter returns true if something is there. */
void virtqueue_disable_kicks(struct virtqueue *queue);
bool virtqueue_enable_kicks(struct virtqueue *queue);

/* Ring.base for whoever goes on, when everything that was taken is put and flushed. */
uint32_t virtqueue_base(const struct virtqueue *queue);

#endif
