/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Interface between a shared object and the code around it. The same source is compiled for the
 * sub context, for the VMCALL baseline and the native tests on the host, and into a bare-metal
 * guest for the directly mapped path. Only the addresses in `struct elisa_env` differ.
 */
#ifndef ELISA_OBJECT_H
#define ELISA_OBJECT_H

#include <stdint.h>

/* Read-only for the object, and trusted: the VMM writes it, and no default context maps it. */
struct elisa_env {
	uint64_t shared;      /* address of the object's shared memory, 64-byte aligned or better */
	uint64_t shared_size; /* in bytes */
	uint64_t windows;     /* address of window 0; window i is at windows + i * window_size */
	uint64_t window_size; /* in bytes, a multiple of 4096 */
	uint32_t id;          /* the calling guest, which can access no window but this one */
	uint32_t guests;      /* number of windows */
	uint32_t vcpu;        /* the calling vCPU: its number in its guest, below `vcpus` */
	uint32_t vcpus;       /* most vCPUs of one guest that may be in the object at the same time */
};

/*
 * Guests run the object at the same time, and so do up to `vcpus` vCPUs of each. Every vCPU has a
 * stack of its own. Memory with one writer belongs to a vCPU: to the pair (id, vcpu), which no two
 * calls at the same time have in common. vCPUs of one guest share its window.
 *
 * The object's only entry. a0 to a2 are the guest's, unchecked; the result is returned to it. By
 * convention a negative errno (as uint64_t) means that nothing was done.
 */
uint64_t elisa_serve(uint64_t a0, uint64_t a1, uint64_t a2, const struct elisa_env *env);

/* Error numbers as in Linux, which freestanding code has no header for. */
#define ELISA_EPERM 1
#define ELISA_EINVAL 22
#define ELISA_ENETDOWN 100
#define ELISA_ERROR(number) ((uint64_t)-(int64_t)(number))

#endif
