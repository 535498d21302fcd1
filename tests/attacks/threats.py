"""Table of threats: attempts of a guest, the defences, and the tests that show both.

`python -m tools.threats_document` writes docs/threats.md from it; test_threats.py checks it against
the tests.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Threat:
    """One row.

    Attributes:
        attacks: tests, as path::function.
        controls: tests, as path::function.
        no_control: reason why there can be none, in place of controls.
        open: what has not been shown yet; a row with it falls short.
        residual: remaining risk.
    """

    row: str
    tries: str
    defence: str
    attacks: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    no_control: str = ""
    open: str = ""
    residual: str = ""


ENTRIES: Final = "tests/attacks/test_entries.py::"
HOME: Final = "tests/attacks/test_taken_home.py::"
TABLES: Final = "tests/attacks/test_page_tables.py::"
EXCEPTIONS: Final = "tests/attacks/test_exceptions.py::"
SEGMENTS: Final = "tests/attacks/test_segments.py::"
STALE: Final = "tests/attacks/test_stale_translations.py::"
OWNERS: Final = "tests/attacks/test_owners.py::"
MEMORY_TYPES: Final = "tests/attacks/test_memory_types.py::"
EXITS: Final = "tests/attacks/test_exits.py::"
STATE: Final = "tests/attacks/test_state.py::"
WINDOWS: Final = "tests/switch/test_hostile_windows.py::"
CALLS: Final = "tests/elisa/test_kernel_calls.py::"
LIFETIME: Final = "tests/elisa/test_lifetime.py::"
ATTACH: Final = "tests/elisa/test_attach.py::"
PROCESSOR: Final = "tests/attacks/test_processor_state.py::"
DYING: Final = "tests/attacks/test_dying_vmms.py::"
USER_MODE: Final = "tests/guest/test_user_mode.py::"
FIRE: Final = "tests/switch/test_under_fire.py::"
BOUNDED: Final = "tests/switch/test_bounded_work.py::"
WEAK: Final = "tests/attacks/test_weakened_"
EVENTS: Final = "tests/elisa/inside/test_events.py::"
FEATURES: Final = "tests/elisa/test_hidden_features.py::"
FIVE_LEVELS: Final = "tests/elisa/test_five_levels.py::"
CONTEXTS: Final = "tests/elisa/test_contexts.py::"
MEMORY: Final = "tests/elisa/test_registered_memory.py::"
TOOLCHAIN: Final = "tests/elisa/test_trusted_images.py::"
WEAK_PROCESSORS: Final = "tests/attacks/test_weak_processors.py::"
SEVERAL: Final = "tests/attacks/test_several_vcpus.py::"
MASKED: Final = "tests/elisa/test_masked_indices.py::"
NOTIFY: Final = "tests/attacks/test_notify_exits.py::"

THREATS: Final[tuple[Threat, ...]] = (
    Threat(
        "T1",
        "`VMFUNC` straight to the transient slot, from any address",
        "I1: the sub entry's first instruction empties the slot; the VMM is told of the attempt",
        (ENTRIES + "test_the_transient_slot_from_anywhere",),
        (ENTRIES + "test_a_slot_that_stays_filled_lets_the_guest_in",),
    ),
    Threat(
        "T2",
        "entering the gate page at any byte, with registers of its choice",
        "I2: from every byte the gate leads to the official sub entry or to a stop",
        (
            "tests/attacks/test_every_byte.py::test_every_byte_of_the_gate",
            "tests/guest/test_crossing.py::test_an_intruder_is_stopped",
            "tests/guest/test_gate.py::test_every_path_is_safe",
        ),
        (ENTRIES + "test_a_sub_context_without_a_gate_is_entered_anywhere",),
        residual="every byte is tried with registers chosen at random; that it holds for all "
        "registers is shown on paper (docs/gate-proof.md)",
    ),
    Threat(
        "T3",
        "entering the gate at its store, with an EPTP of its own in the register stored",
        "I2: the gate compares what the slot holds with the official EPTP, and stops",
        (ENTRIES + "test_a_forged_eptp",),
        (ENTRIES + "test_a_gate_without_its_check_takes_any_eptp",),
        residual="the control tells the guest one host address, as a leak would",
    ),
    Threat(
        "T4",
        "`VMFUNC` with every index 0 to 511 and beyond, and other functions",
        "only slots of attached gates are filled; everything else leaves to the VMM",
        (ENTRIES + "test_every_index_and_other_functions",),
        (ENTRIES + "test_every_index_finds_a_context_that_is_no_gate",),
        residual="that only gates are put into a list is up to the VMM",
    ),
    Threat(
        "T5",
        "CR3 naming a window full of page tables",
        "I3: windows have private GPAs in a sub context, which are absent in its gate",
        (
            TABLES + "test_cr3_names_the_window",
            TABLES + "test_cr3_names_the_window_where_the_sub_context_has_it",
            CONTEXTS + "test_i3_what_a_sub_context_maps_is_absent_in_the_gate",
        ),
        (TABLES + "test_a_window_at_its_own_gpa_holds_page_tables",),
        residual="translations that survive a change of CR3 (PCID): T27",
    ),
    Threat(
        "T6",
        "CR3 naming the gate's or the sub's own pages, so that levels shift",
        "I3: the gate maps its own private pages only, and no walk from those reaches code",
        (
            TABLES + "test_cr3_names_a_page_of_a_context",
            TABLES + "test_cr3_names_the_gates_root",
            CONTEXTS + "test_i3_no_private_page_of_the_gate_read_as_root_reaches_code",
        ),
        (TABLES + "test_a_gate_that_maps_every_gpa_lets_levels_shift",),
    ),
    Threat(
        "T7",
        "LA57, PAE, 32-bit paging or no paging, then `VMFUNC`",
        "I5: VM functions are off in that mode",
        (
            "tests/elisa/test_mode_lock.py::test_modes_without_vmfunc",
            "tests/elisa/test_mode_lock.py::test_without_smap",
            "tests/elisa/test_mode_lock.py::test_a_list_for_five_levels",
            "tests/elisa/inside/test_stopped_inside.py::test_another_mode",
            FIVE_LEVELS + "test_contexts_for_four_levels",
            FIVE_LEVELS + "test_the_guest_cannot_change_them_in_64_bit_mode",
        ),
        (
            WEAK + "modes.py::test_any_mode_reaches_a_context",
            WEAK + "modes.py::test_without_smap_the_object_serves",
            WEAK + "modes.py::test_contexts_for_four_levels_in_five",
        ),
        residual="no emulator enters a guest whose levels of paging are not its host's, so no "
        "vCPU changes between four and five: a guest with five gets contexts for four instead",
    ),
    Threat(
        "T8",
        "compatibility mode, in which the same bytes are other instructions",
        "I5: trusted GVAs lie at or above 4 GiB; the VMM refuses any other crossing base",
        (
            SEGMENTS + "test_compatibility_mode",
            SEGMENTS + "test_compatibility_mode_of_a_process",
            CONTEXTS + "test_a_crossing_area_where_none_can_lie_is_refused",
        ),
        (SEGMENTS + "test_a_gate_below_4_gib_is_other_instructions",),
        residual="the guest's own vCPU stops. The control shows trusted bytes run as instructions "
        "that nobody has checked, a branch among them; this gate's happen to do no harm",
    ),
    Threat(
        "T9",
        "single-stepping or a hardware breakpoint inside trusted code, with IDT, GDT and stack "
        "in a window",
        "KVM intercepts debug exceptions, and serves no exit outside the default context (I7); "
        "I8: VMFUNC does not work while a descriptor table lies in a window",
        (
            "tests/elisa/test_descriptor_tables.py::test_idt_inside",
            "tests/elisa/test_descriptor_tables.py::test_gdt_inside",
            "tests/elisa/test_descriptor_tables.py::test_idt_at_the_edges",
            "tests/elisa/test_descriptor_tables.py::test_segments",
            EXCEPTIONS + "test_a_breakpoint_in_trusted_code",
            EXCEPTIONS + "test_a_breakpoint_with_tables_elsewhere",
            EXCEPTIONS + "test_single_steps",
        ),
        (WEAK + "exceptions.py::test_a_breakpoint_runs_internal_code",),
        residual="the guest's own vCPU stops. The control takes I8, I7 and I6 away together. A "
        "real processor would also refuse descriptor tables in a window by SMAP, whatever "
        "RFLAGS.AC is; the emulators let AC open user pages to the processor's own reads, too",
    ),
    Threat(
        "T10",
        "faults that bad arguments provoke: out of range, wrapping, across the end of the windows, "
        "not canonical, or unaligned with RFLAGS.AC set",
        "objects check arguments; I8: VMFUNC does not work while a descriptor table lies where a "
        "context maps memory, so a fault in trusted code finds no handler and stops the vCPU",
        (
            EXCEPTIONS + "test_indices_out_of_range",
            EXCEPTIONS + "test_a_fault_with_tables_in_the_window",
            EXCEPTIONS + "test_a_fault_with_tables_elsewhere",
            USER_MODE + "test_alignment_checks_of_the_caller_do_not_reach_the_object",
        ),
        (
            EXCEPTIONS + "test_an_object_without_its_check_is_written_through",
            WEAK + "exceptions.py::test_a_fault_runs_internal_code",
            USER_MODE + "test_they_would_without_clearing_the_flag",
        ),
    ),
    Threat(
        "T11",
        "an interrupt, an IPI, an NMI, an SMI or a PV async page fault inside trusted code",
        "I6: KVM injects nothing outside the default context; the return exits, and the event is "
        "delivered there",
        (
            EVENTS + "test_an_event",
            EVENTS + "test_an_interrupt_that_could_be_posted",
            EVENTS + "test_the_timer",
            EVENTS + "test_init",
            EVENTS + "test_many_events_and_calls",
            EVENTS + "test_interrupts_on_with_the_last_instruction",
            "tests/elisa/inside/test_stopped_inside.py::test_an_interrupt_on_its_way",
            "tests/elisa/inside/test_system_management.py::test_a_system_management_interrupt",
        ),
        (
            WEAK + "events.py::test_an_event_runs_internal_code",
            WEAK + "events.py::test_an_event_ends_trusted_code",
            WEAK + "events.py::test_the_processor_delivers_an_interrupt_by_itself",
            WEAK + "events.py::test_init_ends_trusted_code",
            WEAK + "events.py::test_a_system_management_interrupt_saves_the_objects_state",
        ),
        residual="asynchronous page faults are interrupts when a page is there, and need an exit "
        "that KVM serves before (T30)",
    ),
    Threat(
        "T12",
        "changing the window while trusted code reads it",
        "every value is read once (READ_ONCE), then checked, then used",
        (WINDOWS + "test_a_window_that_changes_during_the_call",),
        (WINDOWS + "test_control_a_switch_that_reads_headers_twice",),
    ),
    Threat(
        "T13",
        "lengths, offsets, indices and ring positions out of range or wrapping",
        "every value from a window is masked or checked",
        (WINDOWS + "test_any_window_and_any_arguments",),
        (
            "tests/switch/test_fuzzing.py::test_a_planted_fault_is_found",
            EXCEPTIONS + "test_an_object_without_its_check_is_written_through",
        ),
    ),
    Threat(
        "T14",
        "odd flags, stack pointer, segment bases, MXCSR and x87 state",
        "the gate clears DF; the sub entry takes a stack of its own; the toolchain refuses objects "
        "with instructions that depend on the rest",
        (
            STATE + "test_odd_flags",
            STATE + "test_odd_stack_pointers",
            PROCESSOR + "test_state_that_trusted_code_has_no_use_for",
            TOOLCHAIN + "test_instructions_that_have_no_business_in_an_object",
        ),
        (
            STATE + "test_without_cld_a_copy_runs_backwards",
            STATE + "test_without_a_stack_of_its_own_the_guests_is_written_to",
            PROCESSOR + "test_an_object_that_uses_gs_reads_where_the_guest_says",
            PROCESSOR + "test_an_object_that_computes_rounds_as_the_guest_says",
        ),
    ),
    Threat(
        "T15",
        "reading leftovers from registers after the return",
        "the sub entry page clears every register that the object may have used",
        (STATE + "test_nothing_is_left_in_registers",),
        (STATE + "test_without_clearing_an_eptp_is_left",),
        residual="caches, predictors and time are not cleaned",
    ),
    Threat(
        "T16",
        "writing to table pages, code pages or the EPTP list",
        "I4: tables are read-only, nothing is writable and executable, and the list is mapped in "
        "gate and sub contexts alone",
        (
            ATTACH + "test_access_that_the_sub_context_refuses",
            ATTACH + "test_page_tables_of_a_context_from_outside",
            CONTEXTS + "test_i4_tables_are_read_only_and_nothing_writable_is_executable",
        ),
        (
            TABLES + "test_writable_code_is_rewritten",
            TABLES + "test_writable_tables_are_rewritten",
        ),
        residual="a sub context has to write to its list: an object that writes where its caller "
        "says can fill it",
    ),
    Threat(
        "T17",
        "hardware that writes memory by GVA for the guest: PEBS, BTS, Intel PT, user interrupts",
        "hidden from CPUID and refused by MSR for guests that attach",
        (
            FEATURES + "test_cpuid",
            FEATURES + "test_msrs",
            FEATURES + "test_debug_control_stays_zero",
            FEATURES + "test_features_that_this_processor_has",
            "tests/elisa/test_hidden_features_list.py::test_of_this_kvm",
        ),
        (
            WEAK + "features.py::test_the_guest_sees_it",
            WEAK + "features.py::test_debug_control_is_written",
            WEAK + "features.py::test_the_processor_takes_what_kvm_does_not_know",
        ),
        residual="of this hardware an emulated processor has user interrupts alone: that it is "
        "offered to the guest, and turned on, is all that the control shows",
    ),
    Threat(
        "T18",
        "shadow stacks, FRED, PKS, LAM, nested VMX",
        "hidden from such guests until checked",
        (
            FEATURES + "test_cpuid",
            FEATURES + "test_control_register",
            FEATURES + "test_features_that_this_processor_has",
            FEATURES + "test_no_nested_vmx",
            "tests/elisa/test_hidden_features_list.py::test_each_feature_goes_and_nothing_else_of_leaf_1",
        ),
        (
            WEAK + "features.py::test_the_guest_sees_it",
            WEAK + "features.py::test_the_guest_turns_on_what_the_processor_has",
            WEAK + "features.py::test_the_processor_takes_what_kvm_does_not_know",
            WEAK + "features.py::test_the_guest_may_be_a_hypervisor",
        ),
        residual="no emulated processor has FRED or LAM. The controls turn the others on; what "
        "they would do inside a context is not tried",
    ),
    Threat(
        "T19",
        "stopping or killing a vCPU, or its whole VMM, in the middle of trusted code",
        "nothing in a shared object waits for a particular vCPU",
        (
            WINDOWS + "test_a_vcpu_that_stops_at_any_instruction_harms_nobody",
            WINDOWS + "test_a_vcpu_killed_in_the_middle",
            LIFETIME + "test_killed_inside_the_object",
            "tests/elisa/test_killed_vmms.py::test_vmms_are_killed_and_stopped_at_random",
            FIRE + "test_eight_guests_under_fire",
            "tests/switch/test_death_anywhere.py::test_a_sender_killed_at_every_instruction",
            "tests/switch/test_death_anywhere.py::test_a_receiver_killed_at_every_instruction",
        ),
        (
            WINDOWS + "test_control_a_switch_that_publishes_before_it_copies",
            FIRE + "test_control_a_lock_that_the_dead_keep",
        ),
        residual="objects other than the switch have to keep the rule themselves",
    ),
    Threat(
        "T20",
        "the VMM dying between any two steps of attach, detach and revoke; a fork, an exec, an fd "
        "passed away",
        "I9: files, slots and naming contexts hold references; the last one frees",
        (
            LIFETIME + "test_any_order_of_closing",
            LIFETIME + "test_a_copied_descriptor_keeps_a_context",
            LIFETIME + "test_a_child_closes_last",
            LIFETIME + "test_a_vcpu_closed_inside_the_object",
            DYING + "test_killed_behind_a_step",
            DYING + "test_killed_at_any_moment",
            DYING + "test_exec",
            DYING + "test_a_context_passed_to_another_process",
        ),
        no_control="without the references the host's kernel uses memory that it has freed, and "
        "what follows shows nothing",
    ),
    Threat(
        "T21",
        "attach storms, thousands of contexts, exhausting pinned memory",
        "limits for each VM, pages charged to RLIMIT_MEMLOCK",
        (
            "tests/elisa/test_limits.py::test_contexts",
            "tests/elisa/test_limits.py::test_pages",
            "tests/elisa/test_limits.py::test_locked_memory",
            CALLS + "test_lock_limit",
            MEMORY + "test_locked_memory",
            LIFETIME + "test_many_contexts",
        ),
        (
            WEAK + "limits.py::test_more_contexts_than_the_vm_may_have",
            WEAK + "limits.py::test_more_pages_than_the_vm_may_have",
            WEAK + "limits.py::test_a_storm_of_contexts",
            WEAK + "limits.py::test_memory_that_may_not_be_locked",
        ),
    ),
    Threat(
        "T22",
        "stale translations: detach, let the pages be reused, touch them again",
        "I9: INVEPT on every CPU before the pages are given back, and before the root of a new "
        "context is used, because KVM frees roots of its own without a flush",
        (
            STALE + "test_pages_that_are_somebody_elses_by_now",
            STALE + "test_a_new_context_with_the_root_of_an_old_one",
            STALE + "test_every_processor_flushes_before_pages_go_back",
            "tests/elisa/test_flushes.py::"
            "test_a_context_is_flushed_before_its_first_use_and_after_its_last",
            "tests/elisa/test_two_processors.py::test_both_processors_flush",
            STALE + "test_pages_go_back_without_a_flush",
            STALE + "test_the_emulator_keeps_no_translations_to_be_stale",
        ),
        no_control="the emulator drops all translations at `VMFUNC`, VM entry and VM exit, so that "
        "a guest sees nothing stale even in a kernel without INVEPT, where the attack is run as "
        "well; what shows is that every processor runs INVEPT before a page goes back, and that "
        "none does in that kernel",
    ),
    Threat(
        "T23",
        "speculation past the gate's check or an object's bounds check",
        "LFENCE behind the check; no indirect branch in objects; masked indices in the switch, "
        "which stay in registers (T39)",
        (
            "tests/guest/test_gate.py::test_every_path_is_safe",
            TOOLCHAIN + "test_branches_that_lead_elsewhere",
        ),
        no_control="the emulator does not speculate: that the instructions are there is all that "
        "is shown",
        residual="caches and predictors are shared with the guest; bounds checks of objects other "
        "than the switch are their authors'; a processor whose VMFUNC runs ahead of a fence",
    ),
    Threat(
        "T24",
        "endless or very long work inside an object",
        "the switch takes at most one burst in a call",
        (
            "tests/switch/test_refusals.py::test_unknown_operations_flags_and_counts",
            BOUNDED + "test_a_full_burst_to_everybody",
            BOUNDED + "test_full_lines_of_the_table_and_frames_full_of_tags",
            BOUNDED + "test_rings_of_any_content_that_change_all_the_time",
        ),
        (
            ATTACH + "test_a_vcpu_that_stopped_inside",
            BOUNDED + "test_control_a_switch_that_takes_any_number_of_frames",
        ),
        residual="an object that loops keeps its caller's vCPU, not others; the host can stop it",
    ),
    Threat(
        "T25",
        "every argument of the new calls wrong, racing, from another VM's file, after close",
        "an errno, and nothing has changed",
        (
            CALLS + "test_bad_leaf",
            CALLS + "test_bad_tables",
            CALLS + "test_bad_requests",
            CALLS + "test_bad_slots",
            MEMORY + "test_bad_registrations",
            CALLS + "test_contexts_that_name_contexts",
            CALLS + "test_without_sys_admin",
            CALLS + "test_a_vm_of_another_process",
            OWNERS + "test_a_context_of_another_vm",
            "tests/elisa/test_racing_callers.py::test_racing_callers",
        ),
        (OWNERS + "test_a_context_of_another_vm_gives_its_memory_away",),
    ),
    Threat(
        "T26",
        "memory types: PAT or CR3.PCD making trusted memory uncached or write-combining",
        "every leaf of a context is write-back with IPAT, which the kernel sets",
        (MEMORY_TYPES + "test_every_leaf_is_write_back_whatever_the_guest_says",),
        (MEMORY_TYPES + "test_leaves_that_leave_it_to_the_guest",),
        residual="neither caches nor their types exist in the emulator: the tables of an attached "
        "vCPU are read back from the host's memory, and what a processor does by them is not shown",
    ),
    Threat(
        "T27",
        "walking stale translations: CR3 changed without a flush (PCID), global pages, "
        "transactions that roll back over `VMFUNC`",
        "PCID, RTM and HLE hidden from such guests; no entry of a context's tables is global",
        (
            FEATURES + "test_cpuid",
            FEATURES + "test_control_register",
            CONTEXTS + "test_no_translation_is_global",
        ),
        (
            WEAK + "features.py::test_the_guest_sees_it",
            WEAK + "features.py::test_pcid_is_turned_on",
        ),
        residual="the emulators flush at every change of CR3 and have no transactions: the control "
        "shows that the guest has the means, not what it reaches with them",
    ),
    Threat(
        "T28",
        "a second vCPU in its default context while a gate fills *its* transient slot: a VMM that "
        "puts a gate made for one vCPU into another's list",
        "a slot takes no context that maps another vCPU's list page, itself or through the context "
        "that it names",
        (
            OWNERS + "test_a_gate_for_another_vcpu",
            CALLS + "test_lists_of_other_vcpus",
        ),
        (OWNERS + "test_a_gate_that_opens_another_vcpus_slot",),
    ),
    Threat(
        "T29",
        "a guest's unprivileged process running `VMFUNC`, which works at CPL 3, to get into an "
        "object or to stop its VM",
        "a supervisor attachment's pages are out of its reach; what goes wrong at CPL above 0, in "
        "whatever context, is an invalid opcode for the process, with nothing of the object's in "
        "its registers",
        (
            SEGMENTS + "test_a_process_runs_vmfunc",
            SEGMENTS + "test_a_process_tries_other_slots",
        ),
        (
            SEGMENTS + "test_a_process_calls_what_is_attached_for_user_mode",
            WEAK + "home.py::test_a_process_stops_its_vm",
        ),
        residual="any process of a guest can call what is attached for user mode, whatever the "
        "guest's own page tables say",
    ),
    Threat(
        "T30",
        "an exit of trusted code, to be served with the guest's own memory: an instruction that "
        "KVM emulates is read from the guest's page at that address",
        "I7: outside the default context KVM serves no exit that needs guest memory or guest "
        "instructions; the vCPU stops and the VMM is told",
        (
            EXITS + "test_an_instruction_of_the_guests_own",
            ATTACH + "test_instructions_that_leave_the_sub_context",
        ),
        (EXITS + "test_kvm_emulates_what_the_guest_has_there",),
    ),
    Threat(
        "T31",
        "stopping in a gate behind its store, and going through the filled slot after the vCPU was "
        "taken home, while another gate leads to the same object",
        "I1: the transient slot is emptied wherever a vCPU is taken home",
        (HOME + "test_the_transient_slot_after_a_revocation",),
        (WEAK + "home.py::test_a_slot_that_stays_filled_on_the_way_home",),
    ),
    Threat(
        "T32",
        "reading, after a revocation, the flags of a comparison with a secret, or where trusted "
        "code stood",
        "general and vector registers, RIP, RSP, arithmetic flags, CR2, DR6, pending debug "
        "exceptions and the interrupt shadow are cleared",
        (
            HOME + "test_flags_of_a_comparison_with_a_secret",
            HOME + "test_the_place_of_a_fault",
        ),
        (
            WEAK + "home.py::test_flags_tell_how_a_guess_compares",
            WEAK + "home.py::test_rip_and_rsp_tell_where_it_stood",
        ),
        residual="the exit tells the VMM where it was: a VMM that hands this on gives it away",
    ),
    Threat(
        "T33",
        "a VMM that sets the registers of a vCPU which stopped inside, to values that the guest "
        "may choose",
        "every call that sets a vCPU's state fails with EBUSY until it is back or revoked",
        (HOME + "test_the_vmm_sets_the_state_of_a_vcpu_inside",),
        (WEAK + "home.py::test_registers_that_the_vmm_sets_start_internal_code",),
    ),
    Threat(
        "T34",
        "counting what trusted code does by performance counters",
        "VMs with contexts have none: CPUID leaf 0xA with a version is refused",
        (
            FEATURES + "test_counters_by_the_vmm",
            FEATURES + "test_counters_by_the_guest",
            "tests/elisa/test_hidden_features_list.py::test_no_performance_counters",
        ),
        (WEAK + "features.py::test_counters_are_offered",),
        residual="the emulated processor has no counters: the control shows that they are offered",
    ),
    Threat(
        "T35",
        "features of processors to come, which may change what bytes mean or who may write what",
        "of CPUID leaf 7, and of state components, a guest has what a list allows; the rest is "
        "refused, known or not",
        (
            FEATURES + "test_leaf_7_by_what_is_allowed",
            FEATURES + "test_state_components_by_what_is_allowed",
            "tests/elisa/test_hidden_features_list.py::test_of_leaf_7_what_is_checked_stays",
            "tests/verify/test_planted_faults.py::test_a_prefix_of_processors_to_come",
        ),
        (WEAK + "features.py::test_what_nobody_knows_yet_is_offered",),
    ),
    Threat(
        "T36",
        "registered memory, which all sub contexts map through the same tables: running what a "
        "guest has written into a window, reading behind its end, using it when it was given back",
        "the kernel owns those tables, makes nothing in them executable, and maps whole pages of "
        "the object alone; contexts keep the memory until their translations are flushed",
        (
            MEMORY + "test_memory_is_never_executed",
            MEMORY + "test_behind_the_end_there_is_nothing",
            MEMORY + "test_contexts_keep_it",
            MEMORY + "test_bad_part",
            MEMORY + "test_a_part_at_another_level",
            MEMORY + "test_files_and_parts_that_are_none",
            MEMORY + "test_without_sys_admin",
        ),
        (WEAK + "memory.py::test_executable_memory_runs",),
        residual="the control takes execution alone away. That no page is left behind in a "
        "translation rests on the flush of each context, whose control is T22's",
    ),
    Threat(
        "T37",
        "a second vCPU of the same guest while the first is in the object: at its stack, its list, "
        "its gate, its window, and the memory that the object keeps for one caller",
        "each vCPU has contexts of its own, with a stack, a list page and an environment that "
        "names the vCPU; an object says by how many vCPUs of a guest it may be entered, and a "
        "guest with more is refused",
        (
            SEVERAL + "test_a_stack_at_the_same_address",
            SEVERAL + "test_the_transient_slot_while_a_sibling_fills_its_own",
            SEVERAL + "test_a_list_that_a_sibling_writes_to",
            SEVERAL + "test_a_siblings_gate",
            SEVERAL + "test_a_window_that_a_sibling_changes_during_the_call",
            "tests/elisa/test_several_vcpus.py::test_a_guest_with_more_vcpus_than_the_object_takes",
            "tests/elisa/test_several_vcpus.py::test_a_vcpu_more_than_the_object_takes",
        ),
        (
            SEVERAL + "test_a_stack_that_vcpus_share_is_overwritten",
            SEVERAL + "test_an_object_for_one_vcpu_that_two_enter",
        ),
        residual="that an object's code allows for the number of vCPUs that its declaration names "
        "is up to its author; vCPUs of one guest share its window. That a list takes no context "
        "of another vCPU is the kernel's rule: its control is T28's",
    ),
    Threat(
        "T38",
        "a processor with weaknesses (L1TF, MDS, MMIO stale data, RFDS, retbleed, ITS): reading "
        "what an object left in caches and buffers, training its returns; KVM answers them where "
        "it enters a guest, and a crossing enters none",
        "without an answer, or the administrator's word for each by name, the kernel makes no "
        "context; where buffers leak each return of an object clears them (`VERW`), where returns "
        "can be trained each has a call of its own",
        (
            WEAK_PROCESSORS + "test_a_weakness_that_is_left",
            WEAK_PROCESSORS + "test_the_kernel_and_pykvm_name_what_is_left",
            WEAK_PROCESSORS + "test_what_is_no_longer_accepted",
            WEAK_PROCESSORS + "test_objects_with_all_answers",
            WEAK_PROCESSORS + "test_an_object_without_what_is_needed",
            "tests/verify/test_planted_faults.py::test_buffers_that_are_not_cleared",
        ),
        (WEAK + "processor.py::test_contexts_on_a_weak_processor",),
        residual="the emulated processor reports weaknesses and has none: that the refusal works "
        "is shown, what it prevents is not. L1TF has no answer without an exit. That an object's "
        "code contains the answers is the VMM's word, as is the code itself",
    ),
    Threat(
        "T39",
        "speculative store bypass, which a guest allows by SPEC_CTRL: an index that was masked, "
        "stored and loaded again is speculatively what lay there before, as the guest chose it",
        "the instructions that bound an index are marked; the toolchain follows what they bound "
        "along every path of the object, and refuses an object that uses it as an address after "
        "it was in memory with no LFENCE in between",
        (
            MASKED + "test_through_memory",
            MASKED + "test_through_calls",
            MASKED + "test_what_bounds_an_index_comes_from_memory",
            MASKED + "test_what_a_compiler_spills",
        ),
        (MASKED + "test_unchecked_the_spill_is_in_the_code",),
        residual="the emulator does not speculate: the control shows that store, load and use are "
        "in the code. Pointers and other values that no mask has bounded are not followed, nor "
        "memory to which two pointers of different origin lead; that an author masks what a guest "
        "chooses is up to him",
    ),
    Threat(
        "T40",
        "an exit inside an object that is nobody's fault stopping an innocent guest: a notify VM "
        "exit of a host that allows few cycles between two interrupt windows, an interrupt of the "
        "host's, a full log of dirty pages",
        "exits that need neither the guest's memory nor its instructions are on a list, notify VM "
        "exits among them; KVM serves them anywhere, and the guest goes on inside the object",
        (
            NOTIFY + "test_notify_exits_are_served",
            NOTIFY + "test_the_list_is_what_the_documentation_says",
        ),
        no_control="no emulator has notify VM exits: the tests read the list that the kernel is "
        "built with, for both series. Exits by the host's interrupts happen in every test inside",
    ),
)
