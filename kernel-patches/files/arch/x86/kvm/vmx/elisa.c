// SPDX-License-Identifier: GPL-2.0-only
/*
 * ELISA: what a vCPU does with the contexts in its EPTP list.
 *
 * While a vCPU is outside its default context, KVM neither emulates for it, nor touches its
 * memory, nor delivers events to it: exits that would need that are handed to user space as
 * KVM_EXIT_ELISA, and events wait for the return.  To learn of the return KVM empties slot 0, so
 * that the VMFUNC that returns exits, once.
 *
 * VMFUNC works only while the vCPU is in the mode that contexts are built for, and while no
 * descriptor table lies where a context maps memory: both are decided here, in one place.
 */
#include <linux/kvm_host.h>
#include <linux/mm.h>
#include <linux/smp.h>
#include <linux/wait.h>
#include <asm/fpu/api.h>
#include <uapi/linux/kvm_elisa.h>

#include "capabilities.h"
#include "elisa.h"
#include "trace.h"
#include "vmx.h"
#include "vmx_ops.h"
#include "x86.h"

struct vmx_elisa *elisa_vcpu_state(struct kvm_vcpu *vcpu)
{
	struct vcpu_vmx *vmx = to_vmx(vcpu);
	struct vmx_elisa *e;

	mutex_lock(&vcpu->kvm->arch.elisa.lock);
	e = vmx->elisa;
	if (e)
		goto out;
	e = kvzalloc(sizeof(*e), GFP_KERNEL_ACCOUNT);
	if (!e)
		goto out;
	e->list_page = alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO);
	if (!e->list_page) {
		kvfree(e);
		e = NULL;
		goto out;
	}
	e->list = page_address(e->list_page);
	mutex_init(&e->lock);
	init_waitqueue_head(&e->settled);
	/* Pairs with the readers on the vCPU's own path, which take no lock. */
	smp_store_release(&vmx->elisa, e);
out:
	mutex_unlock(&vcpu->kvm->arch.elisa.lock);
	return e;
}

/* The VMCS is gone already: nothing can enter the contexts through this vCPU any more. */
void vmx_elisa_free_vcpu(struct kvm_vcpu *vcpu)
{
	struct vcpu_vmx *vmx = to_vmx(vcpu);
	struct vmx_elisa *e = vmx->elisa;
	int i;

	if (!e)
		return;
	vmx->elisa = NULL;
	for (i = KVM_ELISA_SLOT_FIRST; i < KVM_ELISA_SLOTS; i++) {
		if (e->slots[i].ctx)
			elisa_context_put(e->slots[i].ctx);
		if (e->slots[i].revoked)
			elisa_context_put(e->slots[i].revoked);
	}
	put_page(e->list_page);
	kvfree(e);
}

/* ---- where the vCPU is ---- */

/* The processor itself writes the active EPTP into the VMCS at every switch. */
static bool elisa_outside(struct vmx_elisa *e)
{
	return e->enabled && vmcs_read64(EPT_POINTER) != e->default_eptp;
}

bool __vmx_elisa_outside(struct kvm_vcpu *vcpu)
{
	return !is_guest_mode(vcpu) && elisa_outside(to_vmx(vcpu)->elisa);
}

static bool elisa_is_in(const struct elisa_context *ctx, u64 eptp, u32 *at)
{
	u32 i;

	if (!ctx)
		return false;
	*at = KVM_ELISA_AT_GATE;
	if (ctx->eptp == eptp)
		return true;
	*at = KVM_ELISA_AT_SUB;
	for (i = 0; i < ctx->nr_targets; i++)
		if (ctx->targets[i]->eptp == eptp)
			return true;
	return false;
}

/* The slot whose gate, or whose gate's sub context, has this EPTP; 0 if none. */
static u32 elisa_find_slot(struct vmx_elisa *e, u64 eptp, bool revoked, u32 *at)
{
	u32 i;

	lockdep_assert_held(&e->lock);
	for (i = KVM_ELISA_SLOT_FIRST; i < KVM_ELISA_SLOTS; i++)
		if (elisa_is_in(revoked ? e->slots[i].revoked : e->slots[i].ctx, eptp, at))
			return i;
	*at = KVM_ELISA_AT_SUB;
	return 0;
}

