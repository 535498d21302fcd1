// SPDX-License-Identifier: GPL-2.0-only
/*
 * ELISA: EPT contexts that a guest enters with VMFUNC (EPTP switching), without a VM exit.
 *
 * User space describes the tables of a context; this file checks every entry, pins the pages,
 * and owns the tables that the processor walks.  What a vCPU does with contexts: elisa.c.  Memory
 * that contexts share: elisa_memory.c.
 *
 * Lifetime: a context's file and every list slot that names it hold a reference, and so does a
 * context whose EPTP page names it.  The last reference flushes its translations on every CPU
 * and only then frees the tables, unpins the pages and gives back registered memory.  A new
 * context is flushed as well, before anybody can enter it.
 */
#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/kvm_host.h>
#include <linux/mm.h>
#include <linux/nospec.h>
#include <linux/sched/mm.h>
#include <linux/smp.h>
#include <asm/tlbflush.h>
#include <uapi/linux/kvm_elisa.h>

#include "capabilities.h"
#include "elisa.h"
#include "vmx.h"
#include "vmx_ops.h"

#define ELISA_ROOT_LEVEL	4
#define ELISA_ENTRIES		512
#define ELISA_RWX		(VMX_EPT_READABLE_MASK | VMX_EPT_WRITABLE_MASK | \
				 VMX_EPT_EXECUTABLE_MASK)
#define ELISA_INDEX_MASK	GENMASK_ULL(51, 12)
#define ELISA_PART_LEVEL	3
#define ELISA_PART_BIT		BIT_ULL(7)
#define ELISA_PART_SHIFT	30
#define ELISA_PART_MASK		GENMASK_ULL(51, ELISA_PART_SHIFT)
#define ELISA_MT_WB		((u64)MTRR_TYPE_WRBACK << VMX_EPT_MT_EPTE_SHIFT)
#define ELISA_MT_MASK		((u64)7 << VMX_EPT_MT_EPTE_SHIFT)

static const struct file_operations elisa_context_fops;

static void elisa_invept(void *eptp)
{
	/* A CPU that is going down or coming up flushes everything when it turns VMX on. */
	if (cr4_read_shadow() & X86_CR4_VMXE)
		ept_sync_context(*(u64 *)eptp);
}

/*
 * Processors tell translations apart by the page of the root.  Before a context is used, because
 * KVM frees roots of its own without a flush (it flushes when it loads one, which VMFUNC does not
 * do): what is left of the page's last owner would lead into memory that is somebody else's now.
 * After its last use, because its pages are about to be somebody else's.
 */
static void elisa_flush(struct elisa_context *ctx)
{
	on_each_cpu(elisa_invept, &ctx->eptp, 1);
}

static void elisa_release_page(struct elisa_page *p)
{
	if (!p->page)
		return;
	if (p->kind == KVM_ELISA_PAGE_USER)
		unpin_user_pages_dirty_lock(&p->page, 1, true);
	else
		put_page(p->page);
}

/* Tables and pinned pages count: towards the VM's limit and towards RLIMIT_MEMLOCK. */
static int elisa_charge(struct elisa_context *ctx, const struct kvm_elisa_page *args)
{
	struct kvm_vm_stat *stat = &ctx->kvm->stat;
	struct kvm_elisa_vm *vm = &ctx->kvm->arch.elisa;
	unsigned long nr = ctx->nr_tables;
	int r = 0;
	u32 i;

	for (i = 0; i < ctx->nr_pages; i++)
		nr += args[i].kind == KVM_ELISA_PAGE_USER;

	mutex_lock(&vm->lock);
	if (stat->elisa_contexts >= vm->max_contexts || stat->elisa_pages + nr > vm->max_pages) {
		r = -ENOSPC;
	} else {
		stat->elisa_contexts++;
		stat->elisa_pages += nr;
		ctx->counted = nr;
	}
	mutex_unlock(&vm->lock);
	if (r)
		return r;

	r = account_locked_vm(current->mm, nr, true);
	if (r)
		return r;
	mmgrab(current->mm);
	ctx->mm = current->mm;
	return 0;
}

