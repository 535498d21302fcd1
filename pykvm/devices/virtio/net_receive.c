#include "net_receive.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define NUM_BUFFERS	10	/* offset in the header */
#define SMALL		2048	/* bytes to hold at least */
#define MOST		(NET_HEADER + NET_TAP_MOST)
#define CALM		1024	/* small frames, after which no large ones are expected */
#define BUDGET		256	/* chains without room for anything, before the loop goes on */

int net_receiver_init(struct net_receiver *receiver, int fd, bool stream,
		      struct net_counters *counters)
{
	receiver->fd = fd;
	receiver->stream = stream;
	receiver->counters = counters;
	receiver->size = stream ? NET_STREAM_BUFFER : NET_TAP_BUFFER;
	receiver->buffer = malloc(receiver->size);
	return receiver->buffer ? 0 : ENOMEM;
}

void net_receiver_begin(struct net_receiver *receiver, struct virtqueue *queue, bool mergeable)
{
	receiver->queue = queue;
	receiver->mergeable = mergeable;
	receiver->window = SMALL;
	receiver->quiet = 0;
}

void net_receiver_drain(struct net_receiver *receiver)
{
	while (receiver->count)
		virtqueue_untake(receiver->queue, &receiver->held[--receiver->count]);
	receiver->iovecs = 0;
	receiver->bytes = 0;
	if (receiver->total)
		net_count(&receiver->counters->received_dropped, 1);
	receiver->total = 0;
}

/* ------------------------------------------------------------ held chains */

static bool is_full(const struct net_receiver *receiver)
{
	return receiver->count == (receiver->mergeable ? NET_HELD : 1) ||
	       receiver->iovecs > NET_IOVECS - VIRTIO_CHAIN_IOVECS;
}

/* Takes chains until so many bytes are held, as far as there are any; false: a broken queue. */
static bool fill(struct net_receiver *receiver, uint64_t bytes)
{
	for (unsigned int taken = 0; taken < BUDGET; taken++) {
		struct virtio_chain *chain = &receiver->held[receiver->count];
		int result;

		if (receiver->bytes >= bytes || is_full(receiver))
			return true;
		chain->iov = receiver->iov + receiver->iovecs;
		chain->room = VIRTIO_CHAIN_IOVECS;
		result = virtqueue_take(receiver->queue, chain);
		if (result <= 0)
			return result == 0;
		if (chain->reads || !chain->writable) {
			virtqueue_put(receiver->queue, chain, 0);
			continue;
		}
		receiver->count++;
		receiver->iovecs += chain->writes;
		receiver->bytes += chain->writable;
	}
	return true;
}

/* Whether the driver cannot give more than is held, however long one waits. */
static bool is_exhausted(const struct net_receiver *receiver)
{
	uint32_t slots = 0;

	for (uint32_t i = 0; i < receiver->count; i++)
		slots += receiver->held[i].slots;
	return is_full(receiver) || slots == receiver->queue->size;
}

static void scatter(struct net_receiver *receiver, uint64_t offset, const void *from, size_t size)
{
	const uint8_t *data = from;

	for (uint32_t i = 0; i < receiver->count && size; i++) {
		struct virtio_chain *chain = &receiver->held[i];
		size_t part;

		if (offset >= chain->writable) {
			offset -= chain->writable;
			continue;
		}
		part = virtio_chain_write(chain, offset, data, size);
		data += part;
		size -= part;
		offset = 0;
	}
}

/* Forgets the first chains, which are put. */
static void release(struct net_receiver *receiver, uint32_t count)
{
	uint32_t iovecs = 0;

	for (uint32_t i = 0; i < count; i++) {
		iovecs += receiver->held[i].writes;
		receiver->bytes -= receiver->held[i].writable;
	}
	receiver->count -= count;
	receiver->iovecs -= iovecs;
	memmove(receiver->held, receiver->held + count, receiver->count * sizeof(*receiver->held));
	memmove(receiver->iov, receiver->iov + iovecs, receiver->iovecs * sizeof(*receiver->iov));
	for (uint32_t i = 0; i < receiver->count; i++)
		receiver->held[i].iov -= iovecs;
}

/* Gives the driver the frame that the first chains hold; size: with its header. */
static void deliver(struct net_receiver *receiver, uint64_t size)
{
	uint64_t left = size;
	uint16_t count = 0, little;

	while (left) {
		uint64_t there = receiver->held[count++].writable;

		left -= left < there ? left : there;
	}
	little = htole16(count);
	scatter(receiver, NUM_BUFFERS, &little, sizeof(little));
	left = size;
	for (uint16_t i = 0; i < count; i++) {
		const struct virtio_chain *chain = &receiver->held[i];
		uint64_t part = left < chain->writable ? left : chain->writable;

		virtqueue_put(receiver->queue, chain, part);
		left -= part;
	}
	release(receiver, count);
	net_count(&receiver->counters->received, 1);
	net_count(&receiver->counters->received_bytes, size - NET_HEADER);
	if (size > SMALL)
		receiver->quiet = 0;
	else if (++receiver->quiet == CALM)
		receiver->window = SMALL;
}

