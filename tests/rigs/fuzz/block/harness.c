/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzes requests of a block device (block_request.c): chains of any shape from guest memory that
 * changes while it is read, and a file whose calls are short, interrupted, refused or late, as the
 * input wants. The file is this source's own, in two copies: what has been written, and what is
 * durable. Besides the sanitizers judge:
 *
 *  - The file is touched within its bounds, a read-only one not written, from and to the chain.
 *  - A read that succeeds has what the file has, a write that succeeds is there, and without
 *    FLUSH durable; a flush that succeeds makes all durable, and none succeeds after one that
 *    has failed.
 *  - The chain's writable bytes and no others are written, and all those that the answer claims.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include "block_request.h"
#include "guest.h"

#define SECTORS 16
#define BYTES (SECTORS * BLOCK_SECTOR)
#define BUFFERS 6
#define FILE_NUMBER 1000

static uint8_t written[BYTES], durable[BYTES];
static struct block_disk disk;
static bool lossy; /* a flush has failed */
static uint8_t mode;

/* ------------------------------------------------------------------- file */

/* How a call goes wrong, or 0; at times it does less, in *size. */
static int trouble(size_t *size, int flags)
{
	static const int errors[] = { EINTR, EINTR, EIO, ENOSPC, EOPNOTSUPP, EAGAIN };
	uint8_t what = mode & 4 && input_left ? (uint8_t)take_number(1) : 0;

	if (what >= 0xe0 && (what % 6 != 5 || flags & RWF_NOWAIT))
		return errors[what % 6];
	if (what >= 0xa0 && *size)
		*size -= what % *size;
	return 0;
}

static ssize_t move(const struct iovec *iov, int count, off_t at, int flags, bool out)
{
	size_t size = 0, left;
	int error;

	REQUIRE(count >= 0 && count <= 1024 && at >= 0 && at < BYTES);
	for (int i = 0; i < count; i++) {
		REQUIRE(is_guest(iov[i].iov_base, iov[i].iov_len, !out));
		size += iov[i].iov_len;
	}
	REQUIRE(size && size <= (uint64_t)(BYTES - at));
	REQUIRE(!out || !disk.read_only);
	REQUIRE(!out || !disk.write_through || flags & RWF_DSYNC);
	error = trouble(&size, flags);
	if (error) {
		errno = error;
		return -1;
	}
	left = size;
	for (int i = 0; left; i++) {
		size_t part = iov[i].iov_len < left ? iov[i].iov_len : left;

		if (out)
			memcpy(written + at, iov[i].iov_base, part);
		else
			memcpy(iov[i].iov_base, written + at, part);
		if (flags & RWF_DSYNC)
			memcpy(durable + at, written + at, part);
		at += (off_t)part;
		left -= part;
	}
	return (ssize_t)size;
}

ssize_t fake_preadv2(int file, const struct iovec *iov, int count, off_t at, int flags)
{
	REQUIRE(file == FILE_NUMBER);
	return move(iov, count, at, flags, false);
}

ssize_t fake_pwritev2(int file, const struct iovec *iov, int count, off_t at, int flags)
{
	REQUIRE(file == FILE_NUMBER);
	return move(iov, count, at, flags, true);
}

ssize_t fake_pwrite(int file, const void *from, size_t size, off_t at)
{
	int error = trouble(&size, 0);

	REQUIRE(file == FILE_NUMBER && !disk.read_only);
	if (error) {
		errno = error;
		return -1;
	}
	REQUIRE(at >= 0 && at <= BYTES && size <= (size_t)(BYTES - at));
	memcpy(written + at, from, size);
	return (ssize_t)size;
}

int fake_fallocate(int file, int how, off_t at, off_t size)
{
	size_t whole = (size_t)size;
	int error = trouble(&whole, 0);

	REQUIRE(file == FILE_NUMBER && !disk.read_only && how & FALLOC_FL_KEEP_SIZE);
	REQUIRE(at >= 0 && size > 0 && at <= BYTES && size <= BYTES - at);
	if (error) {
		errno = error;
		return -1;
	}
	memset(written + at, 0, (size_t)size);
	return 0;
}

int fake_fdatasync(int file)
{
	size_t all = BYTES;
	int error = trouble(&all, 0);

	REQUIRE(file == FILE_NUMBER);
	if (error) {
		lossy = true;
		errno = error;
		return -1;
	}
	memcpy(durable, written, BYTES);
	return 0;
}

/* ---------------------------------------------------------------- request */

/* Buffers one after the other in guest memory, to be written where flags has a bit. */
static void make_chain(struct virtio_chain *chain, struct iovec *iov)
{
	uint8_t count = (uint8_t)take_number(1) % (BUFFERS + 1), writes = (uint8_t)take_number(1);
	uint64_t gpa = 0x100;

	*chain = (struct virtio_chain){ .iov = iov, .room = BUFFERS * 2 };
	for (uint8_t i = 0; i < count; i++) {
		static const uint32_t lengths[] = { 1, 16, 512, 1024, 15, 20, 511, 513, 4096, 17 };
		uint8_t what = (uint8_t)take_number(1);
		struct virtio_desc desc = {
			.address = gpa,
			.length = what < 0xf0 ? lengths[what % 10] : (uint32_t)take_number(1),
			.flags = i >= writes % (count + 1) ? VIRTIO_DESC_WRITE : 0,
		};

		REQUIRE(!virtio_chain_add(chain, &memory, VIRTIO_CHAIN_BYTES, &desc));
		gpa += desc.length;
	}
}

