/*
 * Confinement of all threads of a process: what Linux gives up for one thread at a time only.
 *
 * cffi reads this header too, so outside the marked parts it holds plain declarations only.
 */
#ifndef PYKVM_SANDBOX_H
#define PYKVM_SANDBOX_H

/* not for cffi { */
#include <stdint.h>
/* } */

/* What was refused, in struct sandbox_refusal. */
#define SANDBOX_LISTING		1
#define SANDBOX_ANSWER		2
#define SANDBOX_CAPABILITIES	3
#define SANDBOX_PRIVILEGES	4
#define SANDBOX_LANDLOCK	5

struct sandbox_refusal {
	int step;
	int error;		/* errno */
	int thread;		/* its ID */
};

/*
 * Drop all capabilities and new privileges, and restrict by a Landlock ruleset (none: -1), in every
 * thread of this process. Threads are interrupted by a signal that nobody handles.
 *
 * patience is how many milliseconds a thread may take. A thread that blocks all signals does not
 * answer: ETIMEDOUT. Threads are confined one after the other, so a failure leaves some confined.
 *
 * Returns how many threads there were, or -1 and what was refused.
 */
int sandbox_confine_threads(int ruleset, int patience, struct sandbox_refusal *refusal);

/* landlock(7). The ABI, a descriptor or 0; else -errno. */
int sandbox_landlock_abi(void);
int sandbox_landlock_ruleset(uint64_t files, uint64_t network, uint64_t scopes, int abi);
int sandbox_landlock_allow(int ruleset, int path, uint64_t files);

/* seccomp(2). 0 or -errno. */
int sandbox_seccomp_has(uint32_t action);
int sandbox_seccomp_filter(const void *instructions, unsigned int count);

#endif
