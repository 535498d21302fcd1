#include "entropy.h"

#include <stdlib.h>
#include <sys/random.h>

#define MOST	65536	/* bytes for a request: a device may answer with less than was asked for */

static int64_t answer(struct virtio_device *device, struct virtio_loop *loop, uint32_t index,
		      struct virtio_chain *chain)
{
	int64_t written = 0;

	(void)device, (void)index;
	for (uint32_t i = chain->reads; i < chain->reads + chain->writes && written < MOST; i++) {
		uint8_t *to = chain->iov[i].iov_base;
		size_t left = chain->iov[i].iov_len;

		if (left > (size_t)(MOST - written))
			left = (size_t)(MOST - written);
		while (left) {
			ssize_t n = getrandom(to, left, 0);

			if (n < 0) {	/* no signal comes here, so there is no such call: seccomp */
				virtio_loop_fail(loop, "the host refuses random numbers");
				return written;
			}
			to += n;
			left -= (size_t)n;
			written += n;
		}
	}
	return written;
}

static void kicked(struct virtio_device *device, struct virtio_loop *loop, uint32_t index)
{
	(void)device;
	virtio_loop_serve(loop, index, answer);
}

struct virtio_device *entropy_new(void)
{
	struct virtio_device *device = calloc(1, sizeof(*device));

	if (device)
		device->kicked = kicked;
	return device;
}

void entropy_free(struct virtio_device *device)
{
	free(device);
}
