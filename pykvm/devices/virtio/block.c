#include "block_request.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define F_FLUSH	(1u << 9)
#define NO_WRITE	UINT64_MAX

struct block {
	struct virtio_device device;
	struct block_disk disk;
	struct virtio_loop *loop;
	uint64_t number;		/* of the next request */
	struct block_counters counters;	/* written by the loop, read by anyone */

	pthread_mutex_t lock;		/* for what follows */
	pthread_cond_t work;		/* something is queued, or the pool ends */
	pthread_cond_t written;		/* a write is done */
	struct block_request *first, **last;	/* queued */
	struct block_request *done, **last_done;
	uint32_t most, threads, idle, queued;
	bool ending;
	pthread_t thread[BLOCK_MOST_THREADS];
	uint64_t writing[BLOCK_MOST_THREADS];	/* number of the request, or NO_WRITE */
};

struct worker {
	struct block *block;
	uint32_t number;
};

static void count(uint64_t *counter, uint64_t more)
{
	__atomic_store_n(counter, *counter + more, __ATOMIC_RELAXED);
}

/* -------------------------------------------------------------------- pool */

/* Queued requests leave in order, so all writes before this one are done or being done. */
static bool is_behind_writes(const struct block *block, const struct block_request *request)
{
	for (uint32_t i = 0; i < block->threads; i++) {
		if (block->writing[i] < request->number)
			return true;
	}
	return false;
}

static void work_on(struct block *block, uint32_t me, struct block_request *request)
{
	bool first;

	if (block_changes(request))
		block->writing[me] = request->number;
	while (request->type == BLOCK_FLUSH && is_behind_writes(block, request))
		pthread_cond_wait(&block->written, &block->lock);
	pthread_mutex_unlock(&block->lock);
	block_perform(request, &block->disk);
	pthread_mutex_lock(&block->lock);
	if (block->writing[me] != NO_WRITE) {
		block->writing[me] = NO_WRITE;
		pthread_cond_broadcast(&block->written);
	}
	first = !block->done;
	request->next = NULL;
	*block->last_done = request;
	block->last_done = &request->next;
	if (first)
		virtio_loop_nudge(block->loop);
}

static void *run(void *argument)
{
	struct worker worker = *(struct worker *)argument;
	struct block *block = worker.block;

	free(argument);
	pthread_mutex_lock(&block->lock);
	for (;;) {
		struct block_request *request = block->first;

		if (request) {
			block->first = request->next;
			block->queued--;
			if (!block->first)
				block->last = &block->first;
			work_on(block, worker.number, request);
		} else if (block->ending) {
			break;
		} else {
			block->idle++;
			pthread_cond_wait(&block->work, &block->lock);
			block->idle--;
		}
	}
	pthread_mutex_unlock(&block->lock);
	return NULL;
}

/* With the lock. Signals are blocked, as in the loop's thread, which makes it. */
static bool add_thread(struct block *block)
{
	struct worker *worker = malloc(sizeof(*worker));

	if (!worker)
		return false;
	*worker = (struct worker){ .block = block, .number = block->threads };
	block->writing[block->threads] = NO_WRITE;
	if (pthread_create(&block->thread[block->threads], NULL, run, worker)) {
		free(worker);
		return false;
	}
	block->threads++;
	return true;
}

/* Returns false if there is nobody who would do it. */
static bool enqueue(struct block *block, struct block_request *request)
{
	bool taken = true;

	pthread_mutex_lock(&block->lock);
	if (block->queued >= block->idle && block->threads < block->most)
		taken = add_thread(block) || block->threads;
	if (taken) {
		request->next = NULL;
		*block->last = request;
		block->last = &request->next;
		block->queued++;
		pthread_cond_signal(&block->work);
	}
	pthread_mutex_unlock(&block->lock);
	return taken;
}

/* -------------------------------------------------------------------- loop */

static uint64_t finish(struct block *block, struct block_request *request)
{
	struct block_counters *counters = &block->counters;
	uint64_t written = block_answer(request);

	if (request->status != BLOCK_OK) {
		count(&counters->errors, 1);
		if (__atomic_load_n(&block->disk.last_error, __ATOMIC_ACQUIRE))
			virtio_loop_tell(block->loop);
	} else if (request->type == BLOCK_IN) {
		count(&counters->reads, 1);
		count(&counters->bytes_read, request->size);
	} else if (request->type == BLOCK_OUT) {
		count(&counters->writes, 1);
		count(&counters->bytes_written, request->size);
	} else if (request->type == BLOCK_FLUSH) {
		count(&counters->flushes, 1);
	} else if (block_changes(request)) {
		count(&counters->discards, 1);
	}
	return written;
}

