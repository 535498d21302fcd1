/*
 * The child of a process with threads: between fork() and execve() it calls nothing that takes a
 * lock of the C library.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "backend_spawn.h"

/* linux/mount.h cannot be included together with glibc's header before 2.36. */
#ifndef MOUNT_ATTR_RDONLY
#define MOUNT_ATTR_RDONLY 0x1
#endif
#ifndef AT_RECURSIVE
#define AT_RECURSIVE 0x8000
#endif
#ifndef SYS_mount_setattr
#define SYS_mount_setattr 442
#endif

struct attributes {
	uint64_t set, clear, propagation, user_namespace;
};

static _Noreturn void fail(const char *what)
{
	char line[160];
	int error = errno;
	const char *reason = strerrordesc_np(error);
	int n = snprintf(line, sizeof(line), "%s: %s\n", what, reason ? reason : "unknown error");

	if (n > 0 && write(STDERR_FILENO, line, (size_t)n) < 0)
		_exit(126);
	_exit(127);
}

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		fail(path);
	close(fd);
}

/* user_namespaces(7): a user may map itself alone, and may map groups once setgroups() is off. */
static void become_root_of_a_namespace(unsigned int uid, unsigned int gid)
{
	char map[32];

	if (unshare(CLONE_NEWUSER))
		fail("cannot make a user namespace");
	write_file("/proc/self/setgroups", "deny");
	snprintf(map, sizeof(map), "0 %u 1", uid);
	write_file("/proc/self/uid_map", map);
	snprintf(map, sizeof(map), "0 %u 1", gid);
	write_file("/proc/self/gid_map", map);
}

/*
 * QEMU's virtiofsd gives up where it cannot drop its groups, which no user namespace of an ordinary
 * user allows. They give it nothing that the user has not.
 */
static void let_setgroups_do_nothing(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_setgroups, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof(code) / sizeof(code[0]), code};

	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
		fail("cannot install a seccomp filter");
}

static void make_everything_read_only(void)
{
	struct attributes read_only = {.set = MOUNT_ATTR_RDONLY};

	if (unshare(CLONE_NEWNS))
		fail("cannot make a mount namespace");
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
		fail("cannot make mounts private");
	if (syscall(SYS_mount_setattr, AT_FDCWD, "/", AT_RECURSIVE, &read_only, sizeof(read_only)))
		fail("cannot make mounts read-only");
}

static _Noreturn void run(char **argv, int listener, int messages, int flags, pid_t parent)
{
	static char *const environment[] = {"PATH=/usr/sbin:/usr/bin:/sbin:/bin", NULL};
	unsigned int uid = geteuid(), gid = getegid();
	sigset_t none;
	int null;

	/* The caller's descriptors may be among 0 to 3, which are about to be others. */
	messages = fcntl(messages, F_DUPFD_CLOEXEC, BACKEND_LISTENER + 1);
	listener = fcntl(listener, F_DUPFD_CLOEXEC, BACKEND_LISTENER + 1);
	if (dup2(messages, STDERR_FILENO) < 0 || dup2(messages, STDOUT_FILENO) < 0)
		_exit(126);
	null = open("/dev/null", O_RDONLY | O_CLOEXEC);
	if (null < 0 || dup2(null, STDIN_FILENO) < 0)
		fail("/dev/null");
	if (dup2(listener, BACKEND_LISTENER) < 0)
		fail("cannot pass the socket on");
	setsid(); /* what a terminal's keys send is the monitor's to handle */
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL); /* Python ignores it, and what is ignored stays so in a program */
	if (flags & BACKEND_USER_NAMESPACE)
		become_root_of_a_namespace(uid, gid);
	if (flags & BACKEND_READ_ONLY)
		make_everything_read_only();
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		fail("cannot give up new privileges");
	if (flags & BACKEND_USER_NAMESPACE)
		let_setgroups_do_nothing();
	/* A change of credentials clears it, so it comes last; the parent may have ended before. */
	if (prctl(PR_SET_PDEATHSIG, SIGTERM))
		fail("cannot follow the monitor's end");
	if (getppid() != parent)
		_exit(126);
	execve(argv[0], argv, environment);
	fail(argv[0]);
}

int backend_spawn(char **argv, int listener, int messages, int flags)
{
	pid_t self = getpid();
	pid_t child = fork();

	if (child == 0)
		run(argv, listener, messages, flags, self);
	return child < 0 ? -errno : child;
}