static void elisa_uncharge(struct elisa_context *ctx)
{
	struct kvm_elisa_vm *vm = &ctx->kvm->arch.elisa;

	if (ctx->mm) {
		account_locked_vm(ctx->mm, ctx->counted, false);
		mmdrop(ctx->mm);
	}
	if (ctx->counted) {
		mutex_lock(&vm->lock);
		ctx->kvm->stat.elisa_contexts--;
		ctx->kvm->stat.elisa_pages -= ctx->counted;
		mutex_unlock(&vm->lock);
	}
}

/* Free whatever has been set up; only a context that got an EPTP can have been walked. */
static void elisa_context_destroy(struct elisa_context *ctx)
{
	u32 i;

	if (ctx->eptp)
		elisa_flush(ctx);

	for (i = 0; ctx->tables && i < ctx->nr_tables; i++)
		if (ctx->tables[i])
			__free_page(ctx->tables[i]);
	for (i = 0; ctx->pages && i < ctx->nr_pages; i++)
		elisa_release_page(&ctx->pages[i]);
	for (i = 0; ctx->parts && i < ctx->nr_parts; i++)
		if (ctx->parts[i].memory)
			elisa_memory_put(ctx->parts[i].memory);
	elisa_uncharge(ctx);
	for (i = 0; i < ctx->nr_targets; i++)
		if (refcount_dec_and_test(&ctx->targets[i]->refs))
			elisa_context_destroy(ctx->targets[i]);	/* has no targets: depth 1 */
	kvfree(ctx->targets);
	kvfree(ctx->tables);
	kvfree(ctx->pages);
	kvfree(ctx->parts);
	kfree(ctx);
}

void elisa_context_put(struct elisa_context *ctx)
{
	if (refcount_dec_and_test(&ctx->refs))
		elisa_context_destroy(ctx);
}

static int elisa_context_release(struct inode *inode, struct file *file)
{
	struct elisa_context *ctx = file->private_data;
	struct kvm *kvm = ctx->kvm;

	/* The VM outlives the flush: INVEPT needs VMX to be on. */
	elisa_context_put(ctx);
	kvm_put_kvm(kvm);
	return 0;
}

static const struct file_operations elisa_context_fops = {
	.owner = THIS_MODULE,
	.release = elisa_context_release,
	.llseek = noop_llseek,
};

/* Takes a reference, or returns an error for a file that is no context of this VM. */
struct elisa_context *elisa_context_get_fd(struct kvm *kvm, int fd)
{
	struct elisa_context *ctx = ERR_PTR(-EINVAL);
	struct file *file = fget(fd);

	if (!file)
		return ERR_PTR(-EBADF);
	if (file->f_op == &elisa_context_fops) {
		ctx = file->private_data;
		if (ctx->kvm == kvm)
			refcount_inc(&ctx->refs);
		else
			ctx = ERR_PTR(-EINVAL);
	}
	fput(file);
	return ctx;
}

/* Pin the run of consecutive user pages that starts at args[first]; returns its length. */
static int elisa_pin_run(struct elisa_context *ctx, const struct kvm_elisa_page *args, u32 first)
{
	struct page *batch[64];
	u32 n, i;
	int got;

	for (n = 0; n < ARRAY_SIZE(batch) && first + n < ctx->nr_pages; n++) {
		const struct kvm_elisa_page *p = &args[first + n];

		if (p->kind != KVM_ELISA_PAGE_USER ||
		    p->addr != args[first].addr + (u64)n * PAGE_SIZE)
			break;
		if (p->ref || !PAGE_ALIGNED(p->addr))
			return -EINVAL;
	}
	got = pin_user_pages_fast(args[first].addr, n, FOLL_WRITE | FOLL_LONGTERM, batch);
	if (got <= 0)
		return got ? got : -EFAULT;
	for (i = 0; i < got; i++) {
		ctx->pages[first + i].page = batch[i];
		ctx->pages[first + i].kind = KVM_ELISA_PAGE_USER;
	}
	return got;
}

