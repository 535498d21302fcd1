// SPDX-License-Identifier: GPL-2.0-only
/*
 * ELISA: memory that is registered once, and that any number of contexts map.
 *
 * Its pages are pinned and charged when it is registered, and its part of an EPT is built then: a
 * level-2 table for each GiB, with 2 MiB leaves where 512 pages lie side by side.  An entry of
 * level 3 in a context leads to such a table, so that a context costs the same whatever the
 * memory's size.  Everything in these tables is readable and writable, and nothing executable.
 *
 * Lifetime: the file holds a reference, and so does every context with a part of the memory.  A
 * context flushes its translations before it gives its references back, so nothing can translate
 * to the pages any more when the last one goes.
 */
#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/kvm_host.h>
#include <linux/mm.h>
#include <linux/nospec.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/seq_file.h>
#include <uapi/linux/kvm_elisa.h>

#include "capabilities.h"
#include "elisa.h"

#define ELISA_LARGE_PAGES	512	/* pages of a 2 MiB leaf, and entries of a table */
#define ELISA_MEMORY_LEAF	(VMX_EPT_READABLE_MASK | VMX_EPT_WRITABLE_MASK | \
				 VMX_EPT_IPAT_BIT | \
				 ((u64)MTRR_TYPE_WRBACK << VMX_EPT_MT_EPTE_SHIFT))
#define ELISA_LARGE_LEAF	BIT_ULL(7)

struct elisa_memory {
	refcount_t refs;
	unsigned long nr_pages;
	unsigned long nr_pinned;
	struct page **pages;
	u32 nr_parts;			/* GiB, the last of which may be partly absent */
	struct page **parts;		/* the level-2 table of each */
	unsigned long nr_blocks;	/* of 2 MiB */
	struct page **tables;		/* the level-1 table of each; NULL where a leaf is in place */
	unsigned long nr_tables;
	unsigned long charged;		/* tables and pinned pages */
	struct mm_struct *mm;		/* charged for them */
};

static int elisa_memory_charge(struct elisa_memory *memory, unsigned long nr)
{
	int r = account_locked_vm(memory->mm, nr, true);

	if (!r)
		memory->charged += nr;
	return r;
}

/* Free whatever has been set up. */
static void elisa_memory_destroy(struct elisa_memory *memory)
{
	unsigned long i, n;

	for (i = 0; memory->tables && i < memory->nr_blocks; i++)
		if (memory->tables[i])
			__free_page(memory->tables[i]);
	for (i = 0; memory->parts && i < memory->nr_parts; i++)
		if (memory->parts[i])
			__free_page(memory->parts[i]);
	for (i = 0; i < memory->nr_pinned; i += n) {
		n = min(memory->nr_pinned - i, (unsigned long)ELISA_LARGE_PAGES);
		unpin_user_pages_dirty_lock(&memory->pages[i], n, true);
		cond_resched();
	}
	if (memory->charged)
		account_locked_vm(memory->mm, memory->charged, false);
	mmdrop(memory->mm);
	kvfree(memory->tables);
	kvfree(memory->parts);
	kvfree(memory->pages);
	kfree(memory);
}

void elisa_memory_put(struct elisa_memory *memory)
{
	if (refcount_dec_and_test(&memory->refs))
		elisa_memory_destroy(memory);
}

static int elisa_memory_release(struct inode *inode, struct file *file)
{
	elisa_memory_put(file->private_data);
	return 0;
}

#ifdef CONFIG_PROC_FS
static void elisa_memory_show_fdinfo(struct seq_file *m, struct file *file)
{
	struct elisa_memory *memory = file->private_data;

	seq_printf(m, "elisa-pages:\t%lu\n", memory->nr_pages);
	seq_printf(m, "elisa-large:\t%lu\n", memory->nr_blocks - memory->nr_tables);
	seq_printf(m, "elisa-tables:\t%lu\n", memory->nr_parts + memory->nr_tables);
	seq_printf(m, "elisa-contexts:\t%u\n", refcount_read(&memory->refs) - 1);
}
#endif

static const struct file_operations elisa_memory_fops = {
	.owner = THIS_MODULE,
	.release = elisa_memory_release,
	.llseek = noop_llseek,
#ifdef CONFIG_PROC_FS
	.show_fdinfo = elisa_memory_show_fdinfo,
#endif
};

/* Takes a reference, or returns an error for a file that is no registered memory. */
struct elisa_memory *elisa_memory_get_fd(int fd)
{
	struct elisa_memory *memory = ERR_PTR(-EINVAL);
	struct file *file = fget(fd);

	if (!file)
		return ERR_PTR(-EBADF);
	if (file->f_op == &elisa_memory_fops) {
		memory = file->private_data;
		refcount_inc(&memory->refs);
	}
	fput(file);
	return memory;
}

/* The level-2 table of a part, or NULL if the memory has no such part. */
struct page *elisa_memory_part(const struct elisa_memory *memory, u32 part)
{
	if (part >= memory->nr_parts)
		return NULL;
	return memory->parts[array_index_nospec(part, memory->nr_parts)];
}

