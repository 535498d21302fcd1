#define _GNU_SOURCE	/* preadv2(), fallocate() */
#include "block_request.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define ZEROS	65536

struct block_request *block_request_new(const struct virtio_chain *chain)
{
	uint32_t count = chain->reads + chain->writes;
	struct block_request *request =
		malloc(sizeof(*request) + 2 * (size_t)count * sizeof(request->iov[0]));

	if (!request)
		return NULL;
	memset(request, 0, sizeof(*request));
	request->chain = *chain;
	memcpy(request->iov, chain->iov, count * sizeof(request->iov[0]));
	request->chain.iov = request->iov;
	request->data = request->iov + count;
	return request;
}

/* ------------------------------------------------------------------- check */

static bool is_on_disk(const struct block_disk *disk, uint64_t sector, uint64_t bytes)
{
	uint64_t sectors = disk->bytes / BLOCK_SECTOR;

	return bytes % BLOCK_SECTOR == 0 && sector <= sectors &&
	       bytes / BLOCK_SECTOR <= sectors - sector;
}

static uint8_t parse_ranges(struct block_request *request, const struct block_disk *disk)
{
	uint64_t size = request->size;
	uint32_t allowed = request->type == BLOCK_WRITE_ZEROES ? BLOCK_UNMAP : 0;
	uint32_t most = request->type == BLOCK_WRITE_ZEROES ? BLOCK_ZEROES_SECTORS
							     : BLOCK_DISCARD_SECTORS;

	if (!size || size % sizeof(request->range[0]) || size > sizeof(request->range))
		return BLOCK_IOERR;
	request->ranges = (uint32_t)(size / sizeof(request->range[0]));
	virtio_chain_read(&request->chain, BLOCK_HEADER_BYTES, request->range, size);
	for (uint32_t i = 0; i < request->ranges; i++) {
		const struct block_range *range = &request->range[i];

		if (range->flags & ~allowed)
			return BLOCK_UNSUPP;
		if (range->sectors > most ||
		    !is_on_disk(disk, range->sector, (uint64_t)range->sectors * BLOCK_SECTOR))
			return BLOCK_IOERR;
	}
	return BLOCK_OK;
}

static uint8_t parse(struct block_request *request, const struct block_disk *disk, uint64_t sector)
{
	const struct virtio_chain *chain = &request->chain;
	bool reads = request->type == BLOCK_IN || request->type == BLOCK_GET_ID;

	request->size = reads ? chain->writable - 1 : chain->readable - BLOCK_HEADER_BYTES;
	switch (request->type) {
	case BLOCK_IN:
	case BLOCK_OUT:
		if (!is_on_disk(disk, sector, request->size))
			return BLOCK_IOERR;
		request->offset = sector * BLOCK_SECTOR;
		break;
	case BLOCK_DISCARD:
	case BLOCK_WRITE_ZEROES:
		if (disk->read_only)
			return BLOCK_IOERR;
		return parse_ranges(request, disk);
	case BLOCK_FLUSH:
	case BLOCK_GET_ID:
		break;
	default:
		return BLOCK_UNSUPP;
	}
	return request->type == BLOCK_OUT && disk->read_only ? BLOCK_IOERR : BLOCK_OK;
}

bool block_parse(struct block_request *request, struct block_disk *disk)
{
	struct virtio_chain *chain = &request->chain;
	struct { uint32_t type, reserved; uint64_t sector; } header;

	request->status = BLOCK_IOERR;
	if (!chain->writable ||
	    virtio_chain_read(chain, 0, &header, sizeof(header)) < sizeof(header))
		return false;	/* no place for a status, or no header */
	request->type = header.type;
	request->status = parse(request, disk, header.sector);
	if (request->status != BLOCK_OK)
		return false;
	if (request->type == BLOCK_GET_ID) {
		virtio_chain_write(chain, 0, disk->id,
				   request->size < BLOCK_ID_BYTES ? request->size : BLOCK_ID_BYTES);
		return false;
	}
	return request->type == BLOCK_FLUSH || request->size;
}

/* -------------------------------------------------------------------- file */

static void failed(struct block_request *request, struct block_disk *disk, int error)
{
	__atomic_store_n(&disk->last_error, error, __ATOMIC_RELEASE);
	request->status = error == EOPNOTSUPP ? BLOCK_UNSUPP : BLOCK_IOERR;
}