static int elisa_list_page(struct elisa_context *ctx, const struct kvm_elisa_page *arg,
			   struct elisa_page *p)
{
	struct kvm_vcpu *vcpu;
	struct vmx_elisa *e;

	if (arg->addr || arg->ref < 0)
		return -EINVAL;
	vcpu = kvm_get_vcpu_by_id(ctx->kvm, arg->ref);
	if (!vcpu)
		return -ENOENT;
	e = elisa_vcpu_state(vcpu);
	if (!e)
		return -ENOMEM;
	/* It could be installed nowhere: see elisa_fits(). */
	if (ctx->list_page && ctx->list_page != e->list_page)
		return -EINVAL;
	ctx->list_page = e->list_page;
	get_page(e->list_page);
	p->page = e->list_page;
	p->kind = KVM_ELISA_PAGE_LIST;
	return 0;
}

static int elisa_eptp_page(struct elisa_context *ctx, const struct kvm_elisa_page *arg,
			   struct elisa_page *p)
{
	struct elisa_context *target;

	if (arg->addr)
		return -EINVAL;
	target = elisa_context_get_fd(ctx->kvm, arg->ref);
	if (IS_ERR(target))
		return PTR_ERR(target);
	/* One level is all a gate needs, and it bounds the recursion of the last put. */
	if (target->nr_targets) {
		elisa_context_put(target);
		return -ELOOP;
	}
	ctx->targets[ctx->nr_targets++] = target;
	p->page = alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO);
	if (!p->page)
		return -ENOMEM;
	p->kind = KVM_ELISA_PAGE_EPTP;
	*(u64 *)page_address(p->page) = target->eptp;
	return 0;
}

static int elisa_collect_pages(struct elisa_context *ctx, const struct kvm_elisa_page *args)
{
	u32 i = 0, targets = 0;
	int r;

	for (i = 0; i < ctx->nr_pages; i++)
		targets += args[i].kind == KVM_ELISA_PAGE_EPTP;
	/* The kernel allocates these pages; a list has no room for more contexts. */
	if (targets > KVM_ELISA_SLOTS)
		return -E2BIG;
	if (targets) {
		ctx->targets = kvcalloc(targets, sizeof(*ctx->targets), GFP_KERNEL_ACCOUNT);
		if (!ctx->targets)
			return -ENOMEM;
	}

	r = elisa_charge(ctx, args);
	for (i = 0; !r && i < ctx->nr_pages;) {
		switch (args[i].kind) {
		case KVM_ELISA_PAGE_USER:
			r = elisa_pin_run(ctx, args, i);
			if (r > 0) {
				i += r;
				r = 0;
			}
			break;
		case KVM_ELISA_PAGE_LIST:
			r = elisa_list_page(ctx, &args[i], &ctx->pages[i]);
			i++;
			break;
		case KVM_ELISA_PAGE_EPTP:
			r = elisa_eptp_page(ctx, &args[i], &ctx->pages[i]);
			i++;
			break;
		default:
			r = -EINVAL;
		}
		cond_resched();
	}
	return r;
}

static int elisa_collect_parts(struct elisa_context *ctx, const struct kvm_elisa_part *args)
{
	struct elisa_memory *memory;
	u32 i;

	for (i = 0; i < ctx->nr_parts; i++) {
		memory = elisa_memory_get_fd(args[i].fd);
		if (IS_ERR(memory))
			return PTR_ERR(memory);
		ctx->parts[i].memory = memory;
		ctx->parts[i].table = elisa_memory_part(memory, args[i].index);
		if (!ctx->parts[i].table)
			return -EINVAL;
	}
	return 0;
}