static enum net_outcome drop(struct net_receiver *receiver)
{
	net_count(&receiver->counters->received_dropped, 1);
	return NET_MORE;
}

/* ------------------------------------------------------------------- TAPs */

/* Puts the rest of a frame, which is in the buffer, into further chains. */
static enum net_outcome complete(struct net_receiver *receiver)
{
	uint64_t total = receiver->total;

	if (!fill(receiver, total))
		return NET_BROKEN;
	if (receiver->bytes < total && !is_exhausted(receiver))
		return NET_STARVED;
	receiver->total = 0;
	if (receiver->bytes < total)
		return drop(receiver);
	scatter(receiver, receiver->at, receiver->buffer, total - receiver->at);
	deliver(receiver, total);
	return NET_MORE;
}

static enum net_outcome receive_from_tap(struct net_receiver *receiver)
{
	uint32_t count;
	uint64_t in_place = 0;
	struct iovec kept;
	ssize_t n;

	if (receiver->total)
		return complete(receiver);
	if (!fill(receiver, receiver->window))
		return NET_BROKEN;
	if (!receiver->count)
		return NET_STARVED;
	count = receiver->iovecs < VIRTIO_CHAIN_IOVECS ? receiver->iovecs : VIRTIO_CHAIN_IOVECS - 1;
	for (uint32_t i = 0; i < count; i++)
		in_place += receiver->iov[i].iov_len;
	kept = receiver->iov[count];
	receiver->iov[count].iov_base = receiver->buffer;
	receiver->iov[count].iov_len = receiver->size;
	n = readv(receiver->fd, receiver->iov, (int)count + 1);
	receiver->iov[count] = kept;
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return errno == EAGAIN ? NET_EMPTY : NET_MORE;
	if (n < 0 && errno != EFAULT && errno != ENOMEM)
		return NET_GONE;	/* EBADFD, EIO: there is no interface any more */
	if (n < NET_HEADER + NET_ETHERNET || n > MOST)
		return drop(receiver);
	if ((uint64_t)n <= in_place) {
		deliver(receiver, (uint64_t)n);
		return NET_MORE;
	}
	if (!receiver->mergeable)
		return drop(receiver);
	receiver->window = MOST;
	receiver->at = in_place;
	receiver->total = (uint64_t)n;
	return complete(receiver);
}

/* ---------------------------------------------------------------- streams */

static enum net_outcome read_stream(struct net_receiver *receiver)
{
	ssize_t n;

	if (receiver->size - receiver->end < NET_LENGTH + NET_STREAM_MOST) {
		receiver->end -= receiver->at;
		memmove(receiver->buffer, receiver->buffer + receiver->at, receiver->end);
		receiver->at = 0;
	}
	n = recv(receiver->fd, receiver->buffer + receiver->end, receiver->size - receiver->end,
		 MSG_DONTWAIT);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return errno == EAGAIN ? NET_EMPTY : NET_MORE;
	if (n <= 0)
		return NET_GONE;
	receiver->end += (uint64_t)n;
	return NET_MORE;
}

static enum net_outcome receive_from_stream(struct net_receiver *receiver)
{
	static const uint8_t header[NET_HEADER];
	const uint8_t *from = receiver->buffer + receiver->at;
	uint64_t there = receiver->end - receiver->at, total;
	uint32_t size;

	if (there < NET_LENGTH)
		return read_stream(receiver);
	memcpy(&size, from, sizeof(size));
	size = be32toh(size);
	if (size > NET_STREAM_MOST)
		return NET_GONE;	/* no stream of frames */
	if (there < NET_LENGTH + size)
		return read_stream(receiver);
	total = NET_HEADER + size;
	if (!fill(receiver, total))
		return NET_BROKEN;
	if (receiver->bytes < total && (!receiver->count || !is_exhausted(receiver)))
		return NET_STARVED;
	receiver->at += NET_LENGTH + size;
	if (receiver->bytes < total || size < NET_ETHERNET)
		return drop(receiver);
	scatter(receiver, 0, header, sizeof(header));
	scatter(receiver, NET_HEADER, from + NET_LENGTH, size);
	deliver(receiver, total);
	return NET_MORE;
}

enum net_outcome net_receive_ahead(struct net_receiver *receiver)
{
	enum net_outcome outcome = NET_MORE;

	if (!receiver->stream)
		return NET_STARVED;
	/* All of the buffer may be frames that wait: then there is nothing to move. */
	while (outcome == NET_MORE && receiver->end - receiver->at < receiver->size)
		outcome = read_stream(receiver);
	return outcome == NET_MORE ? NET_STARVED : outcome;
}

enum net_outcome net_receive(struct net_receiver *receiver)
{
	return receiver->stream ? receive_from_stream(receiver) : receive_from_tap(receiver);
}