static void write_header(const struct virtio_chain *chain)
{
	static const uint32_t types[] = { 0, 1, 4, 8, 11, 13, 0, 1 };
	uint8_t what = (uint8_t)take_number(1);
	struct { uint32_t type, reserved; uint64_t sector; } header = {
		.type = what < 0xf0 ? types[what & 7] : (uint32_t)take_number(4),
		.sector = what & 8 ? (uint64_t)take_number(1) % (SECTORS + 2) : 0,
	};
	struct block_range range = {
		.sector = (uint64_t)take_number(1) % (SECTORS + 2),
		.sectors = (uint32_t)take_number(1) % (SECTORS + 2),
		.flags = (uint32_t)take_number(1) % 3,
	};
	uint8_t bytes[64];
	uint64_t at = 0x100;

	if (what & 16)
		header.sector = (uint64_t)0 - header.sector;
	memcpy(bytes, &header, 16);
	memcpy(bytes + 16, &range, 16);
	memcpy(bytes + 32, &range, 16);
	for (size_t i = 0, done = 0; i < chain->reads && done < 48; i++) {
		size_t part = chain->iov[i].iov_len < 48 - done ? chain->iov[i].iov_len : 48 - done;

		poke(at + done, bytes + done, part);
		done += part;
	}
}

static void check(const struct block_request *request, const struct virtio_chain *chain,
		  const uint8_t *before)
{
	static uint8_t data[BYTES];
	uint64_t total = chain->writable;

	if (request->type == BLOCK_IN && request->size) {
		struct iovec out[BUFFERS * 2];
		int n = virtio_chain_slice(chain, true, 0, request->size, out, BUFFERS * 2);
		uint64_t done = 0;

		REQUIRE(n > 0 && request->size == total - 1 && request->size <= BYTES);
		for (int i = 0; i < n; done += out[i++].iov_len)
			memcpy(data + done, out[i].iov_base, out[i].iov_len);
		REQUIRE(memcmp(data, written + request->offset, request->size) == 0);
	}
	if (request->type == BLOCK_OUT && request->size) {
		REQUIRE(virtio_chain_read(chain, BLOCK_HEADER_BYTES, data, BYTES) == request->size);
		REQUIRE(memcmp(data, written + request->offset, request->size) == 0);
		if (disk.write_through)
			REQUIRE(memcmp(data, durable + request->offset, request->size) == 0);
	}
	if (request->type == BLOCK_FLUSH)
		REQUIRE(!lossy && memcmp(written, durable, BYTES) == 0);
	if (block_changes(request) && request->type != BLOCK_OUT) {
		for (uint32_t i = 0; i < request->ranges; i++) {
			const struct block_range *range = &request->range[i];

			for (uint64_t at = 0; at < (uint64_t)range->sectors * BLOCK_SECTOR; at++)
				REQUIRE(!written[range->sector * BLOCK_SECTOR + at]);
		}
		if (disk.write_through)
			REQUIRE(memcmp(written, durable, BYTES) == 0);
	}
	if (!block_changes(request))
		REQUIRE(memcmp(written, before, BYTES) == 0);
}

static void ask(void)
{
	static uint8_t before[BYTES];
	struct iovec iov[BUFFERS * 2];
	struct virtio_chain chain;
	struct block_request *request;
	bool refused = false;
	uint64_t answered;
	uint8_t status = 0xff;

	make_chain(&chain, iov);
	write_header(&chain);
	for (uint32_t i = chain.reads; i < chain.reads + chain.writes; i++)
		memset(iov[i].iov_base, 0xa5, iov[i].iov_len);
	memcpy(before, written, BYTES);
	request = block_request_new(&chain);
	REQUIRE(request);
	is_changing = mode & 1;
	if (block_parse(request, &disk)) {
		is_changing = false;	/* the kernel reads what there is then */
		if (!(mode & 2) || !block_try(request, &disk))
			block_perform(request, &disk);
	} else {
		refused = request->status != BLOCK_OK;
	}
	is_changing = false;
	answered = block_answer(request);
	REQUIRE(answered == chain.writable);
	if (refused)
		REQUIRE(memcmp(written, before, BYTES) == 0);
	if (answered) {
		struct iovec last = iov[chain.reads + chain.writes - 1];

		status = ((uint8_t *)last.iov_base)[last.iov_len - 1];
		REQUIRE(status == request->status && status <= BLOCK_UNSUPP);
		if (status == BLOCK_OK)
			check(request, &chain, before);
		for (uint64_t at = 0; status != BLOCK_OK && at < answered - 1; at++) {
			struct iovec out;

			REQUIRE(virtio_chain_slice(&chain, true, at, 1, &out, 1) == 1);
			REQUIRE(!*(uint8_t *)out.iov_base);
		}
	} else {
		REQUIRE(memcmp(written, before, BYTES) == 0);
	}
	free(request);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	set_input(data, size);
	make_memory();
	mode = (uint8_t)take_number(1);
	disk = (struct block_disk){
		.file = FILE_NUMBER,
		.bytes = BYTES,
		.read_only = mode & 8,
		.write_through = mode & 16,
		.id = "a serial number, 20b",
		.no_wait = { true, true },
	};
	lossy = false;
	for (size_t i = 0; i < BYTES; i++)
		written[i] = (uint8_t)(i * 7 + i / 251 + 1);
	memcpy(durable, written, BYTES);
	for (int count = 0; count < 16 && input_left; count++)
		ask();
	return 0;
}
