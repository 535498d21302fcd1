/*
 * A virtio block device over a file or a block device of the host. Source: VIRTIO 1.2, 5.2.
 *
 * What can be done without waiting is done in the loop's thread, the rest by a pool of threads. A
 * flush is answered when every write that was taken before it is done and fdatasync() has returned
 * after that. A driver that has not accepted VIRTIO_BLK_F_FLUSH has its writes made durable one by
 * one.
 *
 * cffi reads this header too, so outside the marked parts it holds plain declarations only.
 */
#ifndef PYKVM_VIRTIO_BLOCK_H
#define PYKVM_VIRTIO_BLOCK_H

/* not for cffi { */
#include "loop.h"
/* } */

#define BLOCK_SECTOR		512
#define BLOCK_ID_BYTES		20
#define BLOCK_MOST_RANGES	16	/* in a discard or write zeroes request */
#define BLOCK_DISCARD_SECTORS	8388608	/* in a range: 4 GiB */
#define BLOCK_ZEROES_SECTORS	65536	/* 32 MiB, which may have to be written */
#define BLOCK_MOST_THREADS	64

struct block_counters {
	uint64_t reads, writes, flushes, discards, errors, bytes_read, bytes_written, waited;
};

/* file: stays the caller's, until the device is freed. id: 20 bytes. NULL: no memory. */
struct virtio_device *block_new(int file, uint64_t bytes, bool read_only, const char *id,
				uint32_t threads);
void block_free(struct virtio_device *device);

/* Any thread. `waited`: requests that the pool has done. */
void block_count(const struct virtio_device *device, struct block_counters *counters);

/* The last errno that a request was refused with, and none afterwards; 0: none. Any thread. */
int block_take_error(struct virtio_device *device);

#endif
