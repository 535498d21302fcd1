/*
 * The thread of a virtio device in C: it sleeps until a driver kicks one of the device's queues, a
 * descriptor of the device's own is ready, or someone nudges it. No Python runs in it.
 *
 * A device is written so: a structure of its own begins with struct virtio_device, whose functions
 * are called in the loop's thread alone; a function that makes it returns that. Functions that are
 * not needed are NULL.
 *
 *	static int64_t answer(struct virtio_device *device, struct virtio_loop *loop,
 *			      uint32_t index, struct virtio_chain *chain)
 *	{
 *		... virtio_chain_read(), virtio_chain_write() ...
 *		return written;
 *	}
 *
 *	static void kicked(struct virtio_device *device, struct virtio_loop *loop, uint32_t index)
 *	{
 *		virtio_loop_serve(loop, index, answer);
 *	}
 *
 * A queue into which the device puts what comes from elsewhere (a console's input, a network's
 * packets) is not served so: when there is something, virtqueue_take() on virtio_loop_queue(), fill,
 * put, flush; when nothing is available, virtqueue_enable_kicks() and wait for kicked().
 *
 * Whoever goes on with a chain later (a pool of threads) copies the chain and its iovecs, answers
 * VIRTIO_KEPT, and puts it in the loop's thread: other threads hand it over and call
 * virtio_loop_nudge(). A chain costs at most one unit of the loop's attention, so that a driver that
 * never ends cannot keep the loop from stopping.
 *
 * cffi reads this header too, so outside the marked parts it holds plain declarations only.
 */
#ifndef PYKVM_VIRTIO_LOOP_H
#define PYKVM_VIRTIO_LOOP_H

/* not for cffi { */
#include "queue.h"
/* } */

struct virtio_loop;

struct virtio_device {
	uint64_t features;	/* that the driver has accepted; set before the start */
	uint64_t most_bytes;	/* in a chain; 0: VIRTIO_CHAIN_BYTES */

	/* The loop has started; afterwards every queue is kicked once. */
	void (*begin)(struct virtio_device *device, struct virtio_loop *loop);
	void (*kicked)(struct virtio_device *device, struct virtio_loop *loop, uint32_t index);
	/* A descriptor that the device watches; events as epoll has them. */
	void (*ready)(struct virtio_device *device, struct virtio_loop *loop, int fd,
		      uint32_t events);
	void (*nudged)(struct virtio_device *device, struct virtio_loop *loop);
	/*
	 * The loop ends: finish, put or untake every chain that was taken. No other function is
	 * called after it before the next begin().
	 */
	void (*drain)(struct virtio_device *device, struct virtio_loop *loop);
};

/* ---- for who starts and stops it: one thread at a time ---- */

/* queues: their number; events: eventfd that is written on failure and by virtio_loop_tell().
 * NULL: errno says why. */
struct virtio_loop *virtio_loop_new(struct virtio_device *device, uint32_t queues, int events);

/* Adds a queue before the start; 0 or enum virtqueue_fault. memory must outlive the loop. */
int virtio_loop_add(struct virtio_loop *loop, uint32_t index, const struct virtio_memory *memory,
		    const struct virtqueue_setup *setup);

/* Starts the thread; its name is cut to 15 bytes. 0 or an errno. */
int virtio_loop_start(struct virtio_loop *loop, const char *name);

/* Drains and ends the thread. Harmless twice. */
void virtio_loop_stop(struct virtio_loop *loop);

/* Where a queue has come to, after the stop. */
uint32_t virtio_loop_base(const struct virtio_loop *loop, uint32_t index);

/* Stops it too; frees neither the device nor the memory. */
void virtio_loop_free(struct virtio_loop *loop);

/* ---- for any thread, while the loop is there ---- */

/* Why the device cannot go on; NULL: it can. */
const char *virtio_loop_failure(const struct virtio_loop *loop);

/* Calls the device's nudged() in the loop's thread soon. */
void virtio_loop_nudge(struct virtio_loop *loop);

/* not for cffi { */
/* ---- for the device, in the loop's thread ---- */

#define VIRTIO_KEPT	(-1)	/* the device puts the chain later */
#define VIRTIO_NOT_NOW	(-2)	/* give it back; the device calls virtio_loop_again() */

/* Bytes written, or one of the above. */
typedef int64_t virtio_answer(struct virtio_device *device, struct virtio_loop *loop,
			      uint32_t index, struct virtio_chain *chain);

/*
 * Takes what is available and puts what answer() has answered; a broken queue fails the device.
 * When answer() serves another queue, its own chain's iovecs are overwritten.
 */
void virtio_loop_serve(struct virtio_loop *loop, uint32_t index, virtio_answer *answer);

/* Calls kicked() again soon, as if the driver had kicked; harmless if the queue is not there. */
void virtio_loop_again(struct virtio_loop *loop, uint32_t index);

/* NULL: the driver has not enabled it. */
struct virtqueue *virtio_loop_queue(struct virtio_loop *loop, uint32_t index);

/* Watches a descriptor with these events of epoll, level-triggered; 0: no more. 0 or an errno:
 * EPERM for a regular file, which is always ready. */
int virtio_loop_watch(struct virtio_loop *loop, int fd, uint32_t events);

/* The device cannot go on: the first reason, a string that stays, is told, and the loop drains. */
void virtio_loop_fail(struct virtio_loop *loop, const char *reason);

/* Wakes who waits for the events eventfd: the device has something to tell. */
void virtio_loop_tell(struct virtio_loop *loop);
/* } */

#endif