/*
 * A new default root goes into slot 0 at once, and into the VMCS only if the vCPU is in its
 * default context.  Returns true if the VMCS must be left alone.
 */
bool vmx_elisa_load_eptp(struct kvm_vcpu *vcpu, u64 eptp)
{
	struct vmx_elisa *e = READ_ONCE(to_vmx(vcpu)->elisa);
	bool outside;

	if (likely(!e || !e->enabled) || is_guest_mode(vcpu))
		return false;
	outside = elisa_outside(e);
	e->default_eptp = eptp;
	if (!e->armed)
		WRITE_ONCE(e->list[KVM_ELISA_SLOT_DEFAULT], eptp);
	return outside;
}

static void elisa_go_home(struct kvm_vcpu *vcpu, struct vmx_elisa *e)
{
	vmcs_write64(EPT_POINTER, e->default_eptp);
	WRITE_ONCE(e->list[KVM_ELISA_SLOT_DEFAULT], e->default_eptp);
	/* I1: however the vCPU came home, nothing is left for a VMFUNC of the guest's own. */
	WRITE_ONCE(e->list[KVM_ELISA_SLOT_TRANSIENT], 0);
	e->armed = false;
	/* Whatever has waited. */
	kvm_make_request(KVM_REQ_EVENT, vcpu);
}

/* INIT puts a vCPU into its default context, wherever it was. */
void __vmx_elisa_reset(struct kvm_vcpu *vcpu)
{
	struct vmx_elisa *e = to_vmx(vcpu)->elisa;

	if (!e->enabled)
		return;
	elisa_go_home(vcpu, e);
}

/* ---- when VMFUNC works ---- */

struct elisa_tables {
	u64 base[4];
	u32 limit[4];
	int n;
};

static bool elisa_overlaps(const struct elisa_context *ctx, u64 base, u32 limit)
{
	u64 last = base + limit;

	if (last < base)		/* wraps: two pieces */
		return base <= ctx->last || ctx->gva <= last;
	return base <= ctx->last && ctx->gva <= last;
}

/* What the processor reads by itself when it delivers an event: all of it guest virtual. */
static void elisa_read_tables(struct elisa_tables *t)
{
	t->n = 0;
	t->base[t->n] = vmcs_readl(GUEST_IDTR_BASE);
	t->limit[t->n++] = vmcs_read32(GUEST_IDTR_LIMIT);
	t->base[t->n] = vmcs_readl(GUEST_GDTR_BASE);
	t->limit[t->n++] = vmcs_read32(GUEST_GDTR_LIMIT);
	t->base[t->n] = vmcs_readl(GUEST_TR_BASE);
	t->limit[t->n++] = vmcs_read32(GUEST_TR_LIMIT);
	if (vmcs_read32(GUEST_LDTR_AR_BYTES) & VMX_AR_UNUSABLE_MASK)
		return;
	t->base[t->n] = vmcs_readl(GUEST_LDTR_BASE);
	t->limit[t->n++] = vmcs_read32(GUEST_LDTR_LIMIT);
}

static bool elisa_is_safe(const struct elisa_context *ctx, const struct elisa_tables *t, bool la57)
{
	int i;

	for (i = 0; i < t->n; i++)
		if (elisa_overlaps(ctx, t->base[i], t->limit[i]))
			return false;
	return ctx->la57 == la57;
}

static bool elisa_may_switch(struct kvm_vcpu *vcpu, struct vmx_elisa *e)
{
	bool la57 = kvm_read_cr4_bits(vcpu, X86_CR4_LA57);
	struct elisa_tables tables;
	u32 i, j;

	/* Long mode only: elsewhere the VMCS need not hold what the guest loaded. */
	if (!is_long_mode(vcpu) || !is_paging(vcpu) || !is_pae(vcpu) ||
	    !kvm_read_cr4_bits(vcpu, X86_CR4_SMAP))
		return false;
	elisa_read_tables(&tables);
	for (i = KVM_ELISA_SLOT_FIRST; i < KVM_ELISA_SLOTS; i++) {
		const struct elisa_context *ctx = e->slots[i].ctx;

		if (!ctx)
			continue;
		if (!elisa_is_safe(ctx, &tables, la57))
			return false;
		for (j = 0; j < ctx->nr_targets; j++)
			if (!elisa_is_safe(ctx->targets[j], &tables, la57))
				return false;
	}
	return true;
}