static int64_t answer(struct virtio_device *device, struct virtio_loop *loop, uint32_t index,
		      struct virtio_chain *chain)
{
	struct block *block = (struct block *)device;
	struct block_request *request = block_request_new(chain);
	uint64_t written;

	if (!request) {
		virtio_loop_fail(loop, "no memory for a request");
		return 0;
	}
	request->queue = index;
	request->number = block->number++;
	if (block_parse(request, &block->disk) && !block_try(request, &block->disk)) {
		if (enqueue(block, request))
			return VIRTIO_KEPT;
		block_perform(request, &block->disk);	/* the host has no thread for it */
	}
	written = finish(block, request);
	free(request);
	return (int64_t)written;
}

static void put_done(struct block *block)
{
	struct block_request *done, *next;

	pthread_mutex_lock(&block->lock);
	done = block->done;
	block->done = NULL;
	block->last_done = &block->done;
	pthread_mutex_unlock(&block->lock);
	for (; done; done = next) {
		struct virtqueue *queue = virtio_loop_queue(block->loop, done->queue);

		next = done->next;
		count(&block->counters.waited, 1);
		virtqueue_put(queue, &done->chain, finish(block, done));
		/* One by one: a flush of the queue is cheap, and the driver does not wait. */
		virtqueue_flush(queue);
		free(done);
	}
}

static void begin(struct virtio_device *device, struct virtio_loop *loop)
{
	struct block *block = (struct block *)device;

	block->loop = loop;
	block->disk.write_through = !(device->features & F_FLUSH);
	block->disk.no_wait[0] = block->disk.no_wait[1] = true;
}

static void kicked(struct virtio_device *device, struct virtio_loop *loop, uint32_t index)
{
	(void)device;
	virtio_loop_serve(loop, index, answer);
}

static void nudged(struct virtio_device *device, struct virtio_loop *loop)
{
	(void)loop;
	put_done((struct block *)device);
}

static void drain(struct virtio_device *device, struct virtio_loop *loop)
{
	struct block *block = (struct block *)device;

	(void)loop;
	pthread_mutex_lock(&block->lock);
	block->ending = true;
	pthread_cond_broadcast(&block->work);
	pthread_mutex_unlock(&block->lock);
	for (uint32_t i = 0; i < block->threads; i++)
		pthread_join(block->thread[i], NULL);
	block->threads = 0;
	block->ending = false;
	put_done(block);
}

/* -------------------------------------------------------------- for Python */

struct virtio_device *block_new(int file, uint64_t bytes, bool read_only, const char *id,
				uint32_t threads)
{
	struct block *block = calloc(1, sizeof(*block));

	if (!block)
		return NULL;
	block->device.begin = begin;
	block->device.kicked = kicked;
	block->device.nudged = nudged;
	block->device.drain = drain;
	block->disk.file = file;
	block->disk.bytes = bytes;
	block->disk.read_only = read_only;
	memcpy(block->disk.id, id, BLOCK_ID_BYTES);
	block->most = threads < BLOCK_MOST_THREADS ? threads : BLOCK_MOST_THREADS;
	block->last = &block->first;
	block->last_done = &block->done;
	pthread_mutex_init(&block->lock, NULL);
	pthread_cond_init(&block->work, NULL);
	pthread_cond_init(&block->written, NULL);
	return &block->device;
}

void block_free(struct virtio_device *device)
{
	free(device);	/* its lock and conditions own no memory */
}

void block_count(const struct virtio_device *device, struct block_counters *counters)
{
	const uint64_t *from = (const uint64_t *)&((const struct block *)device)->counters;
	uint64_t *to = (uint64_t *)counters;

	for (size_t i = 0; i < sizeof(*counters) / sizeof(*to); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}

int block_take_error(struct virtio_device *device)
{
	return __atomic_exchange_n(&((struct block *)device)->disk.last_error, 0,
				   __ATOMIC_ACQ_REL);
}