/* What an entry of any level must satisfy: SDM vol. 3C 29.3.2, and nothing optional. */
static bool elisa_access_ok(u64 entry)
{
	u64 rwx = entry & ELISA_RWX;

	if (!rwx)
		return false;
	if ((rwx & VMX_EPT_WRITABLE_MASK) && !(rwx & VMX_EPT_READABLE_MASK))
		return false;
	return rwx != VMX_EPT_EXECUTABLE_MASK || cpu_has_vmx_ept_execute_only();
}

static int elisa_leaf(struct elisa_context *ctx, u64 entry, u64 *real)
{
	u64 index = (entry & ELISA_INDEX_MASK) >> PAGE_SHIFT;
	const struct elisa_page *p;

	if ((entry & ~(ELISA_INDEX_MASK | ELISA_RWX | ELISA_MT_MASK)) ||
	    (entry & ELISA_MT_MASK) != ELISA_MT_WB || !elisa_access_ok(entry) ||
	    index >= ctx->nr_pages)
		return -EINVAL;

	/* Nothing writable is executable; kernel pages are data, and EPTPs are constant. */
	p = &ctx->pages[array_index_nospec(index, ctx->nr_pages)];
	if ((entry & VMX_EPT_EXECUTABLE_MASK) &&
	    ((entry & VMX_EPT_WRITABLE_MASK) || p->kind != KVM_ELISA_PAGE_USER))
		return -EINVAL;
	if ((entry & VMX_EPT_WRITABLE_MASK) && p->kind == KVM_ELISA_PAGE_EPTP)
		return -EINVAL;

	/*
	 * Without "ignore PAT" the guest's PAT and CR3.PCD could make the page write-combining or
	 * uncached, and so take away the order of writes that code without locks relies on.
	 */
	*real = page_to_phys(p->page) | (entry & ~ELISA_INDEX_MASK) | VMX_EPT_IPAT_BIT;
	return 0;
}

/* A leaf of level 3 becomes a branch into tables of the memory's, which hold the leaves. */
static int elisa_part(struct elisa_context *ctx, u64 entry, u64 *real)
{
	u64 index = ((entry & ELISA_PART_MASK) >> ELISA_PART_SHIFT) - 1;

	if ((entry & ~(ELISA_PART_MASK | ELISA_PART_BIT | ELISA_RWX | ELISA_MT_MASK)) ||
	    (entry & ELISA_MT_MASK) != ELISA_MT_WB || !elisa_access_ok(entry) ||
	    (entry & VMX_EPT_EXECUTABLE_MASK) || index >= ctx->nr_parts)
		return -EINVAL;
	index = array_index_nospec(index, ctx->nr_parts);
	*real = page_to_phys(ctx->parts[index].table) | (entry & ELISA_RWX);
	return 0;
}

/* Returns the index of the table that a non-leaf entry names, or an error. */
static int elisa_branch(struct elisa_context *ctx, u64 entry, u64 *real)
{
	u64 index = (entry & ELISA_INDEX_MASK) >> PAGE_SHIFT;

	if ((entry & ~(ELISA_INDEX_MASK | ELISA_RWX)) || !elisa_access_ok(entry) ||
	    index >= ctx->nr_tables)
		return -EINVAL;
	index = array_index_nospec(index, ctx->nr_tables);
	*real = page_to_phys(ctx->tables[index]) | (entry & ELISA_RWX);
	return index;
}

struct elisa_walk {
	u32 *queue;			/* tables in the order in which they are reached */
	u32 queued;
	u8 *level;			/* of each table; 0 until reached */
};

