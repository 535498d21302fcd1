"""Bare-metal 64-bit guests: construction, run and results.

A guest is one program without firmware and without an operating system, on one vCPU or several.
`BareGuest.__init__` builds the machine from top to bottom in boot order::

    program = CrossingProgram(calls=1000, ways=[Way.DIRECT])
    with Kvm() as kvm, BareGuest(kvm, program) as guest:
        status = guest.run()
        print(guest.console, way_samples(guest.samples(), program))

A failure of the guest raises an exception: `GuestAssertionError` with file and line,
`GuestFaultError` with the processor exception that the guest took, or `UnexpectedExitError` with a
report.
"""

import ctypes
import functools
from collections.abc import Callable, Collection
from typing import Any, Final, Protocol

from pykvm.closeable import Closeable
from pykvm.devices.debug_console import DebugConsole
from pykvm.elisa import calls, crossing
from pykvm.elisa.attachment import Attachment, attach_added_vcpu
from pykvm.elisa.protections import answers, needed
from pykvm.elisa.trusted_images import CrossingImages
from pykvm.kvm import Io, Kvm, MpState, Stopped, Vcpu
from pykvm.machine.bare import boot_info, layout
from pykvm.machine.bare.boot_info import BootFailure, BootInfo
from pykvm.machine.bare.failures import (
    AttachmentsFullError,
    GuestTimeoutError,
    InputTooLargeError,
    VcpusFullError,
    read_failure,
)
from pykvm.machine.bare.image import load_image, map_ram
from pykvm.machine.bare.vcpu_threads import VcpuThreads
from pykvm.machine.x86 import kvm_pages, long_mode
from pykvm.memory.guest_memory import GuestMemory, MemorySlot
from pykvm.memory.regions import Region
from pykvm.paging.entries import SIZE_2M, Access, X86Entry
from pykvm.paging.tables import PageTables, TableAddresses
from pykvm.sizes import PAGE_SIZE
from pykvm.toolchain.elf import ElfFile

__all__ = ["BareGuest", "Program"]

_READ_WRITE: Final = Access.READ | Access.WRITE
_READ_EXECUTE: Final = Access.READ | Access.EXECUTE


class Program(Protocol):
    """A guest program and its parameters; it may also have an `input()` that returns bytes."""

    def image(self) -> ElfFile: ...
    def params(self) -> list[int]: ...