/*
 * The only place that turns VMFUNC on or off.  Descriptor-table exiting lets KVM see every load,
 * so that whatever changes the answer leads here.
 */
static void elisa_update(struct kvm_vcpu *vcpu, struct vmx_elisa *e)
{
	struct vcpu_vmx *vmx = to_vmx(vcpu);

	lockdep_assert_held(&e->lock);
	if (!e->enabled || is_guest_mode(vcpu))
		return;
	secondary_exec_controls_setbit(vmx, SECONDARY_EXEC_DESC);
	if (elisa_may_switch(vcpu, e))
		secondary_exec_controls_setbit(vmx, SECONDARY_EXEC_ENABLE_VMFUNC);
	else
		secondary_exec_controls_clearbit(vmx, SECONDARY_EXEC_ENABLE_VMFUNC);
}

void __vmx_elisa_mode_changed(struct kvm_vcpu *vcpu)
{
	struct vmx_elisa *e = to_vmx(vcpu)->elisa;

	mutex_lock(&e->lock);
	elisa_update(vcpu, e);
	mutex_unlock(&e->lock);
}

/* ---- the list ---- */

static void elisa_enable(struct kvm_vcpu *vcpu, struct vmx_elisa *e)
{
	/* The root may not be loaded yet; vmx_elisa_load_eptp() sees it when it is. */
	e->default_eptp = vmcs_read64(EPT_POINTER);
	e->list[KVM_ELISA_SLOT_DEFAULT] = e->default_eptp;
	vmcs_write64(EPTP_LIST_ADDRESS, page_to_phys(e->list_page));
	vmcs_write64(VM_FUNCTION_CONTROL, VMX_VMFUNC_EPTP_SWITCHING);
	e->enabled = true;
}

/* A gate that writes to another vCPU's list would open a transient slot there, at any time. */
static bool elisa_maps_other_list(const struct vmx_elisa *e, const struct elisa_context *ctx)
{
	return ctx->list_page && ctx->list_page != e->list_page;
}

/* One list serves one paging mode: a gate goes where its sub context can follow. */
static bool elisa_fits(struct vmx_elisa *e, const struct elisa_context *ctx, u32 slot)
{
	u32 i;

	if (elisa_maps_other_list(e, ctx))
		return false;
	for (i = 0; i < ctx->nr_targets; i++)
		if (ctx->targets[i]->la57 != ctx->la57 ||
		    elisa_maps_other_list(e, ctx->targets[i]))
			return false;
	for (i = KVM_ELISA_SLOT_FIRST; i < KVM_ELISA_SLOTS; i++)
		if (i != slot && e->slots[i].ctx && e->slots[i].ctx->la57 != ctx->la57)
			return false;
	return true;
}

static void elisa_settle(struct kvm_vcpu *vcpu, struct vmx_elisa *e, bool in_run);

static int elisa_store_slot(struct kvm_vcpu *vcpu, struct vmx_elisa *e, u32 slot,
			    struct elisa_context *ctx)
{
	struct elisa_context *old;

	lockdep_assert_held(&e->lock);
	elisa_settle(vcpu, e, false);
	/* A vCPU that stopped inside a context still uses it: run it until it is back. */
	if (elisa_outside(e))
		return -EBUSY;
	if (ctx && !elisa_fits(e, ctx, slot))
		return -EINVAL;

	old = e->slots[slot].ctx;
	e->slots[slot].ctx = ctx;
	if (!e->enabled)
		elisa_enable(vcpu, e);
	WRITE_ONCE(e->list[slot], ctx ? ctx->eptp : 0);
	WRITE_ONCE(e->list[KVM_ELISA_SLOT_TRANSIENT], 0);
	elisa_update(vcpu, e);

