/*
 * Frames for a guest: from a TAP right into the driver's buffers, or from a stream socket by way of
 * a buffer. Source: VIRTIO 1.2, 5.1.6.3 and 5.1.6.4.
 *
 * Chains are taken ahead of the frames and held, so that a frame costs no second look at a ring. As
 * many bytes are held as frames had lately: for a larger one more chains are taken when it is there,
 * and the part of it that found no room is copied.
 */
#ifndef PYKVM_VIRTIO_NET_RECEIVE_H
#define PYKVM_VIRTIO_NET_RECEIVE_H

#include "net.h"

#define NET_HEADER	12	/* struct virtio_net_hdr_v1 */
#define NET_ETHERNET	14	/* no frame is shorter than its header */
#define NET_LENGTH	4	/* in front of a frame of a stream */
#define NET_TAP_MOST	(65536 + 18)	/* bytes of a frame, with all offloads */
#define NET_STREAM_MOST	65535

#define NET_HELD	256	/* chains */
#define NET_IOVECS	(NET_HELD + VIRTIO_CHAIN_IOVECS)
#define NET_TAP_BUFFER	(2 * NET_TAP_MOST)
#ifndef NET_STREAM_BUFFER
#define NET_STREAM_BUFFER	(2 << 20)
#endif

enum net_outcome {
	NET_MORE,	/* a frame has come, or was dropped */
	NET_EMPTY,	/* the other side has nothing */
	NET_STARVED,	/* the driver has no buffers */
	NET_GONE,	/* there is no other side any more */
	NET_BROKEN,	/* the driver has broken the queue */
};

struct net_receiver {
	int fd;
	bool stream;
	bool mergeable;			/* a frame may lie in several chains */
	struct virtqueue *queue;	/* NULL: there is none */
	struct net_counters *counters;
	uint64_t window;		/* bytes to hold */
	uint32_t quiet;			/* small frames since the last large one */
	uint32_t count;			/* chains that are held */
	uint32_t iovecs;		/* of them all */
	uint64_t bytes;			/* in them all */
	uint64_t total;			/* TAP: bytes of a frame that is not wholly in them, or 0 */
	uint64_t at;			/* TAP: those of it that are; stream: first of the buffer */
	uint64_t end;			/* stream: end of what is in the buffer */
	struct virtio_chain held[NET_HELD];
	struct iovec iov[NET_IOVECS + 1];	/* one more for the buffer */
	uint64_t size;			/* of the buffer */
	uint8_t *buffer;
};

/* 0 or an errno. */
int net_receiver_init(struct net_receiver *receiver, int fd, bool stream,
		      struct net_counters *counters);

void net_receiver_begin(struct net_receiver *receiver, struct virtqueue *queue, bool mergeable);

/* Takes one frame; the caller flushes the queue. */
enum net_outcome net_receive(struct net_receiver *receiver);

/*
 * Reads what a stream has while the driver has no buffers, because passt drops what finds no room in
 * the socket. NET_STARVED: there is no room in the buffer either, or this is no stream.
 */
enum net_outcome net_receive_ahead(struct net_receiver *receiver);

/* Gives the held chains back. */
void net_receiver_drain(struct net_receiver *receiver);

static inline void net_count(uint64_t *counter, uint64_t more)
{
	/* One thread writes, others read. */
	__atomic_store_n(counter, *counter + more, __ATOMIC_RELAXED);
}

#endif
