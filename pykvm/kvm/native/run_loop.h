/*
 * The vCPU run loop: KVM_RUN in C, without Python (and without the GIL) for common exits.
 *
 * cffi reads this header too, so outside the marked parts it holds plain declarations only.
 */
#ifndef PYKVM_RUN_LOOP_H
#define PYKVM_RUN_LOOP_H

/* not for cffi { */
#include <stddef.h>
#include <stdint.h>
#include <linux/kvm.h>
#include "handlers.h"

/* The members of kvm_run's union have anonymous types; their layouts stay the header's. */
typedef __typeof__(((struct kvm_run *)0)->hw) kvm_exit_hw;
typedef __typeof__(((struct kvm_run *)0)->fail_entry) kvm_exit_fail_entry;
typedef __typeof__(((struct kvm_run *)0)->ex) kvm_exit_ex;
typedef __typeof__(((struct kvm_run *)0)->io) kvm_exit_io;
typedef __typeof__(((struct kvm_run *)0)->debug) kvm_exit_debug;
typedef __typeof__(((struct kvm_run *)0)->mmio) kvm_exit_mmio;
typedef __typeof__(((struct kvm_run *)0)->hypercall) kvm_exit_hypercall;
typedef __typeof__(((struct kvm_run *)0)->tpr_access) kvm_exit_tpr_access;
typedef __typeof__(((struct kvm_run *)0)->internal) kvm_exit_internal;
typedef __typeof__(((struct kvm_run *)0)->system_event) kvm_exit_system_event;
typedef __typeof__(((struct kvm_run *)0)->eoi) kvm_exit_eoi;
typedef __typeof__(((struct kvm_run *)0)->msr) kvm_exit_msr;
typedef __typeof__(((struct kvm_run *)0)->notify) kvm_exit_notify;
/* } */

#define PYKVM_EXIT_KINDS	128
#define PYKVM_HISTORY		16

/* What pykvm_run returns beside -errno of KVM_RUN. */
#define PYKVM_RUN_EXIT		0	/* kvm_run holds an exit for Python */
#define PYKVM_RUN_STOPPED	1	/* pykvm_stop was called; the stop is consumed */
#define PYKVM_RUN_SIGNAL	2	/* another signal came: let Python handle it, then go on */
#define PYKVM_RUN_BUSY		3	/* another thread runs this vCPU */
#define PYKVM_RUN_CLOSED	4	/* the vCPU was closed */

/* One entry of the history: an exit in 24 bytes, enough for a report. */
struct pykvm_past_exit {
	uint32_t reason;
	uint32_t native;	/* served by a handler */
	uint64_t first;		/* port, address, hypercall number, MSR, ... */
	uint64_t second;	/* data written, argument, ... */
};

/* Counts since the vCPU was made; written by the running thread only. */
struct pykvm_counts {
	uint64_t runs;					/* KVM_RUN calls */
	uint64_t interrupted;				/* of which a signal or a stop ended */
	uint64_t native[PYKVM_EXIT_KINDS];		/* served by handlers, by exit reason */
	uint64_t returned[PYKVM_EXIT_KINDS];		/* handed to Python; the last takes the rest */
	uint64_t history_next;				/* exits so far: next slot modulo the size */
	struct pykvm_past_exit history[PYKVM_HISTORY];
};

struct pykvm_vcpu;

long pykvm_ioctl(int fd, unsigned long request, uint64_t arg);

struct pykvm_vcpu *pykvm_vcpu_new(int fd, size_t run_size);
void pykvm_vcpu_free(struct pykvm_vcpu *vcpu);
int pykvm_vcpu_close(struct pykvm_vcpu *vcpu);

/*
 * In a forked child: gives descriptor and mapping back. Takes no lock, because the thread that
 * held it at the fork is not here, and stops nobody, because the vCPU runs in the parent.
 */
void pykvm_vcpu_leave(struct pykvm_vcpu *vcpu);

struct kvm_run *pykvm_vcpu_run_area(struct pykvm_vcpu *vcpu);
struct pykvm_counts *pykvm_vcpu_counts(struct pykvm_vcpu *vcpu);

/*
 * Replaces the handlers (sorted, see handlers.h), also while the vCPU runs; returns when no
 * handler of the old ones runs any more. -EBADF: closed. -EDEADLK: called from a handler.
 */
int pykvm_set_handlers(struct pykvm_vcpu *vcpu, const struct pykvm_handler *handlers,
		       size_t count);

int pykvm_run(struct pykvm_vcpu *vcpu);
void pykvm_stop(struct pykvm_vcpu *vcpu);
int pykvm_is_running(struct pykvm_vcpu *vcpu);

void *pykvm_exit_payload(struct kvm_run *run);
const uint64_t *pykvm_system_event_data(struct kvm_run *run);

#endif