static int elisa_memory_pin(struct elisa_memory *memory, u64 addr)
{
	unsigned long n;
	int got;

	while (memory->nr_pinned < memory->nr_pages) {
		n = min(memory->nr_pages - memory->nr_pinned, (unsigned long)ELISA_LARGE_PAGES);
		got = pin_user_pages_fast(addr + memory->nr_pinned * PAGE_SIZE, n,
					  FOLL_WRITE | FOLL_LONGTERM,
					  &memory->pages[memory->nr_pinned]);
		if (got <= 0)
			return got ? got : -EFAULT;
		memory->nr_pinned += got;
		if (fatal_signal_pending(current))
			return -EINTR;
		cond_resched();
	}
	return 0;
}

/* Whether a block of 2 MiB can be one leaf: its pages are all there, side by side, and aligned. */
static bool elisa_memory_is_large(const struct elisa_memory *memory, unsigned long block)
{
	unsigned long first = block * ELISA_LARGE_PAGES, pfn, i;

	if (!cpu_has_vmx_ept_2m_page() || memory->nr_pages - first < ELISA_LARGE_PAGES)
		return false;
	pfn = page_to_pfn(memory->pages[first]);
	if (pfn % ELISA_LARGE_PAGES)
		return false;
	for (i = 1; i < ELISA_LARGE_PAGES; i++)
		if (page_to_pfn(memory->pages[first + i]) != pfn + i)
			return false;
	return true;
}

static int elisa_memory_new_table(struct page **table)
{
	*table = alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO);
	return *table ? 0 : -ENOMEM;
}

static int elisa_memory_fill_block(struct elisa_memory *memory, unsigned long block, u64 *entry)
{
	unsigned long first = block * ELISA_LARGE_PAGES, i;
	u64 *leaves;
	int r;

	if (elisa_memory_is_large(memory, block)) {
		*entry = page_to_phys(memory->pages[first]) | ELISA_MEMORY_LEAF | ELISA_LARGE_LEAF;
		return 0;
	}
	r = elisa_memory_charge(memory, 1);
	if (!r)
		r = elisa_memory_new_table(&memory->tables[block]);
	if (r)
		return r;
	memory->nr_tables++;
	leaves = page_address(memory->tables[block]);
	for (i = 0; i < ELISA_LARGE_PAGES && first + i < memory->nr_pages; i++)
		leaves[i] = page_to_phys(memory->pages[first + i]) | ELISA_MEMORY_LEAF;
	*entry = page_to_phys(memory->tables[block]) | VMX_EPT_READABLE_MASK |
		 VMX_EPT_WRITABLE_MASK;
	return 0;
}

static int elisa_memory_build(struct elisa_memory *memory, u64 addr)
{
	unsigned long block;
	u64 *entries;
	int r;
	u32 i;

	memory->pages = kvcalloc(memory->nr_pages, sizeof(*memory->pages), GFP_KERNEL_ACCOUNT);
	memory->parts = kvcalloc(memory->nr_parts, sizeof(*memory->parts), GFP_KERNEL_ACCOUNT);
	memory->tables = kvcalloc(memory->nr_blocks, sizeof(*memory->tables), GFP_KERNEL_ACCOUNT);
	if (!memory->pages || !memory->parts || !memory->tables)
		return -ENOMEM;
	r = elisa_memory_charge(memory, memory->nr_pages + memory->nr_parts);
	for (i = 0; !r && i < memory->nr_parts; i++)
		r = elisa_memory_new_table(&memory->parts[i]);
	if (!r)
		r = elisa_memory_pin(memory, addr);
	for (block = 0; !r && block < memory->nr_blocks; block++) {
		entries = page_address(memory->parts[block / ELISA_LARGE_PAGES]);
		r = elisa_memory_fill_block(memory, block, &entries[block % ELISA_LARGE_PAGES]);
		cond_resched();
	}
	return r;
}

int vmx_elisa_register_memory(void __user *argp)
{
	struct kvm_elisa_memory arg;
	struct elisa_memory *memory;
	int r;

	/* Pages stay pinned for whoever maps them: whoever asks is trusted as with contexts. */
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	if (!vmx_elisa_version())
		return -EOPNOTSUPP;
	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (arg.reserved[0] || arg.reserved[1] || !arg.size ||
	    !PAGE_ALIGNED(arg.addr | arg.size) || arg.addr + arg.size < arg.addr)
		return -EINVAL;
	if (arg.size > KVM_ELISA_MAX_MEMORY)
		return -E2BIG;

	memory = kzalloc(sizeof(*memory), GFP_KERNEL_ACCOUNT);
	if (!memory)
		return -ENOMEM;
	refcount_set(&memory->refs, 1);
	memory->nr_pages = arg.size >> PAGE_SHIFT;
	memory->nr_blocks = DIV_ROUND_UP(memory->nr_pages, ELISA_LARGE_PAGES);
	memory->nr_parts = DIV_ROUND_UP(memory->nr_blocks, ELISA_LARGE_PAGES);
	mmgrab(current->mm);
	memory->mm = current->mm;

	r = elisa_memory_build(memory, arg.addr);
	if (!r)
		r = anon_inode_getfd("kvm-elisa-memory", &elisa_memory_fops, memory, O_CLOEXEC);
	if (r < 0)
		elisa_memory_put(memory);
	return r;
}