	if (old) {
		trace_kvm_elisa_detach(vcpu->vcpu_id, slot);
		elisa_context_put(old);
	}
	if (ctx)
		trace_kvm_elisa_attach(vcpu->vcpu_id, slot, ctx->gva, ctx->last, ctx->counted);
	return 0;
}

/* Called by the owner: the guest is not running. */
int vmx_elisa_set_slot(struct kvm_vcpu *vcpu, void __user *argp)
{
	struct elisa_context *ctx = NULL;
	struct kvm_elisa_slot arg;
	struct vmx_elisa *e;
	int r;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	if (!vmx_elisa_version())
		return -EOPNOTSUPP;
	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (!vcpu->kvm->arch.elisa.contexts)
		return -EINVAL;
	if (arg.slot < KVM_ELISA_SLOT_FIRST || arg.slot >= KVM_ELISA_SLOTS || arg.fd < -1)
		return -EINVAL;
	/* vmcs02 would be changed in place of vmcs01; nested guests never get contexts. */
	if (is_guest_mode(vcpu))
		return -EBUSY;

	e = elisa_vcpu_state(vcpu);
	if (!e)
		return -ENOMEM;
	if (arg.fd >= 0) {
		ctx = elisa_context_get_fd(vcpu->kvm, arg.fd);
		if (IS_ERR(ctx))
			return PTR_ERR(ctx);
	}
	mutex_lock(&e->lock);
	r = elisa_store_slot(vcpu, e, arg.slot, ctx);
	mutex_unlock(&e->lock);
	if (r && ctx)
		elisa_context_put(ctx);
	return r;
}

/* ---- events ---- */

/*
 * Before KVM looks at pending events: outside the default context they all wait, INIT and SMI
 * included.  No interrupt window helps to wait, because it may open at once; the return does.
 */
int vmx_elisa_hold_events(struct kvm_vcpu *vcpu)
{
	struct vmx_elisa *e = to_vmx(vcpu)->elisa;

	if (!vmx_elisa_outside(vcpu))
		return 0;
	if (!e->armed) {
		e->armed = true;
		WRITE_ONCE(e->list[KVM_ELISA_SLOT_DEFAULT], 0);
		++vcpu->stat.elisa_held;
	}
	return 1;
}

/*
 * Nothing is injected outside.  So if the vCPU was entered there (armed), what was queued is
 * queued still; if it went there by itself, what was injected at the last entry has been
 * delivered.  Either way an event that the exit interrupted is one that the code in the context
 * raised, not an interrupt or NMI: forget it, the instruction will raise it again.
 */
bool __vmx_elisa_keep_events(struct kvm_vcpu *vcpu)
{
	struct vmx_elisa *e = to_vmx(vcpu)->elisa;

	if (e->armed)
		return true;
	if (!__vmx_elisa_outside(vcpu))
		return false;
	vcpu->arch.nmi_injected = false;
	kvm_clear_exception_queue(vcpu);
	kvm_clear_interrupt_queue(vcpu);
	return true;
}

/* ---- leaving a context for good ---- */

/*
 * What the context had in registers is the object's, not the guest's: where it stood, what it had
 * compared and what it had tried to read tell of what the object holds.
 */
static void elisa_clear_registers(struct kvm_vcpu *vcpu, bool in_run)
{
	struct fpu_guest *fpu = &vcpu->arch.guest_fpu;
	int i;

	for (i = VCPU_REGS_RAX; i <= VCPU_REGS_R15; i++)
		kvm_register_write_raw(vcpu, i, 0);
	kvm_rip_write(vcpu, 0);
	/* Trusted code cannot have changed the flags that are kept. */
	kvm_set_rflags(vcpu, X86_EFLAGS_FIXED |
		       (kvm_get_rflags(vcpu) & (X86_EFLAGS_IF | X86_EFLAGS_IOPL)));
	vcpu->arch.cr2 = 0;
	vcpu->arch.dr6 = DR6_ACTIVE_LOW;
	vmcs_writel(GUEST_PENDING_DBG_EXCEPTIONS, 0);
	vmx_set_interrupt_shadow(vcpu, 0);

	if (in_run)
		fpu_swap_kvm_fpstate(fpu, false);
	if (boot_cpu_has(X86_FEATURE_XSAVE)) {
		/* XRSTOR gives initial values to components that the header does not name. */
		fpu->fpstate->regs.xsave.header.xfeatures = 0;
	} else {
		memset(fpu->fpstate->regs.fxsave.st_space, 0,
		       sizeof(fpu->fpstate->regs.fxsave.st_space));
		memset(fpu->fpstate->regs.fxsave.xmm_space, 0,
		       sizeof(fpu->fpstate->regs.fxsave.xmm_space));
	}
	if (in_run)
		fpu_swap_kvm_fpstate(fpu, true);
}

