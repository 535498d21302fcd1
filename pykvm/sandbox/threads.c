/*
 * Capabilities, no_new_privs and Landlock belong to a thread, and only the thread itself gives them
 * up (Landlock has LANDLOCK_RESTRICT_SELF_TSYNC since Linux 7.0; seccomp has always had its own).
 * So each thread is interrupted by a signal, and its handler does it, as libpsx does.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/capability.h>
#include <semaphore.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "sandbox.h"

#ifndef SYS_landlock_restrict_self
#define SYS_landlock_restrict_self 446
#endif

#define LAST_NUMBER	63	/* of capabilities: a mask has 64 bits */

#define LONGEST		60	/* seconds, in a process that starts threads all the time */

/*
 * The kernel's own threads in a process: of vhost (PF_USER_WORKER since Linux 6.4), of KVM (since
 * 6.14) and of io_uring (both flags). They run no code of the process, and no signal handlers.
 * Source: include/linux/sched.h, proc_pid_stat(5).
 */
#define PF_IO_WORKER	0x00000010
#define PF_USER_WORKER	0x00004000

/* What the thread that is being interrupted reads and writes. */
static struct {
	int ruleset;
	bool may_be_full;	/* of rulesets, ours among them */
	pid_t thread;		/* atomic; 0: nobody is waited for */
	struct sandbox_refusal refusal;
	sem_t answered;
} turn;

static bool refused(struct sandbox_refusal *refusal, int step)
{
	refusal->step = step;
	refusal->error = errno;
	refusal->thread = (int)syscall(SYS_gettid);
	return false;
}

/* Only system calls: a signal handler calls it. */
static bool confine_this_thread(int ruleset, bool may_be_full, struct sandbox_refusal *refusal)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = { { 0 } };

	/* Without CAP_SETPCAP the bounding set stays, which no_new_privs leaves without effect. */
	for (int number = 0; number <= LAST_NUMBER; number++) {
		if (prctl(PR_CAPBSET_DROP, number, 0, 0, 0))
			break;
	}
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		return refused(refusal, SANDBOX_PRIVILEGES);
	if (ruleset >= 0 && syscall(SYS_landlock_restrict_self, ruleset, 0) &&
	    !(may_be_full && errno == E2BIG))
		return refused(refusal, SANDBOX_LANDLOCK);
	/* The ambient set never exceeds these: capabilities(7). */
	if (syscall(SYS_capset, &header, none))
		return refused(refusal, SANDBOX_CAPABILITIES);
	return true;
}

static void on_signal(int number)
{
	int error = errno;
	pid_t self = (pid_t)syscall(SYS_gettid);

	(void)number;
	/* Another process's signal of this number, or one that comes too late, does nothing. */
	if (__atomic_compare_exchange_n(&turn.thread, &self, 0, false, __ATOMIC_ACQ_REL,
					__ATOMIC_ACQUIRE)) {
		turn.refusal.step = 0;
		confine_this_thread(turn.ruleset, turn.may_be_full, &turn.refusal);
		sem_post(&turn.answered);
	}
	errno = error;
}

static int free_signal(void)
{
	struct sigaction action;

	for (int number = SIGRTMAX; number >= SIGRTMIN; number--) {
		if (!sigaction(number, NULL, &action) && !(action.sa_flags & SA_SIGINFO) &&
		    action.sa_handler == SIG_DFL)
			return number;
	}
	errno = EBUSY;
	return -1;
}

static bool is_there(pid_t thread)
{
	return !syscall(SYS_tgkill, getpid(), thread, 0);
}

static bool is_the_kernels(pid_t thread)
{
	unsigned int flags = 0;
	char path[64], line[512], *rest;
	ssize_t size;
	int file;

	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", (int)thread);
	file = open(path, O_RDONLY | O_CLOEXEC);
	if (file < 0)
		return false;
	size = read(file, line, sizeof(line) - 1);
	close(file);
	line[size > 0 ? size : 0] = 0;
	rest = strrchr(line, ')');	/* the name before it may hold anything */
	if (!rest || sscanf(rest, ") %*c %*d %*d %*d %*d %*d %u", &flags) != 1)
		return false;
	return flags & (PF_IO_WORKER | PF_USER_WORKER);
}

