/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef __KVM_X86_VMX_ELISA_H
#define __KVM_X86_VMX_ELISA_H

#include <linux/kvm_host.h>
#include <linux/mutex.h>
#include <linux/refcount.h>
#include <linux/wait.h>

#include "vmx.h"

struct elisa_page {
	struct page *page;
	u32 kind;
};

struct elisa_memory;			/* elisa_memory.c */

struct elisa_part {
	struct elisa_memory *memory;	/* with a reference */
	struct page *table;		/* of level 2, the memory's */
};

struct elisa_context {
	refcount_t refs;
	struct kvm *kvm;		/* outlives it: its files and its vCPUs do */
	u64 eptp;
	bool la57;			/* for guests with five-level paging */
	u64 gva;			/* what its guest page table maps: gva to last */
	u64 last;
	u32 nr_tables;
	u32 nr_pages;
	struct page **tables;
	struct elisa_page *pages;
	u32 nr_parts;
	struct elisa_part *parts;
	struct page *list_page;		/* among pages: the one EPTP list that it maps, if any */
	struct elisa_context **targets;	/* contexts whose EPTPs this one's pages hold */
	u32 nr_targets;
	unsigned long counted;		/* tables and pinned pages, towards the VM's limit */
	struct mm_struct *mm;		/* charged for them */
};

struct elisa_slot {
	struct elisa_context *ctx;	/* what the list names */
	struct elisa_context *revoked;	/* what the vCPU may still be in */
};

/*
 * The ELISA side of one vCPU; NULL in struct vcpu_vmx until the VMM first names the vCPU's EPTP
 * list.  Its owner is whoever holds vcpu->mutex with the vCPU loaded.  The owner alone drops
 * references and looks at the VMCS; others, who revoke, only move contexts aside under lock.
 */
struct vmx_elisa {
	struct mutex lock;		/* slots, nr_revoked, exit */
	struct page *list_page;
	u64 *list;			/* list_page, mapped */
	u64 default_eptp;		/* what slot 0 must hold unless armed */
	bool enabled;			/* the list is in the VMCS: a slot has been set */
	bool armed;			/* slot 0 is empty, so that the return exits */
	bool report;			/* KVM_RUN has to report exit */
	u32 nr_revoked;
	wait_queue_head_t settled;	/* nr_revoked has become 0 */
	struct kvm_elisa_exit exit;
	struct elisa_slot slots[KVM_ELISA_SLOTS];
};

/* elisa_features.c */
int vmx_elisa_version(void);
int vmx_elisa_check_cpuid(struct kvm_vcpu *vcpu, struct kvm_cpuid_entry2 *entries, int nent);
void vmx_elisa_create_vcpu(struct kvm_vcpu *vcpu);
void vmx_elisa_after_set_cpuid(struct kvm_vcpu *vcpu);

/* elisa_weaknesses.c */
u32 vmx_elisa_weaknesses(void);
int elisa_check_weaknesses(u32 answered);

/* elisa_context.c */
void vmx_elisa_init_vm(struct kvm *kvm);
int vmx_elisa_enable_vm(struct kvm *kvm, struct kvm_enable_cap *cap);
int vmx_elisa_create_context(struct kvm *kvm, void __user *argp);
struct elisa_context *elisa_context_get_fd(struct kvm *kvm, int fd);
void elisa_context_put(struct elisa_context *ctx);

/* elisa_memory.c */
int vmx_elisa_register_memory(void __user *argp);
struct elisa_memory *elisa_memory_get_fd(int fd);
struct page *elisa_memory_part(const struct elisa_memory *memory, u32 part);
void elisa_memory_put(struct elisa_memory *memory);

/* elisa.c */
struct vmx_elisa *elisa_vcpu_state(struct kvm_vcpu *vcpu);
int vmx_elisa_set_slot(struct kvm_vcpu *vcpu, void __user *argp);
int vmx_elisa_revoke(struct kvm *kvm, void __user *argp);
int vmx_elisa_revoked(struct kvm_vcpu *vcpu);
int vmx_elisa_hold_events(struct kvm_vcpu *vcpu);
int vmx_elisa_refuses(struct kvm_vcpu *vcpu, unsigned int ioctl);
void vmx_elisa_free_vcpu(struct kvm_vcpu *vcpu);
bool vmx_elisa_load_eptp(struct kvm_vcpu *vcpu, u64 eptp);
bool vmx_elisa_handle_exit(struct kvm_vcpu *vcpu, int *ret);
bool __vmx_elisa_outside(struct kvm_vcpu *vcpu);
bool __vmx_elisa_keep_events(struct kvm_vcpu *vcpu);
void __vmx_elisa_reset(struct kvm_vcpu *vcpu);
void __vmx_elisa_mode_changed(struct kvm_vcpu *vcpu);

/* Whether the vCPU is in a gate or sub context. */
static inline bool vmx_elisa_outside(struct kvm_vcpu *vcpu)
{
	return unlikely(to_vmx(vcpu)->elisa) && __vmx_elisa_outside(vcpu);
}

/* After an exit, or before an entry that does not take place: whether queued events wait. */
static inline bool vmx_elisa_keep_events(struct kvm_vcpu *vcpu)
{
	return unlikely(to_vmx(vcpu)->elisa) && __vmx_elisa_keep_events(vcpu);
}

static inline void vmx_elisa_reset(struct kvm_vcpu *vcpu)
{
	if (unlikely(to_vmx(vcpu)->elisa))
		__vmx_elisa_reset(vcpu);
}

/* A control register, EFER, or a descriptor-table register has changed. */
static inline void vmx_elisa_mode_changed(struct kvm_vcpu *vcpu)
{
	if (unlikely(to_vmx(vcpu)->elisa))
		__vmx_elisa_mode_changed(vcpu);
}

/* Whether the guest asks for what is not to be had together with contexts (T17, T27). */
static inline bool vmx_elisa_refuses_msr(struct kvm_vcpu *vcpu, struct msr_data *msr)
{
	if (likely(!vcpu->kvm->arch.elisa.contexts) || msr->host_initiated)
		return false;
	if (msr->index == MSR_IA32_DEBUGCTLMSR)
		return msr->data;
	return msr->index == MSR_IA32_TSX_CTRL && !(msr->data & TSX_CTRL_RTM_DISABLE);
}

#endif /* __KVM_X86_VMX_ELISA_H */
