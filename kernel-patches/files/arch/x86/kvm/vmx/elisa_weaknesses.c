// SPDX-License-Identifier: GPL-2.0-only
/*
 * ELISA: weaknesses of the processor that KVM answers when it enters a guest.  A crossing enters no
 * guest, so contexts have to do with what their own code does about them, or not to exist, unless
 * the administrator accepts the weakness by name.
 */
#include <linux/kvm_host.h>
#include <linux/moduleparam.h>
#include <linux/sched/smt.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <asm/cpufeature.h>
#include <asm/msr.h>
#include <uapi/linux/kvm_elisa.h>

#include "elisa.h"

/* By bit; what elisa_accept takes. */
static const char * const elisa_weakness_names[] = {
	"l1tf", "buffers", "returns", "microcode", "siblings",
};

#define ELISA_ALL_WEAKNESSES	GENMASK(ARRAY_SIZE(elisa_weakness_names) - 1, 0)

static u32 elisa_accepted;

/* Names of weaknesses into a buffer of this size, with commas in between; returns the length. */
static int elisa_print_weaknesses(char *buffer, size_t size, u32 weaknesses)
{
	int i, length = 0;

	*buffer = 0;
	for (i = 0; i < ARRAY_SIZE(elisa_weakness_names); i++)
		if (weaknesses & BIT(i))
			length += scnprintf(buffer + length, size - length, "%s%s",
					    length ? "," : "", elisa_weakness_names[i]);
	return length;
}

static int elisa_set_accept(const char *value, const struct kernel_param *param)
{
	char *copy = kstrdup(value, GFP_KERNEL);
	char *rest, *name;
	u32 accepted = 0;
	int i, r = 0;

	if (!copy)
		return -ENOMEM;
	rest = strim(copy);
	while (r >= 0 && (name = strsep(&rest, ","))) {
		if (!*name)
			continue;
		if (!strcmp(name, "all")) {
			accepted = ELISA_ALL_WEAKNESSES;
			continue;
		}
		r = -EINVAL;
		for (i = 0; i < ARRAY_SIZE(elisa_weakness_names); i++) {
			if (strcmp(name, elisa_weakness_names[i]))
				continue;
			accepted |= BIT(i);
			r = 0;
		}
	}
	kfree(copy);
	if (r < 0)
		return r;
	WRITE_ONCE(elisa_accepted, accepted);
	return 0;
}

static int elisa_get_accept(char *buffer, const struct kernel_param *param)
{
	u32 accepted = READ_ONCE(elisa_accepted);
	int length;

	if (accepted == ELISA_ALL_WEAKNESSES)
		return sysfs_emit(buffer, "all\n");
	length = elisa_print_weaknesses(buffer, PAGE_SIZE - 1, accepted);
	return length + scnprintf(buffer + length, PAGE_SIZE - length, "\n");
}

static const struct kernel_param_ops elisa_accept_ops = {
	.set = elisa_set_accept,
	.get = elisa_get_accept,
};
module_param_cb(elisa_accept, &elisa_accept_ops, NULL, 0644);

static u64 elisa_arch_capabilities(void)
{
	u64 capabilities = 0;

	if (boot_cpu_has(X86_FEATURE_ARCH_CAPABILITIES))
		rdmsrl_safe(MSR_IA32_ARCH_CAPABILITIES, &capabilities);
	return capabilities;
}

/*
 * Data of others stays in buffers of the processor, and a guest can read it.  It takes transactions
 * to do so by TAA, and guests with contexts have none.
 */
static bool elisa_buffers_leak(void)
{
	return boot_cpu_has_bug(X86_BUG_MDS) || boot_cpu_has_bug(X86_BUG_MMIO_STALE_DATA) ||
#ifdef X86_BUG_MMIO_UNKNOWN
	       boot_cpu_has_bug(X86_BUG_MMIO_UNKNOWN) ||
#endif
	       boot_cpu_has_bug(X86_BUG_RFDS);
}

/* VERW overwrites all buffers that leak: the kernel's own conditions, of arch/x86/kernel/cpu/bugs.c. */
static bool elisa_verw_clears(u64 capabilities)
{
	bool md_clear = boot_cpu_has(X86_FEATURE_MD_CLEAR);

	if (boot_cpu_has_bug(X86_BUG_MDS) && !md_clear)
		return false;
	if (boot_cpu_has_bug(X86_BUG_MMIO_STALE_DATA) && !(capabilities & ARCH_CAP_FB_CLEAR) &&
	    !(md_clear && boot_cpu_has(X86_FEATURE_FLUSH_L1D) && !(capabilities & ARCH_CAP_MDS_NO)))
		return false;
#ifdef X86_BUG_MMIO_UNKNOWN
	if (boot_cpu_has_bug(X86_BUG_MMIO_UNKNOWN) && !md_clear)
		return false;
#endif
	return !boot_cpu_has_bug(X86_BUG_RFDS) || (capabilities & ARCH_CAP_RFDS_CLEAR);
}

/*
 * A return can go where the guest trained an indirect branch to go.  "Enhanced IBRS" parts guests
 * from the host, not a context from its guest.
 */
static bool elisa_returns_stray(u64 capabilities)
{
	return boot_cpu_has_bug(X86_BUG_RETBLEED) || (capabilities & ARCH_CAP_RRSBA) ||
#ifdef X86_BUG_ITS
	       boot_cpu_has_bug(X86_BUG_ITS);
#else
	       false;
#endif
}

u32 vmx_elisa_weaknesses(void)
{
	u64 capabilities = elisa_arch_capabilities();
	u32 present = 0;

	if (boot_cpu_has_bug(X86_BUG_L1TF))
		present |= KVM_ELISA_L1TF;
	if (elisa_buffers_leak()) {
		present |= KVM_ELISA_BUFFERS;
		if (!elisa_verw_clears(capabilities))
			present |= KVM_ELISA_MICROCODE;
	}
	if (elisa_returns_stray(capabilities))
		present |= KVM_ELISA_RETURNS;
	/* Nobody clears anything between two threads that run at once. */
	if ((present & (KVM_ELISA_L1TF | KVM_ELISA_BUFFERS)) && sched_smt_active())
		present |= KVM_ELISA_SIBLINGS;
	return present;
}

/*
 * Whether this processor isolates contexts whose own code answers some weaknesses.  Threads can be
 * switched on later, and what is accepted can change: to be asked for every context.
 */
int elisa_check_weaknesses(u32 answered)
{
	u32 accepted = READ_ONCE(elisa_accepted);
	u32 left = vmx_elisa_weaknesses() & ~accepted & ~answered;
	char names[64];

	/* Who accepts that buffers leak does not ask what would clear them. */
	if (accepted & KVM_ELISA_BUFFERS)
		left &= ~KVM_ELISA_MICROCODE;
	if (!left)
		return 0;
	elisa_print_weaknesses(names, sizeof(names), left);
	pr_info_ratelimited("kvm_intel: no contexts, because they would not be isolated on a processor with: %s (parameter elisa_accept)\n",
			    names);
	return -EACCES;
}
