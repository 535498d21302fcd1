#include "net_receive.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

enum { RECEIVE, TRANSMIT };	/* queues (5.1.2) */

#define F_MRG_RXBUF	(1ULL << 15)

#define FRAMES		64	/* at once, before the other queue has its turn */
#define NO_EVENT	EPOLLPRI	/* none that comes, but errors are told with it */

struct net {
	struct virtio_device device;
	int fd;
	bool stream;
	bool hungry;		/* the driver has buffers for what comes */
	bool blocked;		/* the other side takes nothing now */
	uint32_t watched;	/* events */
	const char *lost;	/* atomic */
	size_t out_at, out_end;	/* stream: the rest of a frame that was sent in part */
	struct net_counters counters;
	struct net_receiver receiver;
	uint8_t out[NET_LENGTH + NET_STREAM_MOST];
};

static void watch(struct net *net, struct virtio_loop *loop)
{
	uint32_t events = (net->hungry ? EPOLLIN : 0) | (net->blocked ? EPOLLOUT : 0);

	if (!events)
		events = NO_EVENT;
	if (net->lost || events == net->watched)
		return;
	net->watched = events;
	if (virtio_loop_watch(loop, net->fd, events))
		virtio_loop_fail(loop, "the host cannot wait for frames");
}

/* The guest sees a cable without a link, and what it sends is dropped. */
static void lose(struct net *net, struct virtio_loop *loop, const char *reason)
{
	if (net->lost)
		return;
	__atomic_store_n(&net->lost, reason, __ATOMIC_RELEASE);
	net->blocked = net->hungry = false;
	virtio_loop_watch(loop, net->fd, 0);
	virtio_loop_again(loop, TRANSMIT);
	virtio_loop_tell(loop);
}

static const char *gone(const struct net *net)
{
	return net->stream ? "the other side has closed the connection" : "the TAP is gone";
}

/* --------------------------------------------------------------- transmit */

static int64_t sent(struct net *net, uint64_t size)
{
	net_count(&net->counters.sent, 1);
	net_count(&net->counters.sent_bytes, size);
	return 0;
}

static int64_t drop(struct net *net)
{
	net_count(&net->counters.sent_dropped, 1);
	return 0;
}

/* Whether a write that has failed is to be tried again, and else what becomes of the frame. */
static int64_t refused(struct net *net, struct virtio_loop *loop)
{
	if (errno == EAGAIN) {
		net->blocked = true;
		watch(net, loop);
		return VIRTIO_NOT_NOW;
	}
	/* Of a TAP EINVAL is a header that makes no sense, EIO an interface that is switched off. */
	if (net->stream || errno == EBADFD || errno == EBADF || errno == ENODEV)
		lose(net, loop, gone(net));
	return drop(net);
}

/* Sends what is left of a frame; the driver has its buffers back already. */
static void send_rest(struct net *net, struct virtio_loop *loop)
{
	while (net->out_at < net->out_end) {
		ssize_t n = send(net->fd, net->out + net->out_at, net->out_end - net->out_at,
				 MSG_DONTWAIT | MSG_NOSIGNAL);

		if (n >= 0) {
			net->out_at += (size_t)n;
		} else if (errno == EAGAIN) {
			net->blocked = true;
			return;
		} else if (errno != EINTR) {
			lose(net, loop, gone(net));
			return;
		}
	}
}

