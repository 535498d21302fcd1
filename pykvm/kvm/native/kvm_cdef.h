/*
 * What cffi is told about <linux/kvm.h>: names of fields, in any order, no layout. Every struct
 * that ends in "...;" gets its offsets and size from the compiler, the others are checked
 * against it. This file is never seen by the C compiler; build_kvm.py reads it.
 */
typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef short __s16;
typedef int __s32;
typedef long long __s64;

/* ---- registers ------------------------------------------------------------------------- */
struct kvm_regs {
	__u64 rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp;
	__u64 r8, r9, r10, r11, r12, r13, r14, r15;
	__u64 rip, rflags;
	...;
};
struct kvm_segment {
	__u64 base;
	__u32 limit;
	__u16 selector;
	__u8 type, present, dpl, db, s, l, g, avl, unusable;
	...;
};
struct kvm_dtable {
	__u64 base;
	__u16 limit;
	...;
};
struct kvm_sregs {
	struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt;
	struct kvm_dtable gdt, idt;
	__u64 cr0, cr2, cr3, cr4, cr8, efer, apic_base;
	__u64 interrupt_bitmap[...];
	...;
};
struct kvm_sregs2 {
	struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt;
	struct kvm_dtable gdt, idt;
	__u64 cr0, cr2, cr3, cr4, cr8, efer, apic_base, flags;
	__u64 pdptrs[...];
	...;
};
struct kvm_fpu {
	__u8 fpr[8][16];
	__u16 fcw, fsw;
	__u8 ftwx;
	__u16 last_opcode;
	__u64 last_ip, last_dp;
	__u8 xmm[16][16];
	__u32 mxcsr;
	...;
};
struct kvm_xcr {
	__u32 xcr;
	__u64 value;
	...;
};
struct kvm_xcrs {
	__u32 nr_xcrs, flags;
	struct kvm_xcr xcrs[...];
	...;
};
struct kvm_xsave {
	__u32 region[...];
	...;
};
struct kvm_debugregs {
	__u64 db[4];
	__u64 dr6, dr7, flags;
	...;
};
struct kvm_vcpu_events {
	struct {
		__u8 injected, nr, has_error_code, pending;
		__u32 error_code;
	} exception;
	struct {
		__u8 injected, nr, soft, shadow;
	} interrupt;
	struct {
		__u8 injected, pending, masked, pad;
	} nmi;
	__u32 sipi_vector, flags;
	struct {
		__u8 smm, pending, smm_inside_nmi, latched_init;
	} smi;
	struct {
		__u8 pending;
	} triple_fault;
	__u8 exception_has_payload;
	__u64 exception_payload;
	...;
};
struct kvm_mp_state {
	__u32 mp_state;
	...;
};
struct kvm_lapic_state {
	char regs[...];
	...;
};
struct kvm_translation {
	__u64 linear_address, physical_address;
	__u8 valid, writeable, usermode;
	...;
};
struct kvm_interrupt {
	__u32 irq;
	...;
};
struct kvm_tpr_access_ctl {
	__u32 enabled, flags;
	...;
};
struct kvm_guest_debug_arch {
	__u64 debugreg[8];
	...;
};
struct kvm_guest_debug {
	__u32 control;
	struct kvm_guest_debug_arch arch;
	...;
};
struct kvm_nested_state {
	__u16 flags, format;
	__u32 size;
	...;
};

/* ---- CPUID and MSRs -------------------------------------------------------------------- */
struct kvm_cpuid_entry2 {
	__u32 function, index, flags, eax, ebx, ecx, edx;
	...;
};
struct kvm_cpuid2 {
	__u32 nent;
	struct kvm_cpuid_entry2 entries[];
	...;
};
struct kvm_msr_entry {
	__u32 index;
	__u64 data;
	...;
};
struct kvm_msrs {
	__u32 nmsrs;
	struct kvm_msr_entry entries[];
	...;
};
struct kvm_msr_list {
	__u32 nmsrs;
	__u32 indices[];
	...;
};
struct kvm_msr_filter_range {
	__u32 flags, nmsrs, base;
	__u8 *bitmap;
	...;
};
struct kvm_msr_filter {
	__u32 flags;
	struct kvm_msr_filter_range ranges[...];
	...;
};
struct kvm_pmu_event_filter {
	__u32 action, nevents, fixed_counter_bitmap, flags;
	__u64 events[];
	...;
};

/* ---- memory ---------------------------------------------------------------------------- */
struct kvm_userspace_memory_region {
	__u32 slot, flags;
	__u64 guest_phys_addr, memory_size, userspace_addr;
	...;
};
struct kvm_dirty_log {
	__u32 slot;
	union {
		void *dirty_bitmap;
		__u64 padding2;
	};
	...;
};
struct kvm_clear_dirty_log {
	__u32 slot, num_pages;
	__u64 first_page;
	union {
		void *dirty_bitmap;
		__u64 padding2;
	};
	...;
};
struct kvm_coalesced_mmio_zone {
	__u64 addr;
	__u32 size;
	union {
		__u32 pad;
		__u32 pio;
	};
	...;
};
struct kvm_coalesced_mmio {
	__u64 phys_addr;
	__u32 len;
	union {
		__u32 pad;
		__u32 pio;
	};
	__u8 data[8];
	...;
};
struct kvm_coalesced_mmio_ring {
	__u32 first, last;
	struct kvm_coalesced_mmio coalesced_mmio[];
	...;
};

