/*
 * System calls without a function in the C library.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sandbox.h"

/* struct landlock_ruleset_attr as it grew: the headers of Linux 6.1 have its first member. */
struct ruleset {
	uint64_t files, network, scopes;
};

static int result(long value)
{
	return value < 0 ? -errno : (int)value;
}

int sandbox_landlock_abi(void)
{
	return result(syscall(SYS_landlock_create_ruleset, NULL, 0,
			      LANDLOCK_CREATE_RULESET_VERSION));
}

int sandbox_landlock_ruleset(uint64_t files, uint64_t network, uint64_t scopes, int abi)
{
	struct ruleset ruleset = { files, network, scopes };
	size_t size = sizeof(ruleset);

	if (abi < 6)
		size = offsetof(struct ruleset, scopes);
	if (abi < 4)
		size = offsetof(struct ruleset, network);
	return result(syscall(SYS_landlock_create_ruleset, &ruleset, size, 0));
}

int sandbox_landlock_allow(int ruleset, int path, uint64_t files)
{
	struct landlock_path_beneath_attr rule = { .allowed_access = files, .parent_fd = path };

	return result(syscall(SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PATH_BENEATH, &rule,
			      0));
}

int sandbox_seccomp_has(uint32_t action)
{
	return result(syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &action));
}

int sandbox_seccomp_filter(const void *instructions, unsigned int count)
{
	struct sock_fprog program = {
		.len = (unsigned short)count,
		.filter = (struct sock_filter *)instructions,
	};

	/* All threads or none: the second flag makes a thread that cannot follow ESRCH, not its ID. */
	return result(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER,
			      SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_TSYNC_ESRCH,
			      &program));
}
