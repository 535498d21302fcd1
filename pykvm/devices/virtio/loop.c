#define _GNU_SOURCE	/* pthread_setname_np() */
#include "loop.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define BUDGET	256	/* chains of a queue before the others have their turn */
#define EVENTS	32

/* What an event of epoll belongs to: in the upper half of its data; the lower has the number. */
enum { WAKE, QUEUE, OWN };

struct entry {
	struct virtqueue queue;
	bool present;
	bool again;
};

struct virtio_loop {
	struct virtio_device *device;
	uint32_t count;
	int epoll;
	int wake;		/* eventfd */
	int events;
	int stopping;		/* atomic, like the next two */
	int nudged;
	const char *failure;
	bool running;
	pthread_t thread;
	struct iovec iov[VIRTIO_CHAIN_IOVECS];
	struct entry entries[];
};

static void write_eventfd(int fd)
{
	const uint64_t one = 1;

	while (fd >= 0 && write(fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

static void clear_eventfd(int fd)
{
	uint64_t count;

	while (read(fd, &count, sizeof(count)) < 0 && errno == EINTR)
		;
}

static int control(struct virtio_loop *loop, int operation, int fd, uint32_t events, uint64_t data)
{
	struct epoll_event event = { .events = events, .data.u64 = data };

	return epoll_ctl(loop->epoll, operation, fd, &event) ? errno : 0;
}

struct virtio_loop *virtio_loop_new(struct virtio_device *device, uint32_t queues, int events)
{
	struct virtio_loop *loop = calloc(1, sizeof(*loop) + queues * sizeof(loop->entries[0]));

	if (!loop)
		return NULL;
	loop->device = device;
	loop->count = queues;
	loop->events = events;
	loop->epoll = epoll_create1(EPOLL_CLOEXEC);
	loop->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (loop->epoll >= 0 && loop->wake >= 0 &&
	    !control(loop, EPOLL_CTL_ADD, loop->wake, EPOLLIN, (uint64_t)WAKE << 32))
		return loop;
	virtio_loop_free(loop);
	return NULL;
}

int virtio_loop_add(struct virtio_loop *loop, uint32_t index, const struct virtio_memory *memory,
		    const struct virtqueue_setup *setup)
{
	struct entry *entry = &loop->entries[index];
	struct virtqueue_setup own = *setup;
	int fault;

	own.most_bytes = loop->device->most_bytes;
	own.features = loop->device->features;
	fault = virtqueue_init(&entry->queue, memory, &own);
	entry->present = entry->again = !fault;
	return fault;
}

struct virtqueue *virtio_loop_queue(struct virtio_loop *loop, uint32_t index)
{
	return index < loop->count && loop->entries[index].present ? &loop->entries[index].queue
								   : NULL;
}

void virtio_loop_again(struct virtio_loop *loop, uint32_t index)
{
	if (virtio_loop_queue(loop, index))
		loop->entries[index].again = true;
}

int virtio_loop_watch(struct virtio_loop *loop, int fd, uint32_t events)
{
	uint64_t data = (uint64_t)OWN << 32 | (uint32_t)fd;
	int error;

	if (!events) {
		error = control(loop, EPOLL_CTL_DEL, fd, 0, 0);
		return error == ENOENT ? 0 : error;
	}
	error = control(loop, EPOLL_CTL_MOD, fd, events, data);
	return error == ENOENT ? control(loop, EPOLL_CTL_ADD, fd, events, data) : error;
}

void virtio_loop_tell(struct virtio_loop *loop)
{
	write_eventfd(loop->events);
}

void virtio_loop_fail(struct virtio_loop *loop, const char *reason)
{
	const char *none = NULL;

	if (__atomic_compare_exchange_n(&loop->failure, &none, reason, false, __ATOMIC_ACQ_REL,
					__ATOMIC_ACQUIRE))
		virtio_loop_tell(loop);
}

const char *virtio_loop_failure(const struct virtio_loop *loop)
{
	return __atomic_load_n(&loop->failure, __ATOMIC_ACQUIRE);
}

void virtio_loop_nudge(struct virtio_loop *loop)
{
	/* One write suffices for all that come before the loop looks. */
	if (!__atomic_exchange_n(&loop->nudged, 1, __ATOMIC_ACQ_REL))
		write_eventfd(loop->wake);
}

void virtio_loop_serve(struct virtio_loop *loop, uint32_t index, virtio_answer *answer)
{
	struct virtqueue *queue = virtio_loop_queue(loop, index);
	struct virtio_chain chain = { .iov = loop->iov, .room = VIRTIO_CHAIN_IOVECS };
	unsigned int done = 0;
	int taken;

	if (!queue)
		return;
	do {
		virtqueue_disable_kicks(queue);
		while ((taken = virtqueue_take(queue, &chain)) > 0) {
			int64_t written = answer(loop->device, loop, index, &chain);

			if (written >= 0)
				virtqueue_put(queue, &chain, (uint64_t)written);
			if (written == VIRTIO_NOT_NOW) {
				virtqueue_untake(queue, &chain);
				virtqueue_flush(queue);
				return;
			}
			if (++done == BUDGET) {
				virtqueue_flush(queue);
				virtio_loop_again(loop, index);
				return;
			}
		}
		virtqueue_flush(queue);
	} while (taken == 0 && virtqueue_enable_kicks(queue));
	if (taken < 0)
		virtio_loop_fail(loop, virtqueue_reason(queue->broken));
}

/* ------------------------------------------------------------------ thread */

static bool goes_on(const struct virtio_loop *loop)
{
	return !__atomic_load_n(&loop->stopping, __ATOMIC_ACQUIRE) && !virtio_loop_failure(loop);
}

/* Serves the queues that have something; returns whether one wants to be served again. */
static bool serve(struct virtio_loop *loop)
{
	bool more = false;

	for (uint32_t index = 0; index < loop->count && goes_on(loop); index++) {
		struct entry *entry = &loop->entries[index];

		if (!entry->again)
			continue;
		entry->again = false;
		loop->device->kicked(loop->device, loop, index);
	}
	for (uint32_t index = 0; index < loop->count; index++)
		more |= loop->entries[index].again;
	return more;
}

static void handle(struct virtio_loop *loop, const struct epoll_event *event)
{
	struct virtio_device *device = loop->device;
	uint32_t number = (uint32_t)event->data.u64;

	switch (event->data.u64 >> 32) {
	case WAKE:
		clear_eventfd(loop->wake);
		if (__atomic_exchange_n(&loop->nudged, 0, __ATOMIC_ACQ_REL) && device->nudged)
			device->nudged(device, loop);
		break;
	case QUEUE:
		clear_eventfd(loop->entries[number].queue.kick);
		loop->entries[number].again = true;
		break;
	default:
		device->ready(device, loop, (int)number, event->events);
	}
}

static void *run(void *argument)
{
	struct virtio_loop *loop = argument;
	struct virtio_device *device = loop->device;
	struct epoll_event events[EVENTS];
	struct pollfd stop = { .fd = loop->wake, .events = POLLIN };

	if (device->begin)
		device->begin(device, loop);
	while (goes_on(loop)) {
		bool more = serve(loop);
		int n = epoll_wait(loop->epoll, events, EVENTS, more ? 0 : -1);

		for (int i = 0; i < n && goes_on(loop); i++)
			handle(loop, &events[i]);
	}
	if (device->drain)
		device->drain(device, loop);
	for (uint32_t index = 0; index < loop->count; index++) {
		if (loop->entries[index].present)
			virtqueue_flush(&loop->entries[index].queue);
	}
	while (!__atomic_load_n(&loop->stopping, __ATOMIC_ACQUIRE)) {
		poll(&stop, 1, -1);	/* failed: whoever was told will stop it */
		clear_eventfd(loop->wake);
	}
	return NULL;
}

int virtio_loop_start(struct virtio_loop *loop, const char *name)
{
	char short_name[16] = { 0 };
	sigset_t all, before;
	int error = 0;

	for (uint32_t index = 0; index < loop->count && !error; index++) {
		struct entry *entry = &loop->entries[index];

		if (entry->present && entry->queue.kick >= 0)
			error = control(loop, EPOLL_CTL_ADD, entry->queue.kick, EPOLLIN,
					(uint64_t)QUEUE << 32 | index);
	}
	if (error)
		return error;
	sigfillset(&all);
	sigdelset(&all, SIGRTMAX);	/* pykvm.sandbox interrupts all threads by it */
	pthread_sigmask(SIG_BLOCK, &all, &before);	/* signals are for Python's threads */
	error = pthread_create(&loop->thread, NULL, run, loop);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (error)
		return error;
	loop->running = true;
	strncpy(short_name, name, sizeof(short_name) - 1);
	pthread_setname_np(loop->thread, short_name);
	return 0;
}

void virtio_loop_stop(struct virtio_loop *loop)
{
	if (!loop->running)
		return;
	__atomic_store_n(&loop->stopping, 1, __ATOMIC_RELEASE);
	write_eventfd(loop->wake);
	pthread_join(loop->thread, NULL);
	loop->running = false;
}

uint32_t virtio_loop_base(const struct virtio_loop *loop, uint32_t index)
{
	return virtqueue_base(&loop->entries[index].queue);
}

void virtio_loop_free(struct virtio_loop *loop)
{
	if (!loop)
		return;
	virtio_loop_stop(loop);
	if (loop->epoll >= 0)
		close(loop->epoll);
	if (loop->wake >= 0)
		close(loop->wake);
	free(loop);
}
