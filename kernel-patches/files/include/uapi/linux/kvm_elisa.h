/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * ELISA: EPT contexts that a guest enters with VMFUNC(0, slot), without a VM exit.
 *
 * A context is an EPT of its own. The VMM describes its tables with indices in place of
 * addresses; the kernel allocates the tables, pins the pages and fills in real addresses.
 * Slot 0 of a vCPU's EPTP list is always its default EPT, and slot 1 is the transient slot
 * that only trusted gate code writes; neither can be set from user space.
 *
 * Memory that many contexts map is registered once, with /dev/kvm, and named in parts of 1 GiB.
 */
#ifndef _UAPI_LINUX_KVM_ELISA_H
#define _UAPI_LINUX_KVM_ELISA_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* KVM_CHECK_EXTENSION: 0 without the patch or without EPTP switching, else a version. */
#define KVM_CAP_ELISA			0x45c1
#define KVM_ELISA_VERSION		3

/*
 * KVM_ENABLE_CAP(KVM_CAP_ELISA) on a VM. args[0]: what to turn on, for good.
 *
 * USER_HYPERCALLS: KVM_HC_ELISA_USER and those behind it leave to user space.
 * CONTEXTS: before the first vCPU; the VM may have contexts from then on, and does without what
 * nobody has checked together with them. args[1]: most contexts, args[2]: most pages (table pages
 * and pinned pages) that it may hold at a time; 0 for the defaults. args[3]: weaknesses of the
 * processor that the code of all of its contexts answers itself, KVM_ELISA_BUFFERS and _RETURNS.
 */
#define KVM_ELISA_USER_HYPERCALLS	(1 << 0)
#define KVM_ELISA_CONTEXTS		(1 << 1)
#define KVM_ELISA_DEFAULT_CONTEXTS	1024
#define KVM_ELISA_DEFAULT_PAGES		262144

/*
 * KVM_CHECK_EXTENSION: weaknesses of this processor that let a guest learn what runs in a context,
 * because KVM's answers to them are where it enters guests. Where one is left that neither the
 * contexts' code answers nor the parameter elisa_accept of kvm_intel takes, there are no contexts.
 */
#define KVM_CAP_ELISA_WEAKNESSES	0x45c2
#define KVM_ELISA_L1TF			(1 << 0)	/* the first-level cache; no answer */
#define KVM_ELISA_BUFFERS		(1 << 1)	/* answered by VERW before each return */
#define KVM_ELISA_RETURNS		(1 << 2)	/* answered by returns that cannot be trained */
#define KVM_ELISA_MICROCODE		(1 << 3)	/* VERW does not clear the buffers here */
#define KVM_ELISA_SIBLINGS		(1 << 4)	/* another thread shares cache and buffers */

/* Hypercalls of the baseline; the numbers stay clear of linux/kvm_para.h. */
#define KVM_HC_ELISA_NULL		0x4500	/* answered in the kernel with 0 */
#define KVM_HC_ELISA_USER		0x4510	/* 16 of them leave as KVM_EXIT_HYPERCALL */
#define KVM_HC_ELISA_USER_COUNT		16

#define KVM_ELISA_SLOT_DEFAULT		0
#define KVM_ELISA_SLOT_TRANSIENT	1
#define KVM_ELISA_SLOT_FIRST		2
#define KVM_ELISA_SLOTS			512

/* Limits of one context: memory for the caller's mistakes, not a quota. */
#define KVM_ELISA_MAX_TABLES		4096
#define KVM_ELISA_MAX_PAGES		262144
#define KVM_ELISA_MAX_PARTS		64

/* Bytes of one registered memory. */
#define KVM_ELISA_MAX_MEMORY		(1ULL << 36)

#define KVM_ELISA_PAGE_USER		0	/* addr: of a page to pin */
#define KVM_ELISA_PAGE_LIST		1	/* ref: vCPU id; its EPTP list */
#define KVM_ELISA_PAGE_EPTP		2	/* ref: context fd; its EPTP */

struct kvm_elisa_page {
	__u64 addr;
	__u32 kind;
	__s32 ref;
};

/*
 * size bytes of the caller's memory from addr on, whole pages, to pin and charge once. The file
 * that is returned keeps them, and so do contexts that map a part.
 */
struct kvm_elisa_memory {
	__u64 addr;
	__u64 size;
	__u64 reserved[2];
};

/* GiB number index of a registered memory. */
struct kvm_elisa_part {
	__s32 fd;
	__u32 index;
};

/* flags of a context */
#define KVM_ELISA_LA57			(1 << 0)	/* for guests with five-level paging */

/*
 * tables: nr_tables arrays of 512 EPT entries; table 0 is the root. The address field (bits
 * 12 to 51) of an entry is an index: of another table above level 1, of a page at level 1. A leaf
 * of level 3 (bit 7) at address (n + 1) GiB stands for part n, and never for executable memory.
 * gva, size: the range of guest virtual addresses that the context's guest page table maps; no
 * descriptor table of the guest may touch it while VMFUNC works.
 */
struct kvm_elisa_create {
	__u32 nr_tables;
	__u32 nr_pages;
	__u64 tables;
	__u64 pages;
	__u32 flags;
	__u32 nr_parts;
	__u64 gva;
	__u64 size;
	__u64 parts;
	__u64 reserved;
};

struct kvm_elisa_slot {
	__u32 slot;
	__s32 fd;			/* a context of the same VM, or -1 to empty the slot */
};

struct kvm_elisa_revoke {
	__u32 vcpu;			/* id of a vCPU, running or not */
	__u32 slot;			/* to empty; 0 for all */
};

#define KVM_ELISA_CREATE_CONTEXT	_IOW(0xAE, 0xf0, struct kvm_elisa_create)
#define KVM_ELISA_SET_SLOT		_IOW(0xAE, 0xf1, struct kvm_elisa_slot)
#define KVM_ELISA_REVOKE		_IOW(0xAE, 0xf2, struct kvm_elisa_revoke)
#define KVM_ELISA_REGISTER_MEMORY	_IOW(0xAE, 0xf3, struct kvm_elisa_memory)

/* kvm_run.exit_reason, and what it carries (in the union, at the place of kvm_run.hw). */
#define KVM_EXIT_ELISA			0x45

#define KVM_ELISA_EXIT_VIOLATION	1	/* EPT violation in a context */
#define KVM_ELISA_EXIT_MISCONFIG	2	/* EPT misconfiguration there */
#define KVM_ELISA_EXIT_VMFUNC		3	/* VMFUNC that failed, anywhere */
#define KVM_ELISA_EXIT_REFUSED		4	/* any other exit in a context */
#define KVM_ELISA_EXIT_REVOKED		5	/* the context was revoked under the vCPU */

#define KVM_ELISA_AT_DEFAULT		0
#define KVM_ELISA_AT_GATE		1
#define KVM_ELISA_AT_SUB		2

struct kvm_elisa_exit {
	__u32 cause;			/* KVM_ELISA_EXIT_* */
	__u32 at;			/* KVM_ELISA_AT_*: the context the vCPU was in */
	__u32 slot;			/* gate slot of the attachment; 0 in the default context */
	__u32 vmx_exit_reason;		/* basic exit reason, SDM vol. 3D appendix C */
	__u64 qualification;
	__u64 gpa;			/* valid for violations and misconfigurations */
	__u64 gva;			/* valid where the qualification says so */
	__u64 rip;
	__u64 function;			/* EAX of a failed VMFUNC */
	__u64 index;			/* ECX of a failed VMFUNC */
};

#endif
