/* A virtio entropy device: random numbers of the host's kernel. Source: VIRTIO 1.2, 5.4. */
#ifndef PYKVM_VIRTIO_ENTROPY_H
#define PYKVM_VIRTIO_ENTROPY_H

/* not for cffi { */
#include "loop.h"
/* } */

/* NULL: no memory. */
struct virtio_device *entropy_new(void);
void entropy_free(struct virtio_device *device);

#endif