static int elisa_fill_table(struct elisa_context *ctx, struct elisa_walk *walk, u32 table)
{
	u64 *entries = page_address(ctx->tables[table]);
	u8 level = walk->level[table];
	u64 real;
	int i, r;

	for (i = 0; i < ELISA_ENTRIES; i++) {
		if (!entries[i])
			continue;
		if (level == 1) {
			r = elisa_leaf(ctx, entries[i], &real);
			if (r)
				return r;
		} else if (level == ELISA_PART_LEVEL && (entries[i] & ELISA_PART_BIT)) {
			r = elisa_part(ctx, entries[i], &real);
			if (r)
				return r;
		} else {
			r = elisa_branch(ctx, entries[i], &real);
			if (r < 0)
				return r;
			if (!walk->level[r]) {
				walk->level[r] = level - 1;
				walk->queue[walk->queued++] = r;
			} else if (walk->level[r] != level - 1) {
				return -EINVAL;
			}
		}
		entries[i] = real;
	}
	return 0;
}

/*
 * Copy the caller's tables, once, into pages of our own, and replace every index.  A table may
 * be shared, but only at one level, and every table must be reached from the root.
 */
static int elisa_build_tables(struct elisa_context *ctx, const void __user *utables)
{
	struct elisa_walk walk = {};
	int r = -ENOMEM;
	u32 i;

	walk.queue = kvcalloc(ctx->nr_tables, sizeof(*walk.queue), GFP_KERNEL_ACCOUNT);
	walk.level = kvcalloc(ctx->nr_tables, sizeof(*walk.level), GFP_KERNEL_ACCOUNT);
	if (!walk.queue || !walk.level)
		goto out;

	for (i = 0; i < ctx->nr_tables; i++) {
		r = -ENOMEM;
		ctx->tables[i] = alloc_page(GFP_KERNEL_ACCOUNT);
		if (!ctx->tables[i])
			goto out;
		r = -EFAULT;
		if (copy_from_user(page_address(ctx->tables[i]),
				   utables + (size_t)i * PAGE_SIZE, PAGE_SIZE))
			goto out;
	}

	walk.level[0] = ELISA_ROOT_LEVEL;
	walk.queue[walk.queued++] = 0;
	for (i = 0; i < walk.queued; i++) {
		r = elisa_fill_table(ctx, &walk, walk.queue[i]);
		if (r)
			goto out;
		cond_resched();
	}
	r = walk.queued == ctx->nr_tables ? 0 : -EINVAL;
out:
	kvfree(walk.queue);
	kvfree(walk.level);
	return r;
}

static struct elisa_context *elisa_context_build(struct kvm *kvm,
						 const struct kvm_elisa_create *arg)
{
	struct kvm_elisa_page *pages;
	struct kvm_elisa_part *parts = NULL;
	struct elisa_context *ctx = NULL;
	int r = -ENOMEM;

	pages = vmemdup_user(u64_to_user_ptr(arg->pages),
			     array_size(arg->nr_pages, sizeof(*pages)));
	if (IS_ERR(pages))
		return ERR_CAST(pages);
	if (arg->nr_parts) {
		parts = vmemdup_user(u64_to_user_ptr(arg->parts),
				     array_size(arg->nr_parts, sizeof(*parts)));
		if (IS_ERR(parts)) {
			r = PTR_ERR(parts);
			parts = NULL;
			goto out;
		}
	}
	ctx = kzalloc(sizeof(*ctx), GFP_KERNEL_ACCOUNT);
	if (!ctx)
		goto out;
	refcount_set(&ctx->refs, 1);
	ctx->kvm = kvm;
	ctx->la57 = arg->flags & KVM_ELISA_LA57;
	ctx->gva = arg->gva;
	ctx->last = arg->gva + arg->size - 1;
	ctx->nr_tables = arg->nr_tables;
	ctx->nr_pages = arg->nr_pages;
	ctx->nr_parts = arg->nr_parts;
	ctx->tables = kvcalloc(arg->nr_tables, sizeof(*ctx->tables), GFP_KERNEL_ACCOUNT);
	ctx->pages = kvcalloc(arg->nr_pages, sizeof(*ctx->pages), GFP_KERNEL_ACCOUNT);
	if (!ctx->tables || !ctx->pages)
		goto out;
	if (parts) {
		ctx->parts = kvcalloc(arg->nr_parts, sizeof(*ctx->parts), GFP_KERNEL_ACCOUNT);
		if (!ctx->parts)
			goto out;
	}
	r = elisa_collect_pages(ctx, pages);
	if (!r && parts)
		r = elisa_collect_parts(ctx, parts);
	if (!r)
		r = elisa_build_tables(ctx, u64_to_user_ptr(arg->tables));
	if (!r) {
		/* No accessed and dirty flags: they would make the processor's walks writes. */
		ctx->eptp = page_to_phys(ctx->tables[0]) | VMX_EPTP_MT_WB | VMX_EPTP_PWL_4;
		elisa_flush(ctx);
	}
out:
	kvfree(pages);
	kvfree(parts);
	if (r) {
		if (ctx)
			elisa_context_destroy(ctx);
		return ERR_PTR(r);
	}
	return ctx;
}

