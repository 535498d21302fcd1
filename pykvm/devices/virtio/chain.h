/*
 * Chains: the buffers of a request, as a driver has described them in guest memory, translated for
 * readv() and writev(). Source: VIRTIO 1.2, 2.7.5 and 2.8.
 *
 * This is the one place where what a guest says about memory is checked. Each field of a descriptor
 * is read once, because other vCPUs may write it at any time; so is whatever a device reads from a
 * chain: copy it with virtio_chain_read(), check the copy, use the copy.
 *
 * cffi reads this header too, so outside the marked parts it holds plain declarations only.
 */
#ifndef PYKVM_VIRTIO_CHAIN_H
#define PYKVM_VIRTIO_CHAIN_H

/* not for cffi { */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>
/* } */

#define VIRTIO_CHAIN_IOVECS	1024		/* the most that readv() takes, IOV_MAX */
#define VIRTIO_CHAIN_BYTES	2147479552	/* the most that it transfers, MAX_RW_COUNT */

/* Why a queue is broken; virtqueue_reason() says it in words. */
enum virtqueue_fault {
	VIRTQUEUE_WHOLE = 0,
	VIRTQUEUE_BAD_SIZE,		/* of the ring */
	VIRTQUEUE_BAD_RING,		/* an address of the ring: not in RAM, or not aligned */
	VIRTQUEUE_BAD_BASE,
	VIRTQUEUE_RUN_AHEAD,		/* more is available than the ring holds */
	VIRTQUEUE_BAD_INDEX,		/* of a descriptor */
	VIRTQUEUE_BAD_ADDRESS,		/* not in RAM, or to be written and read-only */
	VIRTQUEUE_LOOP,			/* a chain comes back to itself, or is longer than its table */
	VIRTQUEUE_TOO_LONG,		/* more buffers or bytes than the device takes */
	VIRTQUEUE_WRONG_ORDER,		/* a buffer to read after one to write */
	VIRTQUEUE_BAD_INDIRECT,		/* a table's length, or one that was not negotiated */
	VIRTQUEUE_NESTED,		/* an indirect descriptor in an indirect table, or with NEXT */
	VIRTQUEUE_FAULTS
};

/* Guest memory. Regions do not overlap; neither they nor the table change while a queue uses them. */
struct virtio_region {
	uint64_t gpa;
	uint64_t size;
	uint8_t *host;
	bool read_only;			/* the guest may only read it, and devices for the guest */
};

struct virtio_memory {
	size_t count;
	const struct virtio_region *regions;
};

/*
 * One request. The caller gives iov and room (VIRTIO_CHAIN_IOVECS always suffices); the rest is
 * filled in by virtqueue_take(). A buffer that lies in two regions has an iovec for each. The
 * lengths and addresses are checked copies, and the memory is there for as long as the device runs;
 * what it holds is the guest's, and changes.
 */
struct virtio_chain {
	struct iovec *iov;		/* those that the device reads, then those that it writes */
	uint32_t room;
	uint32_t reads;			/* iovecs to read */
	uint32_t writes;		/* iovecs to write */
	uint64_t readable;		/* bytes */
	uint64_t writable;		/* bytes */
	uint16_t id;			/* goes back to the driver */
	uint16_t slots;			/* entries of the ring */
};

/* Reads the bytes from offset on of those to read; returns how many: fewer at the end. */
size_t virtio_chain_read(const struct virtio_chain *chain, uint64_t offset, void *to, size_t size);

/* Writes the bytes from offset on of those to write; returns how many: fewer at the end. */
size_t virtio_chain_write(const struct virtio_chain *chain, uint64_t offset, const void *from,
			  size_t size);

/*
 * Fills out with iovecs for size bytes from offset on, of those to write or to read; returns their
 * number, or -1: the chain has not so many bytes, or out (room) is too small.
 */
int virtio_chain_slice(const struct virtio_chain *chain, bool writable, uint64_t offset,
		       uint64_t size, struct iovec *out, uint32_t room);

const char *virtqueue_reason(int fault);

/* not for cffi { */
/* What queue.c needs of it. */

#define VIRTIO_DESC_NEXT	1
#define VIRTIO_DESC_WRITE	2
#define VIRTIO_DESC_INDIRECT	4
#define VIRTIO_DESC_BYTES	16

/* A copy of a descriptor; of a packed ring, `next` is the buffer's identity. */
struct virtio_desc {
	uint64_t address;
	uint32_t length;
	uint16_t flags;
	uint16_t next;
};

/* Host address of size bytes at gpa in one region, aligned to a power of 2; or NULL. */
void *virtio_translate(const struct virtio_memory *memory, uint64_t gpa, uint64_t size,
		       uint64_t alignment, bool writable);

/* Both return a fault or 0. */
int virtio_chain_add(struct virtio_chain *chain, const struct virtio_memory *memory,
		     uint64_t most_bytes, const struct virtio_desc *desc);
int virtio_chain_add_table(struct virtio_chain *chain, const struct virtio_memory *memory,
			   uint64_t most_bytes, const struct virtio_desc *desc, bool packed);

void virtio_load_desc(struct virtio_desc *to, const uint8_t *from, bool packed);
/* } */

#endif