/* ---- interrupts, timers, devices ------------------------------------------------------- */
struct kvm_irq_level {
	union {
		__u32 irq;
		__s32 status;
	};
	__u32 level;
	...;
};
struct kvm_irqchip {
	__u32 chip_id;
	union {
		char dummy[512];
	} chip;
	...;
};
struct kvm_irq_routing_irqchip {
	__u32 irqchip, pin;
	...;
};
struct kvm_irq_routing_msi {
	__u32 address_lo, address_hi, data;
	...;
};
struct kvm_irq_routing_entry {
	__u32 gsi, type, flags;
	union {
		__u32 pad[8];	/* cast to the struct that `type` says */
	} u;
	...;
};
struct kvm_irq_routing {
	__u32 nr, flags;
	struct kvm_irq_routing_entry entries[];
	...;
};
struct kvm_msi {
	__u32 address_lo, address_hi, data, flags;
	...;
};
struct kvm_irqfd {
	__u32 fd, gsi, flags, resamplefd;
	...;
};
struct kvm_ioeventfd {
	__u64 datamatch, addr;
	__u32 len;
	__s32 fd;
	__u32 flags;
	...;
};
enum {
	kvm_ioeventfd_flag_nr_datamatch = ...,
	kvm_ioeventfd_flag_nr_pio = ...,
	kvm_ioeventfd_flag_nr_deassign = ...,
};
struct kvm_pit_config {
	__u32 flags;
	...;
};
struct kvm_pit_channel_state {
	__u32 count;
	__u16 latched_count;
	__u8 count_latched, status_latched, status, read_state, write_state, write_latch;
	__u8 rw_mode, mode, bcd, gate;
	__s64 count_load_time;
	...;
};
struct kvm_pit_state2 {
	struct kvm_pit_channel_state channels[3];
	__u32 flags;
	...;
};
struct kvm_reinject_control {
	__u8 pit_reinject;
	...;
};
struct kvm_clock_data {
	__u64 clock;
	__u32 flags;
	__u64 realtime, host_tsc;
	...;
};
struct kvm_enable_cap {
	__u32 cap, flags;
	__u64 args[4];
	...;
};
struct kvm_create_device {
	__u32 type, fd, flags;
	...;
};
struct kvm_device_attr {
	__u32 flags, group;
	__u64 attr, addr;
	...;
};

/* ---- binary statistics ----------------------------------------------------------------- */
struct kvm_stats_header {
	__u32 flags, name_size, num_desc, id_offset, desc_offset, data_offset;
	...;
};
struct kvm_stats_desc {
	__u32 flags;
	__s16 exponent;
	__u16 size;
	__u32 offset, bucket_size;
	char name[];
	...;
};

/* ---- kvm_run --------------------------------------------------------------------------- */
struct kvm_run {
	__u8 request_interrupt_window, immediate_exit;
	__u32 exit_reason;
	__u8 ready_for_interrupt_injection, if_flag;
	__u16 flags;
	__u64 cr8, apic_base;
	...;
};
struct kvm_debug_exit_arch {
	__u32 exception;
	__u64 pc, dr6, dr7;
	...;
};

/* The members of kvm_run's union have no names in C; run_loop.h gives them these. */
typedef struct { __u64 hardware_exit_reason; ...; } kvm_exit_hw;
typedef struct { __u64 hardware_entry_failure_reason; __u32 cpu; ...; } kvm_exit_fail_entry;
typedef struct { __u32 exception, error_code; ...; } kvm_exit_ex;
typedef struct { __u8 direction, size; __u16 port; __u32 count; __u64 data_offset; ...; }
	kvm_exit_io;
typedef struct { struct kvm_debug_exit_arch arch; ...; } kvm_exit_debug;
typedef struct { __u64 phys_addr; __u8 data[8]; __u32 len; __u8 is_write; ...; } kvm_exit_mmio;
typedef struct { __u64 nr; __u64 args[6]; __u64 ret; __u32 longmode; ...; } kvm_exit_hypercall;
typedef struct { __u64 rip; __u32 is_write; ...; } kvm_exit_tpr_access;
typedef struct { __u32 suberror, ndata; __u64 data[16]; ...; } kvm_exit_internal;
typedef struct { __u32 type, ndata; ...; } kvm_exit_system_event;
typedef struct { __u8 vector; ...; } kvm_exit_eoi;
typedef struct { __u8 error; __u32 reason, index; __u64 data; ...; } kvm_exit_msr;
typedef struct { __u32 flags; ...; } kvm_exit_notify;