void vmx_elisa_init_vm(struct kvm *kvm)
{
	mutex_init(&kvm->arch.elisa.lock);
}

int vmx_elisa_enable_vm(struct kvm *kvm, struct kvm_enable_cap *cap)
{
	struct kvm_elisa_vm *vm = &kvm->arch.elisa;
	int r;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	if (!vmx_elisa_version())
		return -EOPNOTSUPP;
	if (cap->args[3] & ~(u64)(KVM_ELISA_BUFFERS | KVM_ELISA_RETURNS))
		return -EINVAL;
	r = elisa_check_weaknesses(cap->args[3]);
	if (r)
		return r;

	r = -EINVAL;
	mutex_lock(&kvm->lock);
	if (!kvm->created_vcpus) {
		vm->max_contexts = cap->args[1] ?: KVM_ELISA_DEFAULT_CONTEXTS;
		vm->max_pages = cap->args[2] ?: KVM_ELISA_DEFAULT_PAGES;
		vm->answered = cap->args[3];
		vm->contexts = true;
		/* APICv delivers interrupts without an exit, into contexts as well. */
		kvm_set_apicv_inhibit(kvm, APICV_INHIBIT_REASON_ELISA);
		r = 0;
	}
	mutex_unlock(&kvm->lock);
	return r;
}

int vmx_elisa_create_context(struct kvm *kvm, void __user *argp)
{
	struct kvm_elisa_create arg;
	struct elisa_context *ctx;
	int fd, r;

	/* A gate page writes EPTPs: whoever supplies it is trusted as root is. */
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	if (!vmx_elisa_version())
		return -EOPNOTSUPP;
	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (!kvm->arch.elisa.contexts || (arg.flags & ~KVM_ELISA_LA57) || arg.reserved ||
	    (!arg.nr_parts && arg.parts))
		return -EINVAL;
	if (!PAGE_ALIGNED(arg.gva | arg.size) || !arg.size || arg.gva + arg.size - 1 < arg.gva)
		return -EINVAL;
	if (!arg.nr_tables || !arg.nr_pages)
		return -EINVAL;
	if (arg.nr_tables > KVM_ELISA_MAX_TABLES || arg.nr_pages > KVM_ELISA_MAX_PAGES ||
	    arg.nr_parts > KVM_ELISA_MAX_PARTS)
		return -E2BIG;
	r = elisa_check_weaknesses(kvm->arch.elisa.answered);
	if (r)
		return r;

	ctx = elisa_context_build(kvm, &arg);
	if (IS_ERR(ctx))
		return PTR_ERR(ctx);
	kvm_get_kvm(kvm);
	fd = anon_inode_getfd("kvm-elisa-context", &elisa_context_fops, ctx, O_CLOEXEC);
	if (fd < 0) {
		elisa_context_put(ctx);
		kvm_put_kvm(kvm);
	}
	return fd;
}
