/*
 * A virtio network device: frames between a guest's rings and a TAP, or a stream socket that has
 * each frame's length in front (32 bits, big endian; passt, QEMU's -netdev stream).
 * Source: VIRTIO 1.2, 5.1.
 *
 * cffi reads this header too, so outside the marked parts it holds plain declarations only.
 */
#ifndef PYKVM_VIRTIO_NET_H
#define PYKVM_VIRTIO_NET_H

/* not for cffi { */
#include "loop.h"
/* } */

/* Frames, and their bytes without headers; received: by the guest. */
struct net_counters {
	uint64_t received;
	uint64_t received_bytes;
	uint64_t received_dropped;	/* too large for the guest's buffers, or none to be had */
	uint64_t sent;
	uint64_t sent_bytes;
	uint64_t sent_dropped;		/* not a frame, refused by the host, or nobody is there */
};

/*
 * fd: non-blocking; it stays its owner's, and outlives the device. A TAP has headers of 12 bytes.
 * NULL: no memory.
 */
struct virtio_device *net_new(int fd, bool stream);
void net_free(struct virtio_device *device);

/* ---- any thread ---- */

/* Why there is nobody on the other side any more; NULL: somebody is. */
const char *net_lost(const struct virtio_device *device);

void net_read_counters(const struct virtio_device *device, struct net_counters *out);

#endif
