"""The host's processor: its maker, and its VMX capability MSRs.

`/proc/cpuinfo` lists neither "enable VM functions" nor EPTP switching, so both are read from the
MSRs (SDM vol. 3D appendix A), which takes root and the `msr` module.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from pykvm.errors import PykvmError
from pykvm.host.advice import load_module
from pykvm.host.commands import emulated_host

__all__ = ["MsrUnreadableError", "Processor", "VmxCapabilities", "read_msr", "read_processor"]

_IA32_FEATURE_CONTROL = 0x3A
_IA32_VMX_PROCBASED_CTLS = 0x482
_IA32_VMX_PROCBASED_CTLS2 = 0x48B
_IA32_VMX_EPT_VPID_CAP = 0x48C
_IA32_VMX_VMFUNC = 0x491


class MsrUnreadableError(PykvmError):
    """A model-specific register cannot be read."""


@dataclass(frozen=True)
class Processor:
    """The first processor in `/proc/cpuinfo`; all of a host's are taken to be alike."""

    vendor: str
    name: str
    family: int
    model: int
    stepping: int
    microcode: str
    flags: frozenset[str]

    @property
    def is_intel(self) -> bool:
        """Return whether Intel made it; `VMFUNC` exists nowhere else."""
        return self.vendor == "GenuineIntel"

    @property
    def has_vmx(self) -> bool:
        """Return whether it offers VMX to this kernel."""
        return "vmx" in self.flags


def read_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Processor:
    """Return the first processor of `/proc/cpuinfo`; what that does not say is empty or -1."""
    words: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines():
        if not line.strip():
            break
        name, _, value = line.partition(":")
        words[name.strip()] = value.strip()
    return Processor(
        vendor=words.get("vendor_id", ""),
        name=words.get("model name", ""),
        family=int(words.get("cpu family", -1)),
        model=int(words.get("model", -1)),
        stepping=int(words.get("stepping", -1)),
        microcode=words.get("microcode", ""),
        flags=frozenset(words.get("flags", "").split()),
    )


def read_msr(register: int, cpu: int = 0) -> int:
    """Return the 64 bits of a model-specific register of one processor.

    Raises:
        MsrUnreadableError: no `msr` module, no permission, or no such register.
    """
    path = f"/dev/cpu/{cpu}/msr"
    try:
        device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise MsrUnreadableError(f"no {path}", load_module("msr", emulated_host())) from error
    except PermissionError as error:
        raise MsrUnreadableError(f"no permission to read {path}", "run this as root") from error
    except OSError as error:
        raise MsrUnreadableError(
            f"cannot open {path} ({error.strerror})", emulated_host()
        ) from error
    try:
        return int(struct.unpack("<Q", os.pread(device, 8, register))[0])
    except OSError as error:
        raise MsrUnreadableError(
            f"this processor has no MSR {register:#x} ({error.strerror})", emulated_host()
        ) from error
    finally:
        os.close(device)


@dataclass(frozen=True)
class VmxCapabilities:
    """The VMX capabilities of a processor; each attribute is the raw value of the MSR of its name.

    A control's high half says which bits may be set. Registers that announce others of the
    table do not exist without them, and are 0 here.
    """

    feature_control: int
    procbased: int
    procbased2: int
    ept_vpid: int
    vmfunc: int

    @classmethod
    def read(cls, cpu: int = 0) -> "VmxCapabilities":
        """Read the MSRs of one processor.

        Raises:
            MsrUnreadableError: see `read_msr`; also where there is no VMX.
        """
        feature_control = read_msr(_IA32_FEATURE_CONTROL, cpu)
        procbased = read_msr(_IA32_VMX_PROCBASED_CTLS, cpu)
        # SDM vol. 3D A.3.3, A.10 and A.11 say which register exists only with which control.
        procbased2 = read_msr(_IA32_VMX_PROCBASED_CTLS2, cpu) if procbased >> 63 else 0
        ept = bool(procbased2 >> 33 & 1)
        functions = bool(procbased2 >> 45 & 1)
        return cls(
            feature_control=feature_control,
            procbased=procbased,
            procbased2=procbased2,
            ept_vpid=read_msr(_IA32_VMX_EPT_VPID_CAP, cpu) if ept else 0,
            vmfunc=read_msr(_IA32_VMX_VMFUNC, cpu) if functions else 0,
        )

    @property
    def enabled_by_firmware(self) -> bool:
        """Return whether VMXON works: unlocked, or locked with VMX outside SMX.

        Source: SDM vol. 3C 24.7.
        """
        return not self.feature_control & 1 or bool(self.feature_control & 4)

    @property
    def vm_functions(self) -> bool:
        """Return whether "enable VM functions" may be set (secondary control 13)."""
        return bool(self.procbased2 >> 45 & 1)

    @property
    def eptp_switching(self) -> bool:
        """Return whether VM function 0 exists, EPTP switching."""
        return bool(self.vmfunc & 1)

    def ept_features(self) -> dict[str, bool]:
        """Return which features EPT has, by name.

        Source: IA32_VMX_EPT_VPID_CAP, SDM vol. 3D A.10.
        """
        bits = {
            "execute-only": 0,
            "4 levels": 6,
            "5 levels": 7,
            "write-back tables": 14,
            "2M pages": 16,
            "1G pages": 17,
            "INVEPT": 20,
            "accessed and dirty flags": 21,
            "INVEPT of one context": 25,
            "INVEPT of all contexts": 26,
        }
        return {name: bool(self.ept_vpid >> bit & 1) for name, bit in bits.items()}