/* ---- exits ---- */

/* Exits that KVM serves without the guest's memory or instructions. */
static bool elisa_exit_is_harmless(struct kvm_vcpu *vcpu)
{
	switch (to_vmx(vcpu)->exit_reason.basic) {
	case EXIT_REASON_EXTERNAL_INTERRUPT:
	case EXIT_REASON_INTERRUPT_WINDOW:
	case EXIT_REASON_NMI_WINDOW:
	case EXIT_REASON_PREEMPTION_TIMER:
	case EXIT_REASON_PAUSE_INSTRUCTION:
	case EXIT_REASON_MCE_DURING_VMENTRY:
	case EXIT_REASON_PML_FULL:
	case EXIT_REASON_BUS_LOCK:
	case EXIT_REASON_NOTIFY:
		return true;
	case EXIT_REASON_EXCEPTION_NMI: {
		u32 info = vmx_get_intr_info(vcpu);

		return is_nmi(info) || is_machine_check(info);
	}
	default:
		return false;
	}
}

/* The return that slot 0 was emptied for. */
static bool elisa_is_return(struct kvm_vcpu *vcpu, struct vmx_elisa *e)
{
	return e->armed && to_vmx(vcpu)->exit_reason.basic == EXIT_REASON_VMFUNC &&
	       !(u32)kvm_rax_read(vcpu) && !(u32)kvm_rcx_read(vcpu);
}

static struct kvm_elisa_exit elisa_describe(struct kvm_vcpu *vcpu, struct vmx_elisa *e,
					    bool outside)
{
	struct kvm_elisa_exit x = { .at = KVM_ELISA_AT_DEFAULT };
	u16 reason = to_vmx(vcpu)->exit_reason.basic;

	if (outside) {
		mutex_lock(&e->lock);
		x.slot = elisa_find_slot(e, vmcs_read64(EPT_POINTER), false, &x.at);
		if (!x.slot)
			x.slot = elisa_find_slot(e, vmcs_read64(EPT_POINTER), true, &x.at);
		mutex_unlock(&e->lock);
	}
	x.vmx_exit_reason = reason;
	x.qualification = vmx_get_exit_qual(vcpu);
	x.rip = kvm_rip_read(vcpu);

	switch (reason) {
	case EXIT_REASON_EPT_VIOLATION:
	case EXIT_REASON_EPT_MISCONFIG:
		x.cause = reason == EXIT_REASON_EPT_VIOLATION ? KVM_ELISA_EXIT_VIOLATION :
								KVM_ELISA_EXIT_MISCONFIG;
		x.gpa = vmcs_read64(GUEST_PHYSICAL_ADDRESS);
		x.gva = vmcs_readl(GUEST_LINEAR_ADDRESS);
		break;
	case EXIT_REASON_VMFUNC:
		x.cause = KVM_ELISA_EXIT_VMFUNC;
		x.function = (u32)kvm_rax_read(vcpu);
		x.index = (u32)kvm_rcx_read(vcpu);
		++vcpu->stat.elisa_bad_vmfunc;
		break;
	default:
		x.cause = KVM_ELISA_EXIT_REFUSED;
	}
	trace_kvm_elisa_violation(vcpu->vcpu_id, &x);
	return x;
}

/*
 * A process of the guest must not be able to stop its VM: it gets an exception, and its kernel
 * decides.  Where trusted code may have run, nothing of that is left.
 */
static void elisa_eject(struct kvm_vcpu *vcpu, struct vmx_elisa *e, bool outside)
{
	if (outside) {
		elisa_go_home(vcpu, e);
		elisa_clear_registers(vcpu, true);
	}
	kvm_queue_exception(vcpu, UD_VECTOR);
	++vcpu->stat.elisa_ejected;
}

