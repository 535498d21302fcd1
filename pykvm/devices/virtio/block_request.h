/*
 * Requests of a virtio block device: what a driver asks for, checked, and done to a file. Source:
 * VIRTIO 1.2, 5.2.6.
 */
#ifndef PYKVM_VIRTIO_BLOCK_REQUEST_H
#define PYKVM_VIRTIO_BLOCK_REQUEST_H

#include "block.h"

enum { BLOCK_IN = 0, BLOCK_OUT = 1, BLOCK_FLUSH = 4, BLOCK_GET_ID = 8, BLOCK_DISCARD = 11,
       BLOCK_WRITE_ZEROES = 13 };

enum { BLOCK_OK = 0, BLOCK_IOERR = 1, BLOCK_UNSUPP = 2 };

#define BLOCK_HEADER_BYTES	16
#define BLOCK_UNMAP		1	/* flag of a range */

struct block_disk {
	int file;
	uint64_t bytes;
	bool read_only;
	bool write_through;	/* a write is durable before it is answered */
	char id[BLOCK_ID_BYTES];
	int no_wait[2];		/* whether reads, writes may be tried without waiting; loop's */
	int flush_failed;	/* atomic: what was written before may be lost, and stays so */
	int last_error;		/* atomic: errno */
};

/* As it comes in a discard or write zeroes request. */
struct block_range {
	uint64_t sector;
	uint32_t sectors;
	uint32_t flags;
};

struct block_request {
	struct block_request *next;
	struct virtio_chain chain;	/* with iovecs of its own */
	uint32_t queue;
	uint32_t type;
	uint64_t number;		/* in order of arrival */
	uint64_t offset;		/* bytes of the disk, for IN and OUT */
	uint64_t size;			/* bytes of data */
	uint64_t done;			/* of them */
	uint32_t ranges;
	uint8_t status;
	struct block_range range[BLOCK_MOST_RANGES];
	struct iovec *data;		/* room for as many as the chain has */
	struct iovec iov[];
};

/* A copy of a chain with what belongs to it. NULL: no memory. */
struct block_request *block_request_new(const struct virtio_chain *chain);

/* Returns whether there is something to do; if not, the status says how it went. */
bool block_parse(struct block_request *request, struct block_disk *disk);

/* Tries to be done at once; returns whether it is, or has failed. Not for several threads. */
bool block_try(struct block_request *request, struct block_disk *disk);

/* Does what is left of it, however long that takes. */
void block_perform(struct block_request *request, struct block_disk *disk);

/* Writes the status, or zeros for data that could not be read; returns bytes written. */
uint64_t block_answer(const struct block_request *request);

static inline bool block_changes(const struct block_request *request)
{
	return request->type == BLOCK_OUT || request->type == BLOCK_DISCARD ||
	       request->type == BLOCK_WRITE_ZEROES;
}

#endif
