// SPDX-License-Identifier: GPL-2.0-only
/*
 * ELISA: what the processor must have so that there can be contexts, and what a guest of a VM with
 * contexts may have of it.
 */
#include <linux/kvm_host.h>
#include <uapi/linux/kvm_elisa.h>

#include "capabilities.h"
#include "cpuid.h"
#include "elisa.h"
#include "vmx.h"
#include "x86.h"

int vmx_elisa_version(void)
{
	u64 functions;

	if (!enable_ept || !cpu_has_vmx_vmfunc() || !cpu_has_vmx_ept_4levels() ||
	    !cpu_has_vmx_ept_mt_wb())
		return 0;
	if (rdmsrl_safe(MSR_IA32_VMX_VMFUNC, &functions) ||
	    !(functions & VMX_VMFUNC_EPTP_SWITCHING))
		return 0;
	/* With "EPT-violation #VE" a violation in a context would be the guest's exception. */
	if (vmcs_config.cpu_based_2nd_exec_ctrl & BIT(18))
		return 0;
	/* KVM has to see where descriptor tables are put, and guests have to have SMAP. */
	if (!(vmcs_config.cpu_based_2nd_exec_ctrl & SECONDARY_EXEC_DESC) ||
	    !kvm_cpu_cap_has(X86_FEATURE_SMAP))
		return 0;
	/*
	 * A transaction that spans a switch could be rolled back to an address of the guest's
	 * choice without the switch: transactions must not exist, or be possible to turn off.
	 */
	if (boot_cpu_has(X86_FEATURE_RTM) && kvm_find_user_return_msr(MSR_IA32_TSX_CTRL) < 0)
		return 0;
	return KVM_ELISA_VERSION;
}

/* What the guest may set in CR4: all that has been checked together with contexts. */
#define ELISA_CR4_BITS	(X86_CR4_VME | X86_CR4_PVI | X86_CR4_TSD | X86_CR4_DE | X86_CR4_PSE | \
			 X86_CR4_PAE | X86_CR4_MCE | X86_CR4_PGE | X86_CR4_PCE | \
			 X86_CR4_OSFXSR | X86_CR4_OSXMMEXCPT | X86_CR4_UMIP | X86_CR4_LA57 | \
			 X86_CR4_FSGSBASE | X86_CR4_OSXSAVE | X86_CR4_SMEP | X86_CR4_SMAP)

/*
 * What the guest may find in leaf 7: a list of what has been checked, because what comes with new
 * processors has not.  By bit, because not every kernel has a name for each of them.
 */
static const u32 elisa_leaf7[][4] = {
	{
		[CPUID_EAX] = ~0u,	/* the last index */
		/* FSGSBASE, TSC_ADJUST, BMI1, AVX2, FDP_EXCPTN_ONLY, SMEP, BMI2, ERMS */
		[CPUID_EBX] = BIT(0) | BIT(1) | BIT(3) | GENMASK(9, 5) |
		/* ZERO_FCS_FDS, AVX512F, AVX512DQ, RDSEED, ADX, SMAP, AVX512IFMA */
			      BIT(13) | GENMASK(21, 16) |
		/* CLFLUSHOPT, CLWB, AVX512PF, AVX512ER, AVX512CD, SHA_NI, AVX512BW, AVX512VL */
			      BIT(23) | BIT(24) | GENMASK(31, 26),
		/* PREFETCHWT1, AVX512VBMI, UMIP, WAITPKG, AVX512_VBMI2, GFNI, VAES, VPCLMULQDQ */
		[CPUID_ECX] = GENMASK(2, 0) | BIT(5) | BIT(6) | GENMASK(10, 8) |
		/* AVX512_VNNI, AVX512_BITALG, AVX512_VPOPCNTDQ, LA57, RDPID */
			      BIT(11) | BIT(12) | BIT(14) | BIT(16) | BIT(22) |
		/* CLDEMOTE, MOVDIRI, MOVDIR64B */
			      BIT(25) | BIT(27) | BIT(28),
		/* AVX512_4VNNIW, AVX512_4FMAPS, FSRM, AVX512_VP2INTERSECT, MD_CLEAR */
		[CPUID_EDX] = GENMASK(4, 2) | BIT(8) | BIT(10) |
		/* RTM_ALWAYS_ABORT, SERIALIZE, HYBRID_CPU, AMX_BF16, AVX512_FP16, AMX_TILE, AMX_INT8 */
			      BIT(11) | BIT(14) | BIT(15) | GENMASK(25, 22) |
		/* SPEC_CTRL, INTEL_STIBP, FLUSH_L1D, ARCH_CAPABILITIES, SPEC_CTRL_SSBD */
			      GENMASK(29, 26) | BIT(31),
	}, {
		/* SHA512, SM3, SM4, AVX_VNNI, AVX512_BF16, CMPCCXADD, FZRM, FSRS, FSRC */
		[CPUID_EAX] = GENMASK(2, 0) | BIT(4) | BIT(5) | BIT(7) | GENMASK(12, 10) |
		/* AMX_FP16, AVX_IFMA */
			      BIT(21) | BIT(23),
		/* AVX_VNNI_INT8, AVX_NE_CONVERT, AMX_COMPLEX, AVX_VNNI_INT16, PREFETCHITI */
		[CPUID_EDX] = BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(14),
	}, {
		/* PSFD, IPRED_CTRL, RRSBA_CTRL, DDPD_U, BHI_CTRL, MCDT_NO */
		[CPUID_EDX] = GENMASK(5, 0),
	},
};