/* Returns true if the exit is dealt with; *ret is then for KVM_RUN's loop. */
bool vmx_elisa_handle_exit(struct kvm_vcpu *vcpu, int *ret)
{
	struct vcpu_vmx *vmx = to_vmx(vcpu);
	struct vmx_elisa *e = vmx->elisa;
	struct kvm_elisa_exit x;
	bool outside;

	if (likely(!e || !e->enabled) || is_guest_mode(vcpu))
		return false;
	outside = elisa_outside(e);
	if (unlikely(vmx->fail) ||
	    (unlikely(vmx->exit_reason.failed_vmentry) && !vmx->emulation_required))
		return false;
	if (outside && elisa_is_return(vcpu, e)) {
		elisa_go_home(vcpu, e);
		++vcpu->stat.elisa_returns;
		*ret = kvm_skip_emulated_instruction(vcpu);
		return true;
	}
	if (outside ? (elisa_exit_is_harmless(vcpu) && !vmx->emulation_required) :
		      vmx->exit_reason.basic != EXIT_REASON_VMFUNC)
		return false;
	x = elisa_describe(vcpu, e, outside);
	if (vmx_get_cpl(vcpu)) {
		elisa_eject(vcpu, e, outside);
		*ret = 1;
		return true;
	}
	if (outside)
		++vcpu->stat.elisa_exits;
	vcpu->run->exit_reason = KVM_EXIT_ELISA;
	vcpu->run->elisa = x;
	*ret = 0;
	return true;
}

/*
 * Calls that set the state of a vCPU are refused while it is outside: it would go on in the object,
 * at an address and with registers that may be the guest's choice.
 */
int vmx_elisa_refuses(struct kvm_vcpu *vcpu, unsigned int ioctl)
{
	if (!vmx_elisa_outside(vcpu))
		return 0;
	switch (ioctl) {
	case KVM_SET_REGS:
	case KVM_SET_SREGS:
	case KVM_SET_SREGS2:
	case KVM_SET_FPU:
	case KVM_SET_XSAVE:
	case KVM_SET_XCRS:
	case KVM_SET_MSRS:
	case KVM_SET_DEBUGREGS:
	case KVM_SET_VCPU_EVENTS:
	case KVM_SET_NESTED_STATE:
	case KVM_SET_CPUID:
	case KVM_SET_CPUID2:
		return 1;
	default:
		return 0;
	}
}

/* ---- revocation ---- */

/*
 * The owner's part of revocations: leave what has been revoked, then drop it.  A context that is
 * still installed in another slot stays the vCPU's.
 */
static void elisa_settle(struct kvm_vcpu *vcpu, struct vmx_elisa *e, bool in_run)
{
	u64 eptp, transient;
	u32 i, slot, at;

	lockdep_assert_held(&e->lock);
	if (!e->nr_revoked)
		return;

	eptp = vmcs_read64(EPT_POINTER);
	if (elisa_outside(e) && !elisa_find_slot(e, eptp, false, &at)) {
		slot = elisa_find_slot(e, eptp, true, &at);
		memset(&e->exit, 0, sizeof(e->exit));
		e->exit.cause = KVM_ELISA_EXIT_REVOKED;
		e->exit.at = at;
		e->exit.slot = slot;
		e->exit.rip = kvm_rip_read(vcpu);
		e->report = true;
		elisa_go_home(vcpu, e);
		elisa_clear_registers(vcpu, in_run);
	}
	/* A gate of another slot, in which the vCPU still is, may have been behind its store. */
	transient = READ_ONCE(e->list[KVM_ELISA_SLOT_TRANSIENT]);
	if (!elisa_outside(e) || !elisa_find_slot(e, transient, false, &at))
		WRITE_ONCE(e->list[KVM_ELISA_SLOT_TRANSIENT], 0);
	elisa_update(vcpu, e);

	for (i = KVM_ELISA_SLOT_FIRST; i < KVM_ELISA_SLOTS; i++) {
		if (!e->slots[i].revoked)
			continue;
		elisa_context_put(e->slots[i].revoked);
		e->slots[i].revoked = NULL;
	}
	WRITE_ONCE(e->nr_revoked, 0);
	wake_up_all(&e->settled);
}