/* One call for what is left of a read or write; like it, but 0 or -1 and errno on failure. */
static ssize_t transfer(struct block_request *request, struct block_disk *disk, int flags)
{
	bool out = request->type == BLOCK_OUT;
	int n = virtio_chain_slice(&request->chain, !out,
				   (out ? BLOCK_HEADER_BYTES : 0) + request->done,
				   request->size - request->done, request->data,
				   request->chain.reads + request->chain.writes);
	off_t at = (off_t)(request->offset + request->done);

	if (out && disk->write_through)
		flags |= RWF_DSYNC;
	return out ? pwritev2(disk->file, request->data, n, at, flags)
		   : preadv2(disk->file, request->data, n, at, flags);
}

bool block_try(struct block_request *request, struct block_disk *disk)
{
	bool out = request->type == BLOCK_OUT;
	ssize_t n;

	if ((request->type != BLOCK_IN && !out) || !disk->no_wait[out] ||
	    (out && disk->write_through))
		return false;
	n = transfer(request, disk, RWF_NOWAIT);
	if (n < 0 && errno != EAGAIN && errno != EINTR)
		disk->no_wait[out] = false;	/* this file system cannot do it, or it is broken */
	if (n > 0)
		request->done += (uint64_t)n;
	return request->done == request->size;
}

static void read_or_write(struct block_request *request, struct block_disk *disk)
{
	while (request->done < request->size) {
		ssize_t n = transfer(request, disk, 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {	/* 0: somebody has made the file shorter */
			failed(request, disk, n ? errno : EIO);
			return;
		}
		request->done += (uint64_t)n;
	}
}

/*
 * What could not be written back may be gone from the page cache, and a second fdatasync() would
 * succeed (fsync(2), Linux mm/filemap.c), so no flush succeeds after one that has failed.
 */
static void flush(struct block_request *request, struct block_disk *disk)
{
	if (!disk->read_only && fdatasync(disk->file))
		__atomic_store_n(&disk->flush_failed, errno, __ATOMIC_RELEASE);
	if (__atomic_load_n(&disk->flush_failed, __ATOMIC_ACQUIRE))
		failed(request, disk, __atomic_load_n(&disk->flush_failed, __ATOMIC_ACQUIRE));
}

static int write_zeros(struct block_disk *disk, off_t at, off_t size)
{
	static const uint8_t zeros[ZEROS];

	while (size) {
		ssize_t n = pwrite(disk->file, zeros, size < ZEROS ? (size_t)size : ZEROS, at);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? errno : EIO;
		at += n;
		size -= n;
	}
	return 0;
}

static int zero(struct block_disk *disk, const struct block_range *range, bool discard)
{
	off_t at = (off_t)(range->sector * BLOCK_SECTOR);
	off_t size = (off_t)range->sectors * BLOCK_SECTOR;
	int punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
	bool unmap = discard || range->flags & BLOCK_UNMAP;

	if (!size)
		return 0;
	if (!fallocate(disk->file, unmap ? punch : FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, at,
		       size))
		return 0;
	if (errno != EOPNOTSUPP || discard)
		return errno;
	return write_zeros(disk, at, size);
}

static void zero_ranges(struct block_request *request, struct block_disk *disk)
{
	for (uint32_t i = 0; i < request->ranges; i++) {
		int error = zero(disk, &request->range[i], request->type == BLOCK_DISCARD);

		if (error) {
			failed(request, disk, error);
			return;
		}
	}
	if (disk->write_through)
		flush(request, disk);
}

void block_perform(struct block_request *request, struct block_disk *disk)
{
	switch (request->type) {
	case BLOCK_IN:
	case BLOCK_OUT:
		read_or_write(request, disk);
		break;
	case BLOCK_FLUSH:
		flush(request, disk);
		break;
	default:
		zero_ranges(request, disk);
	}
}

uint64_t block_answer(const struct block_request *request)
{
	static const uint8_t zeros[ZEROS];
	const struct virtio_chain *chain = &request->chain;
	uint64_t at = 0;

	if (!chain->writable)
		return 0;
	/* All that is said to be written is: what the file did not give is not the host's memory. */
	if (request->type == BLOCK_IN && request->status == BLOCK_OK)
		at = chain->writable - 1;
	else if (request->type == BLOCK_GET_ID && request->status == BLOCK_OK)
		at = request->size < BLOCK_ID_BYTES ? request->size : BLOCK_ID_BYTES;
	while (at < chain->writable - 1) {
		uint64_t left = chain->writable - 1 - at;

		at += virtio_chain_write(chain, at, zeros, left < ZEROS ? left : ZEROS);
	}
	virtio_chain_write(chain, at, &request->status, 1);
	return chain->writable;
}