class BareGuest(Closeable):
    """A virtual machine that runs one program.

    Attach objects (`ObjectInstance.attach`) and add regions before the first `run`.

    Args:
        kvm: an open ``/dev/kvm``.
        program: the program and its parameters.
        memory: bytes of RAM from GPA 0; at least `layout.RAM_SIZE` are used.
        name: name of the memory file.
        contexts: whether objects may be attached, if this KVM can do so. It needs CAP_SYS_ADMIN.
        irqchip: whether the kernel emulates interrupt controllers and a local APIC. A halted vCPU
            then waits in the kernel.
        crossing_gva: GVA of the crossing base, around which the guest maps its own pages of the
            crossing if an object is attached.
        paging_levels: 4, or 5 to run with CR4.LA57, which the processor must have.
        vcpus: number of vCPUs, 1 to `layout.MAX_VCPUS`. They enter the program one by one: vCPU 0
            runs its ``guest_main``, the others its ``vcpu_main``.

    Attributes:
        memory: the guest's memory.
        vm: the handle on the VM.
        vcpus: the handles on the vCPUs, in the order of their numbers.
        threads: the threads of started vCPUs.
        info: the page that guest and VMM share; its fields are the guest's memory, and after
            `close` a copy of it.
        crossing_gva: see the argument.
        paging_levels: see the argument.
        elisa_call: GVA of the entry page's function; 0 before an object is attached.

    Raises:
        ImageAddressError: a segment of the image lies outside the area for programs.
        InputTooLargeError: the program has more input or parameters than a guest has room for.
        VcpusFullError: there is no room for so many vCPUs.
        PagingLevelsError: `paging_levels` is 5, and the processor or this KVM has no LA57.
        PykvmError: the memory or the VM cannot be created.
    """

    def __init__(
        self,
        kvm: Kvm,
        program: Program,
        *,
        memory: int = layout.RAM_SIZE,
        name: str = "guest",
        contexts: bool = True,
        irqchip: bool = False,
        crossing_gva: int = crossing.CROSSING_GVA,
        paging_levels: int = 4,
        vcpus: int = 1,
    ) -> None:
        if not 1 <= vcpus <= layout.MAX_VCPUS:
            raise VcpusFullError(f"{vcpus} vcpus of a guest", f"use 1 to {layout.MAX_VCPUS}")
        image = program.image()
        # Memory, then the machine around it.
        self.memory = GuestMemory.create(max(memory, layout.RAM_SIZE), name=name)
        self._kvm = kvm
        self.vm = kvm.create_vm()
        self._console = DebugConsole()
        self._printed = bytearray()
        self.crossing_gva = crossing_gva
        self.paging_levels = paging_levels
        self.info = BootInfo()
        self.elisa_call = 0
        self._crossing: tuple[int, bool] | None = None
        self._announced = 0
        self._attachments: list[Attachment] = []
        self._slots = 0
        self.vcpus: list[Vcpu] = []
        self.threads = VcpuThreads()
        self._spare: Vcpu | None = None
        self._entry = image.entry
        self._irqchip = irqchip
        self._contexts = contexts and calls.version(kvm) > 0
        try:
            if self._contexts:
                calls.enable_contexts(self.vm, answered=answers(needed()))
            if irqchip:
                self.vm.create_irqchip()
            self.vm.set_identity_map_address(kvm_pages.IDENTITY_MAP_GPA)
            self.vm.set_tss_address(kvm_pages.KVM_TSS_GPA)
            self._console.attach(self.vm.handlers, boot_info.CONSOLE_PORT)
            for region in self.memory.regions:
                self._set_slot(region)

            # Content of the memory: program, page tables, descriptors, the page of information.
            load_image(self.memory, image)
            self._tables = PageTables(
                X86Entry,
                TableAddresses(layout.PAGE_TABLES_GPA, layout.PAGE_TABLES_SIZE),
                levels=paging_levels,
            )
            map_ram(self._tables, self.memory, image)
            self.memory.write(layout.GDT_GPA, long_mode.descriptors(layout.TSS_GPA))
            self._write_info(program)

            # The processors, in 64-bit mode at the image's first instruction.
            for _ in range(vcpus):
                self.add_vcpu()
        except BaseException:
            self.close()
            raise

    # ---- before it runs ---------------------------------------------------------------------

    @property
    def vcpu(self) -> Vcpu:
        """The first vCPU."""
        return self.vcpus[0]

    def add_vcpu(self) -> Vcpu:
        """Add a vCPU, which starts where the program does, and has all objects of the guest.

        The others may be running. If the call fails, the guest has the vCPUs and the objects that
        it had.

        Raises:
            VcpusFullError: there is no room for another one.
            TooManyVcpusError: an attached object takes no more vCPUs of a guest.
            PykvmError: see `pykvm.elisa.attachment.attach_added_vcpu`.
        """
        number = len(self.vcpus)
        if number == layout.MAX_VCPUS:
            raise VcpusFullError(f"a bare guest has {number} vcpus already", "use fewer")
        self._attachments = [each for each in self._attachments if each.complete]
        for attachment in self._attachments:
            attachment.check_another()
        # KVM cannot take a vCPU back: one that could not be attached is kept for the next try.
        vcpu = self._spare = self._spare or self.vm.create_vcpu(number)
        self.start_vcpu(
            vcpu, self._entry, layout.stack_top(number), layout.BOOT_INFO_GPA, number=number
        )
        attach_added_vcpu(self._attachments, vcpu)
        self._spare = None
        self.vcpus.append(vcpu)
        self.info.vcpus = len(self.vcpus)
        return vcpu

    def start_vcpu(
        self, vcpu: Vcpu, entry: int, stack: int, argument: int, *, number: int = 0
    ) -> None:
        """Set up a vCPU to start in 64-bit mode. The guest's own vCPUs are set up already.

        Args:
            vcpu: a vCPU of this VM.
            entry: initial RIP.
            stack: initial RSP.
            argument: initial RDI.
            number: initial RSI.
        """
        cpuid = long_mode.supported_features(
            self._kvm, contexts=self._contexts, irqchip=self._irqchip
        )
        long_mode.set_apic_id(cpuid, vcpu.id)
        vcpu.set_cpuid2(cpuid)
        long_mode.enter(
            vcpu,
            self._tables.root,
            cpuid,
            gdt=layout.GDT_GPA,
            idt=layout.IDT_GPA,
            tss=layout.TSS_GPA,
            levels=self.paging_levels,
        )
        # RFLAGS.IF is set, because Bochs withholds the host's own interrupts while a guest has it
        # clear.
        vcpu.set_regs(rip=entry, rsp=stack, rdi=argument, rsi=number, rflags=0x202)
        if self._irqchip:  # vCPUs other than the first would wait for INIT and SIPI
            vcpu.set_mp_state(MpState.RUNNABLE)

    def add_region(self, region: Region, access: Access = _READ_WRITE) -> None:
        """Add memory to the guest, mapped at GVA = GPA.

        Args:
            region: the memory; the guest closes it.
            access: accesses that the guest's page tables allow.
        """
        self.memory.add(region)
        self._set_slot(region)
        self._tables.map(region.gpa, region.gpa, region.size, access, max_page=SIZE_2M)
        self._tables.store(self.memory.write)

    def map(self, gva: int, gpa: int, size: int, access: Access) -> None:
        """Map guest memory at another GVA.

        Args:
            gva: first address; a multiple of 4096, like `gpa` and `size`.
            gpa: GPA of the memory.
            size: bytes.
            access: accesses that the guest's page tables allow.
        """
        self._tables.map(gva, gpa, size, access)
        self._tables.store(self.memory.write)

    # ---- for ObjectInstance.attach (pykvm.elisa.guest) -------------------------------------

    def next_window_gpa(self) -> int:
        return layout.WINDOW_GPA + self._announced * layout.WINDOW_STRIDE

    def join(
        self, images: CrossingImages, attachment: Attachment, window: Region | None, *, user: bool
    ) -> None:
        self.map_crossing(images, user=user)
        self.announce(attachment.slot, window)
        self._attachments.append(attachment)

    def map_crossing(self, images: CrossingImages, *, user: bool = False) -> None:
        """Map the guest's own pages of the crossing around `crossing_gva`.

        Args:
            images: the pages.
            user: whether to map them as user pages. The guest's runtime is not told of those,
                because it touches the pages in advance from kernel mode.
        """
        access = _READ_EXECUTE | (Access.USER if user else Access.NONE)
        for page, gpa, offset in (
            (images.entry_page, layout.ENTRY_PAGE_GPA, crossing.ENTRY_OFFSET),
            (images.return_page, layout.RETURN_PAGE_GPA, crossing.RETURN_OFFSET),
        ):
            self.memory.write(gpa, page)
            if self._crossing != (self.crossing_gva, user):
                self.map(self.crossing_gva + offset, gpa, PAGE_SIZE, access)
        self._crossing = self.crossing_gva, user
        self.elisa_call = self.crossing_gva + crossing.ENTRY_OFFSET + images.call_offset
        if not user:
            self.info.elisa_call = self.elisa_call

    def announce(self, slot: int, window: Region | None) -> None:
        """Tell the guest about another object.

        Args:
            slot: slot of the object's gate; 0 if the object is not reached with VMFUNC.
            window: the guest's window, or None if the object has none; the guest closes it.

        Raises:
            AttachmentsFullError: the page of information has no room. The window is closed.
        """
        if self._announced == boot_info.ATTACHMENTS:
            if window is not None:
                window.close()
            raise AttachmentsFullError(
                f"a bare guest knows {boot_info.ATTACHMENTS} objects", "attach fewer"
            )
        attachment = self.info.attachment[self._announced]
        attachment.gate_slot = slot
        if window is not None:
            self.add_region(window)
            attachment.window = window.gpa
            attachment.window_size = window.size
        self._announced += 1

    def set_direct(self, memory: Region, env: bytes) -> None:
        """Map an object's whole memory, for direct calls of the object's code in the guest.

        Args:
            memory: the object's memory; the guest closes it.
            env: struct elisa_env with addresses in `memory`.
        """
        self.add_region(memory)
        ctypes.memmove(ctypes.addressof(self.info.direct), env, len(env))

    def set_input(self, data: bytes) -> None:
        """Set the program's input.

        Raises:
            InputTooLargeError: it has more than `layout.CAPTURE_SIZE` bytes.
        """
        if len(data) > layout.CAPTURE_SIZE:
            raise InputTooLargeError(
                f"{len(data)} bytes of input, a guest takes {layout.CAPTURE_SIZE}", "send fewer"
            )
        self.memory.write(layout.CAPTURE_GPA, data)
        self.info.input = layout.CAPTURE_GPA
        self.info.input_size = len(data)

    # ---- running ----------------------------------------------------------------------------

    def run(self, on_mark: Callable[[int], object] | None = None, *, number: int = 0) -> int:
        """Run one vCPU until it finishes the program; return its status.

        Args:
            on_mark: called with the value of each mark, while the vCPU waits.
            number: number of the vCPU.

        Raises:
            GuestAssertionError: an ASSERT of the program failed.
            GuestFaultError: the program took an exception.
            GuestTimeoutError: `stop` was called.
            UnexpectedExitError: the guest left with any other exit.
            PykvmError: see `Vcpu.run`.
        """
        vcpu = self.vcpus[number]
        while True:
            exit = vcpu.run()
            match exit:
                case Io(port=boot_info.MARK_PORT, is_write=True):
                    if on_mark is not None:
                        on_mark(exit.value)
                case Io(port=boot_info.FINISH_PORT, is_write=True):
                    return exit.value
                case Io(port=boot_info.FAILURE_PORT, is_write=True):
                    raise read_failure(self.memory, self._failure(exit.value), self.console)
                case Stopped():
                    raise GuestTimeoutError(f"vcpu {number} was stopped {self._where(vcpu)}")
                case _:
                    raise vcpu.unexpected(exit)

    def start(
        self,
        on_mark: Callable[[int], object] | None = None,
        *,
        numbers: Collection[int] | None = None,
    ) -> None:
        """Call `run` for each vCPU in a thread of its own; `wait` returns the result.

        Args:
            on_mark: see `run`; called in the thread of the vCPU.
            numbers: numbers of the vCPUs to start; by default all.

        Raises:
            RuntimeError: a vCPU was started and `wait` has not been called.
        """
        chosen = range(len(self.vcpus)) if numbers is None else numbers
        self.threads.start(
            {
                number: (self.vcpus[number], functools.partial(self.run, on_mark, number=number))
                for number in chosen
            }
        )

    def wait(self, timeout: float | None = None, *, numbers: Collection[int] | None = None) -> int:
        """Wait until the started vCPUs finish; return the first status that is not 0, or 0.

        If one of them fails, the others are stopped.

        Args:
            timeout: seconds to wait at most; None for no limit.
            numbers: numbers of the vCPUs to wait for; by default all that were started.

        Raises:
            GuestTimeoutError: the guest did not finish in time; it is stopped.
            RuntimeError: the guest was not started.
            PykvmError: see `run`; the first failure of a vCPU.
        """
        waited = self.threads.started if numbers is None else numbers
        if not waited:
            raise RuntimeError("the guest has not been started: start() it first")
        return next(filter(None, self.threads.wait(waited, timeout)), 0)

    def stop(self) -> None:
        """Stop a started guest and wait for its threads. Harmless if it does not run."""
        self.threads.stop()

    # ---- results ----------------------------------------------------------------------------

    @property
    def console(self) -> str:
        """Everything that the guest has printed."""
        self._printed += self._console.read()
        return self._printed.decode("utf-8", "replace")

    def log(self, size: int) -> bytes:
        """Return the first `size` bytes of the log of received frames."""
        return self.memory.read(layout.RX_LOG_GPA, size)

    def samples(self, size: int = layout.SAMPLES_SIZE) -> bytes:
        """Return the first `size` bytes of the measurements."""
        return self.memory.read(self.info.samples, size)

    def results(self) -> list[int]:
        """Return the numbers in `BootInfo.result`, whose meaning the program defines."""
        return list(self.info.result)

    # ---- end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the guest, then close its VM and memory. Harmless twice."""
        if not self.inherited:  # otherwise it runs in the parent process
            self.stop()
        self.vm.close()
        # A view of the memory would keep it mapped.
        self.info = BootInfo.from_buffer_copy(self.info)
        self.memory.close()

    # ---- steps of the construction ----------------------------------------------------------

    def _set_slot(self, region: Region) -> None:
        self.vm.set_memory_slot(
            MemorySlot(self._slots, region.gpa, region.size, region.host_address, region.read_only)
        )
        self._slots += 1

    def _write_info(self, program: Program) -> None:
        # The fields of the structure are the guest's memory itself.
        view: Any = self.memory.view(layout.BOOT_INFO_GPA, ctypes.sizeof(BootInfo))
        self.info = BootInfo.from_buffer(view)
        self.info.magic = boot_info.MAGIC
        self.info.log = layout.RX_LOG_GPA
        self.info.log_size = layout.RX_LOG_SIZE
        self.info.samples = layout.SAMPLES_GPA
        self.info.samples_size = layout.SAMPLES_SIZE
        params = program.params()
        if len(params) > boot_info.PARAMS:
            raise InputTooLargeError(
                f"{len(params)} parameters, a guest takes {boot_info.PARAMS}", "give fewer"
            )
        for index, value in enumerate(params):
            self.info.param[index] = value
        data = getattr(program, "input", None)
        if data is not None:
            self.set_input(data())

    # ---- reports ----------------------------------------------------------------------------

    def _failure(self, address: int) -> BootFailure:
        """Return the failure at an address of the guest; 0: the one on the page of information."""
        if not address:
            return self.info.failure
        data = self.memory.read(address, ctypes.sizeof(BootFailure))
        return BootFailure.from_buffer_copy(data)

    def _where(self, vcpu: Vcpu) -> str:
        """Return the place at which a vCPU was stopped, and the last line that it printed."""
        text = self.console.strip().splitlines()
        printed = f' after printing "{text[-1]}"' if text else ""
        return f"at rip {vcpu.get_regs().rip:#x}{printed}"