/* Returns whether the thread is confined or has ended. */
static bool confine(pid_t thread, int number, int patience, struct sandbox_refusal *refusal)
{
	struct timespec now, end, wake;

	__atomic_store_n(&turn.thread, thread, __ATOMIC_RELEASE);
	if (syscall(SYS_tgkill, getpid(), thread, number))
		goto silent;
	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += patience / 1000;
	end.tv_nsec += patience % 1000 * 1000000L;
	do {
		clock_gettime(CLOCK_REALTIME, &now);
		wake = now;
		wake.tv_nsec += 10000000;	/* then see whether it still lives */
		wake.tv_sec += wake.tv_nsec / 1000000000;
		wake.tv_nsec %= 1000000000;
		if (!sem_timedwait(&turn.answered, &wake)) {
			*refusal = turn.refusal;
			return !refusal->step;
		}
	} while (is_there(thread) &&
		 (now.tv_sec < end.tv_sec ||
		  (now.tv_sec == end.tv_sec && now.tv_nsec < end.tv_nsec)));
	errno = ETIMEDOUT;
silent:
	if (!__atomic_exchange_n(&turn.thread, 0, __ATOMIC_ACQ_REL)) {
		/* It has begun after all, and ends soon: it only makes system calls. */
		while (sem_wait(&turn.answered))
			;
		*refusal = turn.refusal;
		return !refusal->step;
	}
	if (!is_there(thread))
		return true;
	refused(refusal, SANDBOX_ANSWER);
	refusal->thread = thread;
	return false;
}

static bool is_known(const pid_t *threads, size_t count, pid_t thread)
{
	for (size_t i = 0; i < count; i++) {
		if (threads[i] == thread)
			return true;
	}
	return false;
}

struct list {
	pid_t *threads;
	size_t count, room;
};

/* Appends the threads that are not in the list yet, but for the caller. */
static bool append_new(struct list *list)
{
	pid_t self = (pid_t)syscall(SYS_gettid);
	DIR *tasks = opendir("/proc/self/task");
	struct dirent *entry;

	if (!tasks)
		return false;
	while ((entry = readdir(tasks))) {
		pid_t thread = (pid_t)strtol(entry->d_name, NULL, 10);

		if (thread <= 0 || thread == self || is_known(list->threads, list->count, thread))
			continue;
		if (list->count == list->room) {
			size_t room = list->room + 64;
			pid_t *more = realloc(list->threads, room * sizeof(*more));

			if (!more) {
				closedir(tasks);
				return false;
			}
			list->threads = more;
			list->room = room;
		}
		list->threads[list->count++] = thread;
	}
	closedir(tasks);
	return true;
}

/*
 * A thread that is not confined yet may start others meanwhile: the list is read until it has none
 * that are new. Those started by confined ones are confined again, and Landlock takes 16 rulesets
 * of a thread; so for what is not in the first list, one too many is no failure.
 *
 * Returns how many threads there are beside the caller, or -1.
 */
static int confine_others(int number, int patience, struct sandbox_refusal *refusal)
{
	struct list list = { 0 };
	size_t next = 0, kernels = 0;
	struct timespec begun, now;
	bool ok = true;

	clock_gettime(CLOCK_MONOTONIC, &begun);
	turn.may_be_full = false;
	while (ok) {
		ok = append_new(&list);
		clock_gettime(CLOCK_MONOTONIC, &now);
		if (ok && next != list.count && now.tv_sec - begun.tv_sec > LONGEST) {
			errno = EAGAIN;
			ok = false;
		}
		if (!ok)
			refused(refusal, SANDBOX_LISTING);
		if (next == list.count)
			break;
		for (; ok && next < list.count; next++) {
			if (is_the_kernels(list.threads[next]))
				kernels++;
			else
				ok = confine(list.threads[next], number, patience, refusal);
		}
		turn.may_be_full = true;
	}
	free(list.threads);
	return ok ? (int)(list.count - kernels) : -1;
}

int sandbox_confine_threads(int ruleset, int patience, struct sandbox_refusal *refusal)
{
	struct sigaction ours = { .sa_handler = on_signal, .sa_flags = SA_RESTART };
	struct sigaction before, ignored = { .sa_handler = SIG_IGN };
	int number = free_signal(), others;

	refusal->step = 0;
	if (number < 0 || sem_init(&turn.answered, 0, 0)) {
		refused(refusal, SANDBOX_ANSWER);
		return -1;
	}
	turn.ruleset = ruleset;
	sigfillset(&ours.sa_mask);
	if (sigaction(number, &ours, &before)) {
		refused(refusal, SANDBOX_ANSWER);
		return -1;
	}
	others = confine_others(number, patience, refusal);
	/* One that is still pending is discarded; it would end the process. */
	sigaction(number, others < 0 ? &ignored : &before, NULL);
	if (others < 0 || !confine_this_thread(ruleset, false, refusal))
		return -1;
	return others + 1;
}