static int64_t send_to_stream(struct net *net, struct virtio_loop *loop,
			      const struct virtio_chain *chain, uint32_t size)
{
	uint32_t length = htobe32(size);
	struct iovec iov[VIRTIO_CHAIN_IOVECS];
	struct msghdr message = { .msg_iov = iov };
	size_t whole = NET_LENGTH + size;
	ssize_t n;
	int count;

	iov[0].iov_base = &length;
	iov[0].iov_len = sizeof(length);
	count = virtio_chain_slice(chain, false, NET_HEADER, size, iov + 1, VIRTIO_CHAIN_IOVECS - 1);
	if (count < 0)
		return drop(net);
	message.msg_iovlen = 1 + (size_t)count;
	do {
		n = sendmsg(net->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
	} while (n < 0 && errno == EINTR);
	if (n < 0)
		return refused(net, loop);
	if ((size_t)n < whole) {
		memcpy(net->out, &length, sizeof(length));
		virtio_chain_read(chain, NET_HEADER, net->out + NET_LENGTH, size);
		net->out_at = (size_t)n;
		net->out_end = whole;
		net->blocked = true;
		watch(net, loop);
	}
	return sent(net, size);
}

static int64_t transmit(struct virtio_device *device, struct virtio_loop *loop, uint32_t index,
			struct virtio_chain *chain)
{
	struct net *net = (struct net *)device;
	uint64_t most = net->stream ? NET_STREAM_MOST : NET_TAP_MOST, size;
	ssize_t n;

	(void)index;
	if (net->blocked)
		return VIRTIO_NOT_NOW;
	if (net->lost || chain->readable < NET_HEADER + NET_ETHERNET ||
	    chain->readable > NET_HEADER + most)
		return drop(net);
	size = chain->readable - NET_HEADER;
	if (net->stream)
		return send_to_stream(net, loop, chain, (uint32_t)size);
	/* The guest's header goes to the kernel as it is: it copies it once and checks it. */
	do {
		n = writev(net->fd, chain->iov, (int)chain->reads);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? refused(net, loop) : sent(net, size);
}

/* ---------------------------------------------------------------- receive */

static void receive(struct net *net, struct virtio_loop *loop)
{
	struct virtqueue *queue = net->receiver.queue;
	enum net_outcome outcome = NET_MORE;

	if (!queue || net->lost)
		return;
	virtqueue_disable_kicks(queue);
	for (unsigned int n = 0; n < FRAMES && outcome == NET_MORE; n++) {
		outcome = net_receive(&net->receiver);
		if (outcome != NET_STARVED)
			continue;
		virtqueue_flush(queue);
		if (!virtqueue_enable_kicks(queue))
			continue;
		virtqueue_disable_kicks(queue);
		outcome = NET_MORE;
	}
	virtqueue_flush(queue);
	if (outcome == NET_STARVED)
		outcome = net_receive_ahead(&net->receiver);
	net->hungry = outcome != NET_STARVED;
	if (outcome == NET_MORE)
		virtio_loop_again(loop, RECEIVE);
	else if (outcome == NET_GONE)
		lose(net, loop, gone(net));
	else if (outcome == NET_BROKEN)
		virtio_loop_fail(loop, virtqueue_reason(queue->broken));
	watch(net, loop);
}

/* ----------------------------------------------------------------- device */

static void begin(struct virtio_device *device, struct virtio_loop *loop)
{
	struct net *net = (struct net *)device;

	net->watched = 0;
	net->hungry = false;
	net->blocked = net->out_at < net->out_end;
	net_receiver_begin(&net->receiver, virtio_loop_queue(loop, RECEIVE),
			   device->features & F_MRG_RXBUF);
	watch(net, loop);
}

static void kicked(struct virtio_device *device, struct virtio_loop *loop, uint32_t index)
{
	if (index == RECEIVE)
		receive((struct net *)device, loop);
	else
		virtio_loop_serve(loop, index, transmit);
}

static void ready(struct virtio_device *device, struct virtio_loop *loop, int fd, uint32_t events)
{
	struct net *net = (struct net *)device;

	(void)fd;
	if (events & (EPOLLERR | EPOLLHUP)) {
		lose(net, loop, gone(net));
		return;
	}
	if (events & EPOLLOUT) {
		net->blocked = false;
		send_rest(net, loop);
		if (!net->blocked)
			virtio_loop_again(loop, TRANSMIT);
	}
	if (events & EPOLLIN)
		receive(net, loop);
	watch(net, loop);
}

static void drain(struct virtio_device *device, struct virtio_loop *loop)
{
	(void)loop;
	net_receiver_drain(&((struct net *)device)->receiver);
}

struct virtio_device *net_new(int fd, bool stream)
{
	struct net *net = calloc(1, sizeof(*net));

	if (!net)
		return NULL;
	net->device.begin = begin;
	net->device.kicked = kicked;
	net->device.ready = ready;
	net->device.drain = drain;
	net->fd = fd;
	net->stream = stream;
	if (!net_receiver_init(&net->receiver, fd, stream, &net->counters))
		return &net->device;
	free(net);
	return NULL;
}

void net_free(struct virtio_device *device)
{
	struct net *net = (struct net *)device;

	free(net->receiver.buffer);
	free(net);
}

const char *net_lost(const struct virtio_device *device)
{
	return __atomic_load_n(&((const struct net *)device)->lost, __ATOMIC_ACQUIRE);
}

void net_read_counters(const struct virtio_device *device, struct net_counters *out)
{
	const struct net_counters *from = &((const struct net *)device)->counters;

	out->received = __atomic_load_n(&from->received, __ATOMIC_RELAXED);
	out->received_bytes = __atomic_load_n(&from->received_bytes, __ATOMIC_RELAXED);
	out->received_dropped = __atomic_load_n(&from->received_dropped, __ATOMIC_RELAXED);
	out->sent = __atomic_load_n(&from->sent, __ATOMIC_RELAXED);
	out->sent_bytes = __atomic_load_n(&from->sent_bytes, __ATOMIC_RELAXED);
	out->sent_dropped = __atomic_load_n(&from->sent_dropped, __ATOMIC_RELAXED);
}