/* KVM_REQ_ELISA_REVOKED, in KVM_RUN. Returns 0 if user space has to know. */
int vmx_elisa_revoked(struct kvm_vcpu *vcpu)
{
	struct vmx_elisa *e = to_vmx(vcpu)->elisa;

	mutex_lock(&e->lock);
	elisa_settle(vcpu, e, true);
	mutex_unlock(&e->lock);
	if (!e->report)
		return 1;
	e->report = false;
	vcpu->run->exit_reason = KVM_EXIT_ELISA;
	vcpu->run->elisa = e->exit;
	return 0;
}

static bool elisa_try_settle(struct kvm_vcpu *vcpu, struct vmx_elisa *e)
{
	if (!mutex_trylock(&vcpu->mutex))
		return false;
	vcpu_load(vcpu);
	mutex_lock(&e->lock);
	elisa_settle(vcpu, e, false);
	mutex_unlock(&e->lock);
	vcpu_put(vcpu);
	mutex_unlock(&vcpu->mutex);
	return true;
}

static void elisa_ack(void *unused)
{
}

/* Take contexts out of the list. Returns how many. */
static u32 elisa_set_aside(struct kvm_vcpu *vcpu, struct vmx_elisa *e, u32 first, u32 last)
{
	u32 i, n = 0;

	mutex_lock(&e->lock);
	for (i = first; i <= last; i++) {
		if (!e->slots[i].ctx)
			continue;
		/* Free: whoever fills a slot has settled earlier revocations. */
		WRITE_ONCE(e->list[i], 0);
		e->slots[i].revoked = e->slots[i].ctx;
		e->slots[i].ctx = NULL;
		trace_kvm_elisa_revoke(vcpu->vcpu_id, i);
		n++;
	}
	vcpu->stat.elisa_revoked += n;
	WRITE_ONCE(e->nr_revoked, e->nr_revoked + n);
	mutex_unlock(&e->lock);
	return n;
}

int vmx_elisa_revoke(struct kvm *kvm, void __user *argp)
{
	struct kvm_elisa_revoke arg;
	struct kvm_vcpu *vcpu;
	struct vmx_elisa *e;
	u32 first, last;
	int cpu;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	if (copy_from_user(&arg, argp, sizeof(arg)))
		return -EFAULT;
	if (!kvm->arch.elisa.contexts || arg.slot == KVM_ELISA_SLOT_TRANSIENT ||
	    arg.slot >= KVM_ELISA_SLOTS || arg.vcpu > INT_MAX)
		return -EINVAL;
	vcpu = kvm_get_vcpu_by_id(kvm, arg.vcpu);
	if (!vcpu)
		return -ENOENT;
	/* Pairs with the release in elisa_vcpu_state(): this is not the vCPU's own path. */
	e = smp_load_acquire(&to_vmx(vcpu)->elisa);
	if (!e)
		return -ENOENT;

	first = arg.slot ?: KVM_ELISA_SLOT_FIRST;
	last = arg.slot ?: KVM_ELISA_SLOTS - 1;
	if (!elisa_set_aside(vcpu, e, first, last))
		return -ENOENT;

	/*
	 * From here on no entry into the guest passes without the request being served, and a CPU
	 * that has served an interrupt is out of the guest.  A vCPU that moves to another CPU
	 * in between enters there anew.
	 */
	kvm_make_request(KVM_REQ_ELISA_REVOKED, vcpu);
	cpu = READ_ONCE(vcpu->cpu);
	if (cpu >= 0)
		smp_call_function_single(cpu, elisa_ack, NULL, true);

	/* Not running: give the pages back now. Halted: let it do so. */
	if (elisa_try_settle(vcpu, e))
		return 0;
	kvm_make_request(KVM_REQ_UNBLOCK, vcpu);
	kvm_vcpu_wake_up(vcpu);
	if (wait_event_killable_timeout(e->settled, !READ_ONCE(e->nr_revoked), HZ / 20) <= 0)
		elisa_try_settle(vcpu, e);
	return 0;
}