/* Elsewhere, what the guest may not have. */
static const struct {
	u32 function;
	u32 index;
	int reg;
	u32 bits;
} elisa_unchecked[] = {
	/*
	 * DTES64, DS_CPL, VMX, SMX, PDCM, and PCID: with it MOV to CR3 can keep translations, so
	 * that code in a gate could run although CR3 names what is absent there.
	 */
	{ 1, 0, CPUID_ECX, BIT(2) | BIT(4) | BIT(5) | BIT(6) | BIT(15) | BIT(17) },
	/* DS */
	{ 1, 0, CPUID_EDX, BIT(21) },
	/* The version of the performance counters, which would count what trusted code does. */
	{ 0xa, 0, CPUID_EAX, GENMASK(7, 0) },
	/* State components other than x87, SSE, AVX, MPX, AVX-512, PKRU and AMX: APX, for one. */
	{ 0xd, 0, CPUID_EAX, (u32)~(GENMASK(7, 0) | BIT(9) | BIT(17) | BIT(18)) },
	{ 0xd, 0, CPUID_EDX, ~0u },
};

/* Whether KVM could take the entry for this leaf: it heeds an index only if that is significant. */
static bool elisa_is_leaf(const struct kvm_cpuid_entry2 *entry, u32 function, u32 index)
{
	if (entry->function != function)
		return false;
	return entry->index == index || function != 0xd ||
	       !(entry->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
}

static bool elisa_leaf7_ok(const struct kvm_cpuid_entry2 *entry, const u32 regs[4])
{
	static const u32 nothing[4];
	const u32 *allowed = nothing;
	int i;

	/* Without the flag KVM takes the entry for every index. */
	if ((entry->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) &&
	    entry->index < ARRAY_SIZE(elisa_leaf7))
		allowed = elisa_leaf7[entry->index];
	for (i = CPUID_EAX; i <= CPUID_EDX; i++)
		if (regs[i] & ~allowed[i])
			return false;
	return true;
}

int vmx_elisa_check_cpuid(struct kvm_vcpu *vcpu, struct kvm_cpuid_entry2 *entries, int nent)
{
	int i, j;

	if (likely(!vcpu->kvm->arch.elisa.contexts))
		return 0;
	for (i = 0; i < nent; i++) {
		const u32 regs[] = {
			[CPUID_EAX] = entries[i].eax, [CPUID_EBX] = entries[i].ebx,
			[CPUID_ECX] = entries[i].ecx, [CPUID_EDX] = entries[i].edx,
		};

		if (entries[i].function == 7 && !elisa_leaf7_ok(&entries[i], regs))
			return -EINVAL;
		for (j = 0; j < ARRAY_SIZE(elisa_unchecked); j++)
			if (elisa_is_leaf(&entries[i], elisa_unchecked[j].function,
					  elisa_unchecked[j].index) &&
			    (regs[elisa_unchecked[j].reg] & elisa_unchecked[j].bits))
				return -EINVAL;
	}
	return 0;
}

void vmx_elisa_create_vcpu(struct kvm_vcpu *vcpu)
{
	struct vmx_uret_msr *tsx_ctrl = vmx_find_uret_msr(to_vmx(vcpu), MSR_IA32_TSX_CTRL);

	if (likely(!vcpu->kvm->arch.elisa.contexts))
		return;
	vcpu->arch.cr4_guest_rsvd_bits |= ~ELISA_CR4_BITS;
	if (boot_cpu_has(X86_FEATURE_RTM) && tsx_ctrl)
		tsx_ctrl->data = TSX_CTRL_RTM_DISABLE;
}

void vmx_elisa_after_set_cpuid(struct kvm_vcpu *vcpu)
{
	if (likely(!vcpu->kvm->arch.elisa.contexts))
		return;
	vcpu->arch.cr4_guest_rsvd_bits |= ~ELISA_CR4_BITS;
	/* The secondary controls have been computed anew. */
	vmx_elisa_mode_changed(vcpu);
}
