/*
 * The vCPU run loop.
 *
 * Stopping a vCPU has two races to close. A stop may come just before KVM_RUN is entered: a
 * signal alone would be consumed in user mode and the guest would run on, so kvm_run's
 * immediate_exit is set first, which KVM checks after it has looked for signals
 * (Documentation/virt/kvm/api.rst, "immediate_exit"). And a stop may come when the thread is
 * leaving the loop, or has ended: the mutex guards `running`, so a thread is signalled only while
 * it is inside pykvm_run, where it cannot end.
 */
#define _GNU_SOURCE
#include "run_loop.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

struct pykvm_vcpu {
	int fd;
	struct kvm_run *run;
	size_t run_size;

	/* Who runs, and whether it should not. */
	pthread_mutex_t lock;
	pthread_cond_t left;
	pthread_t thread;
	int running;
	int stop;
	int closing;	/* nobody enters any more */
	int closed;	/* descriptor and mapping are given back */

	/*
	 * Handlers are replaced while the loop may be in one of them: `serving` is odd meanwhile,
	 * and whoever replaces the table frees the old one when it has seen that end.
	 */
	struct pykvm_table *table;
	uint64_t serving;
	pthread_mutex_t change;

	struct pykvm_counts counts;
};

/*
 * A real-time signal, so that no program's own use of SIGUSR1 collides with it; some way above
 * SIGRTMIN because libraries take the first ones.
 */
#define STOP_SIGNAL (SIGRTMIN + 5)

static void stop_handler(int signal)
{
	(void)signal;	/* Its only effect is EINTR. */
}

static void install_stop_handler(void)
{
	struct sigaction action = { .sa_handler = stop_handler };	/* no SA_RESTART */

	sigemptyset(&action.sa_mask);
	sigaction(STOP_SIGNAL, &action, NULL);
}

long pykvm_ioctl(int fd, unsigned long request, uint64_t arg)
{
	long result = ioctl(fd, request, (unsigned long)arg);

	return result < 0 ? -errno : result;
}

/* Takes ownership of fd, also when it fails (NULL, errno). */
struct pykvm_vcpu *pykvm_vcpu_new(int fd, size_t run_size)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	struct pykvm_vcpu *vcpu = calloc(1, sizeof(*vcpu));
	int error = ENOMEM;

	if (!vcpu)
		goto close_fd;
	vcpu->table = pykvm_table_new(NULL, 0);
	if (!vcpu->table)
		goto free_vcpu;
	vcpu->run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (vcpu->run == MAP_FAILED) {
		error = errno;
		goto free_vcpu;
	}
	pthread_once(&once, install_stop_handler);
	vcpu->fd = fd;
	vcpu->run_size = run_size;
	pthread_mutex_init(&vcpu->lock, NULL);
	pthread_mutex_init(&vcpu->change, NULL);
	pthread_cond_init(&vcpu->left, NULL);
	return vcpu;

free_vcpu:
	free(vcpu->table);
	free(vcpu);
close_fd:
	close(fd);
	errno = error;
	return NULL;
}

static void stop_locked(struct pykvm_vcpu *vcpu)
{
	vcpu->stop = 1;
	/* Before the signal, so that whichever side of KVM's check it meets, KVM_RUN returns. */
	__atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
	if (vcpu->running)
		pthread_kill(vcpu->thread, STOP_SIGNAL);
}

void pykvm_stop(struct pykvm_vcpu *vcpu)
{
	pthread_mutex_lock(&vcpu->lock);
	if (!vcpu->closing)
		stop_locked(vcpu);
	pthread_mutex_unlock(&vcpu->lock);
}

int pykvm_is_running(struct pykvm_vcpu *vcpu)
{
	int running;

	pthread_mutex_lock(&vcpu->lock);
	running = vcpu->running;
	pthread_mutex_unlock(&vcpu->lock);
	return running;
}

/*
 * The mapping would keep the VM alive. Its address stays valid until the struct is freed, because
 * another thread may be decoding the last exit.
 */
