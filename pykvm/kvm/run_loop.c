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
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define DEFAULT_CONSOLE_SIZE (64 * 1024)

struct hypercall {
	uint64_t number;
	pykvm_hypercall_fn fn;
	void *ctx;
};

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
	int closed;

	unsigned int hypercall_count;
	struct hypercall hypercalls[PYKVM_HYPERCALLS];

	unsigned int console_ports;
	uint16_t console_port[PYKVM_CONSOLE_PORTS];
	pthread_mutex_t console_lock;
	char *console;
	size_t console_size;
	size_t console_used;

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
	vcpu->console_size = DEFAULT_CONSOLE_SIZE;
	vcpu->run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (vcpu->run == MAP_FAILED) {
		error = errno;
		goto free_vcpu;
	}
	pthread_once(&once, install_stop_handler);
	vcpu->fd = fd;
	vcpu->run_size = run_size;
	pthread_mutex_init(&vcpu->lock, NULL);
	pthread_mutex_init(&vcpu->console_lock, NULL);
	pthread_cond_init(&vcpu->left, NULL);
	return vcpu;

free_vcpu:
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
	if (!vcpu->closed)
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

/* Stops the vCPU, waits until its thread has left the loop, and lets go of everything. */
int pykvm_vcpu_close(struct pykvm_vcpu *vcpu)
{
	int result = 0;

	pthread_mutex_lock(&vcpu->lock);
	if (!vcpu->closed) {
		/* A native handler that closes its own vCPU would wait for itself. */
		if (vcpu->running && pthread_equal(vcpu->thread, pthread_self())) {
			result = -EDEADLK;
			goto out;
		}
		stop_locked(vcpu);
		vcpu->closed = 1;
		while (vcpu->running)
			pthread_cond_wait(&vcpu->left, &vcpu->lock);
		/*
		 * The mapping would keep the VM alive. Its address stays valid until the struct
		 * is freed, because another thread may be decoding the last exit.
		 */
		mmap(vcpu->run, vcpu->run_size, PROT_READ | PROT_WRITE,
		     MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		close(vcpu->fd);
		vcpu->fd = -1;
	}
out:
	pthread_mutex_unlock(&vcpu->lock);
	return result;
}

void pykvm_vcpu_free(struct pykvm_vcpu *vcpu)
{
	pykvm_vcpu_close(vcpu);
	munmap(vcpu->run, vcpu->run_size);
	pthread_cond_destroy(&vcpu->left);
	pthread_mutex_destroy(&vcpu->console_lock);
	pthread_mutex_destroy(&vcpu->lock);
	free(vcpu->console);
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

/* Handlers and ports change only while nobody runs: the loop reads them without a lock. */
static int begin_change(struct pykvm_vcpu *vcpu)
{
	int error = 0;

	pthread_mutex_lock(&vcpu->lock);
	if (vcpu->closed)
		error = -EBADF;
	else if (vcpu->running)
		error = -EBUSY;
	if (error)
		pthread_mutex_unlock(&vcpu->lock);
	return error;
}

int pykvm_set_hypercall(struct pykvm_vcpu *vcpu, uint64_t number, pykvm_hypercall_fn fn, void *ctx)
{
	int error = begin_change(vcpu);
	unsigned int i = 0;

	if (error)
		return error;
	while (i < vcpu->hypercall_count && vcpu->hypercalls[i].number != number)
		i++;
	if (i == PYKVM_HYPERCALLS) {
		error = -E2BIG;
		goto out;
	}
	if (i == vcpu->hypercall_count)
		vcpu->hypercall_count++;
	vcpu->hypercalls[i] = (struct hypercall){ .number = number, .fn = fn, .ctx = ctx };
out:
	pthread_mutex_unlock(&vcpu->lock);
	return error;
}

int pykvm_console_port(struct pykvm_vcpu *vcpu, uint16_t port)
{
	int error = begin_change(vcpu);

	if (error)
		return error;
	for (unsigned int i = 0; i < vcpu->console_ports; i++)
		if (vcpu->console_port[i] == port)
			goto out;
	if (vcpu->console_ports == PYKVM_CONSOLE_PORTS) {
		error = -ENOSPC;
		goto out;
	}
	if (!vcpu->console)
		vcpu->console = malloc(vcpu->console_size);
	if (!vcpu->console) {
		error = -ENOMEM;
		goto out;
	}
	vcpu->console_port[vcpu->console_ports++] = port;
out:
	pthread_mutex_unlock(&vcpu->lock);
	return error;
}

/* Before the first port: the size of the buffer. */
int pykvm_console_size(struct pykvm_vcpu *vcpu, size_t size)
{
	int error = begin_change(vcpu);

	if (error)
		return error;
	if (!size)
		error = -EINVAL;
	else if (vcpu->console && size != vcpu->console_size)
		error = -EEXIST;
	else
		vcpu->console_size = size;
	pthread_mutex_unlock(&vcpu->lock);
	return error;
}

size_t pykvm_console_read(struct pykvm_vcpu *vcpu, char *out, size_t size)
{
	size_t n;

	pthread_mutex_lock(&vcpu->console_lock);
	n = vcpu->console_used < size ? vcpu->console_used : size;
	if (n) {
		memcpy(out, vcpu->console, n);
		memmove(vcpu->console, vcpu->console + n, vcpu->console_used - n);
		vcpu->console_used -= n;
	}
	pthread_mutex_unlock(&vcpu->console_lock);
	return n;
}

static void console_write(struct pykvm_vcpu *vcpu, const char *data, size_t size)
{
	size_t room, n;

	pthread_mutex_lock(&vcpu->console_lock);
	room = vcpu->console_size - vcpu->console_used;
	n = size < room ? size : room;
	memcpy(vcpu->console + vcpu->console_used, data, n);
	vcpu->console_used += n;
	pthread_mutex_unlock(&vcpu->console_lock);
	vcpu->counts.console_bytes += n;
	vcpu->counts.console_dropped += size - n;
}

uint64_t pykvm_null_hypercall(void *ctx, const uint64_t args[6])
{
	(void)ctx;
	(void)args;
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

static int console_exit(struct pykvm_vcpu *vcpu, struct kvm_run *run)
{
	if (run->io.direction != KVM_EXIT_IO_OUT)
		return 0;
	for (unsigned int i = 0; i < vcpu->console_ports; i++) {
		if (vcpu->console_port[i] != run->io.port)
			continue;
		console_write(vcpu, (const char *)run + run->io.data_offset,
			      (size_t)run->io.size * run->io.count);
		return 1;
	}
	return 0;
}

static int hypercall_exit(struct pykvm_vcpu *vcpu, struct kvm_run *run)
{
	for (unsigned int i = 0; i < vcpu->hypercall_count; i++) {
		const struct hypercall *call = &vcpu->hypercalls[i];

		if (call->number != run->hypercall.nr || !call->fn)
			continue;
		run->hypercall.ret = call->fn(call->ctx, (const uint64_t *)run->hypercall.args);
		return 1;
	}
	return 0;
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

/* 1: answered, run on. 0: for Python. */
static int native_exit(struct pykvm_vcpu *vcpu, struct kvm_run *run)
{
	switch (run->exit_reason) {
	case KVM_EXIT_IO:
		return console_exit(vcpu, run);
	case KVM_EXIT_HYPERCALL:
		return hypercall_exit(vcpu, run);
	default:
		return 0;
	}
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
		int result = ioctl(vcpu->fd, KVM_RUN, 0);

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
		if (!native_exit(vcpu, run)) {
			remember(counts, run, 0);
			return PYKVM_RUN_EXIT;
		}
		remember(counts, run, 1);
	}
}

int pykvm_run(struct pykvm_vcpu *vcpu)
{
	sigset_t wanted;
	int refused = 0, result;

	pthread_mutex_lock(&vcpu->lock);
	if (vcpu->closed)
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
	if (vcpu->closed)
		result = PYKVM_RUN_CLOSED;
	pthread_mutex_unlock(&vcpu->lock);
	return result;
}