static void let_go(struct pykvm_vcpu *vcpu)
{
	vcpu->closed = 1;
	mmap(vcpu->run, vcpu->run_size, PROT_READ | PROT_WRITE,
	     MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	close(vcpu->fd);
}

/* Stops the vCPU, waits until its thread has left the loop, and lets go of everything. */
int pykvm_vcpu_close(struct pykvm_vcpu *vcpu)
{
	int result = 0;

	pthread_mutex_lock(&vcpu->lock);
	if (!vcpu->closing) {
		/* A native handler that closes its own vCPU would wait for itself. */
		if (vcpu->running && pthread_equal(vcpu->thread, pthread_self())) {
			result = -EDEADLK;
			goto out;
		}
		stop_locked(vcpu);
		vcpu->closing = 1;
		while (vcpu->running)
			pthread_cond_wait(&vcpu->left, &vcpu->lock);
		let_go(vcpu);
	}
out:
	pthread_mutex_unlock(&vcpu->lock);
	return result;
}

void pykvm_vcpu_leave(struct pykvm_vcpu *vcpu)
{
	vcpu->closing = 1;
	if (!vcpu->closed)
		let_go(vcpu);
}

void pykvm_vcpu_free(struct pykvm_vcpu *vcpu)
{
	if (!vcpu->closed)
		pykvm_vcpu_close(vcpu);
	munmap(vcpu->run, vcpu->run_size);
	/* The locks own no memory; after a fork one may be held for ever, and is left as it is. */
	free(vcpu->table);
	free(vcpu);
}

struct kvm_run *pykvm_vcpu_run_area(struct pykvm_vcpu *vcpu)
{
	return vcpu->run;
}

struct pykvm_counts *pykvm_vcpu_counts(struct pykvm_vcpu *vcpu)
{
	return &vcpu->counts;
}

int pykvm_set_handlers(struct pykvm_vcpu *vcpu, const struct pykvm_handler *handlers, size_t count)
{
	struct pykvm_table *table, *old;
	uint64_t serving;
	int error = 0;

	pthread_mutex_lock(&vcpu->lock);
	if (vcpu->closing)
		error = -EBADF;
	else if (vcpu->running && pthread_equal(vcpu->thread, pthread_self()))
		error = -EDEADLK;	/* it would wait for itself */
	pthread_mutex_unlock(&vcpu->lock);
	if (error)
		return error;
	table = pykvm_table_new(handlers, count);
	if (!table)
		return -ENOMEM;
	pthread_mutex_lock(&vcpu->change);
	old = __atomic_exchange_n(&vcpu->table, table, __ATOMIC_SEQ_CST);
	serving = __atomic_load_n(&vcpu->serving, __ATOMIC_SEQ_CST);
	if (serving & 1)
		while (__atomic_load_n(&vcpu->serving, __ATOMIC_ACQUIRE) == serving)
			sched_yield();
	pthread_mutex_unlock(&vcpu->change);
	free(old);
	return 0;
}

void *pykvm_exit_payload(struct kvm_run *run)
{
	return &run->hw;
}

const uint64_t *pykvm_system_event_data(struct kvm_run *run)
{
	return (const uint64_t *)run->system_event.data;
}

static uint64_t first_bytes(const void *data, size_t size)
{
	uint64_t value = 0;

	memcpy(&value, data, size < sizeof(value) ? size : sizeof(value));
	return value;
}

static void remember(struct pykvm_counts *counts, const struct kvm_run *run, int native)
{
	struct pykvm_past_exit *past = &counts->history[counts->history_next++ % PYKVM_HISTORY];
	unsigned int kind = run->exit_reason;

	past->reason = kind;
	past->native = native;
	past->first = 0;
	past->second = 0;
	switch (kind) {
	case KVM_EXIT_IO:
		past->first = run->io.port;
		past->second = first_bytes((const char *)run + run->io.data_offset, run->io.size);
		break;
	case KVM_EXIT_MMIO:
		past->first = run->mmio.phys_addr;
		past->second = first_bytes(run->mmio.data, run->mmio.len);
		break;
	case KVM_EXIT_HYPERCALL:
		past->first = run->hypercall.nr;
		past->second = run->hypercall.args[0];
		break;
	case KVM_EXIT_X86_RDMSR:
	case KVM_EXIT_X86_WRMSR:
		past->first = run->msr.index;
		past->second = run->msr.data;
		break;
	case KVM_EXIT_INTERNAL_ERROR:
		past->first = run->internal.suberror;
		break;
	default:
		break;
	}
	if (kind >= PYKVM_EXIT_KINDS)
		kind = PYKVM_EXIT_KINDS - 1;
	if (native)
		counts->native[kind]++;
	else
		counts->returned[kind]++;
}

/* 1: a handler has served the exit, run on. 0: it is for Python. */
static int serve(struct pykvm_vcpu *vcpu)
{
	uint64_t serving = vcpu->serving + 1;
	int served;

	/* First tell, then look: see pykvm_set_handlers. */
	__atomic_store_n(&vcpu->serving, serving, __ATOMIC_SEQ_CST);
	served = pykvm_table_serve(__atomic_load_n(&vcpu->table, __ATOMIC_SEQ_CST), vcpu->run);
	__atomic_store_n(&vcpu->serving, serving + 1, __ATOMIC_RELEASE);
	return served;
}

/* Whether a stop was asked for; if so it is used up. */
static int consume_stop(struct pykvm_vcpu *vcpu)
{
	int stop;

	pthread_mutex_lock(&vcpu->lock);
	stop = vcpu->stop;
	vcpu->stop = 0;
	__atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
	pthread_mutex_unlock(&vcpu->lock);
	return stop;
}

static int loop(struct pykvm_vcpu *vcpu)
{
	struct pykvm_counts *counts = &vcpu->counts;
	struct kvm_run *run = vcpu->run;

	for (;;) {
		int served, result = ioctl(vcpu->fd, KVM_RUN, 0);

		counts->runs++;
		if (result < 0) {
			/* EAGAIN: an application processor that waits to be started. */
			if (errno == EAGAIN)
				continue;
			if (errno != EINTR)
				return -errno;
			counts->interrupted++;
			return consume_stop(vcpu) ? PYKVM_RUN_STOPPED : PYKVM_RUN_SIGNAL;
		}
		served = serve(vcpu);
		remember(counts, run, served);
		if (!served)
			return PYKVM_RUN_EXIT;
	}
}

int pykvm_run(struct pykvm_vcpu *vcpu)
{
	sigset_t wanted;
	int refused = 0, result;

	pthread_mutex_lock(&vcpu->lock);
	if (vcpu->closing)
		refused = PYKVM_RUN_CLOSED;
	else if (vcpu->running)
		refused = PYKVM_RUN_BUSY;
	else {
		vcpu->running = 1;
		vcpu->thread = pthread_self();
	}
	pthread_mutex_unlock(&vcpu->lock);
	if (refused)
		return refused;

	/* A thread started with every signal blocked would not be stopped. */
	sigemptyset(&wanted);
	sigaddset(&wanted, STOP_SIGNAL);
	pthread_sigmask(SIG_UNBLOCK, &wanted, NULL);

	result = loop(vcpu);

	pthread_mutex_lock(&vcpu->lock);
	vcpu->running = 0;
	pthread_cond_broadcast(&vcpu->left);
	if (vcpu->closing)
		result = PYKVM_RUN_CLOSED;
	pthread_mutex_unlock(&vcpu->lock);
	return result;
}
