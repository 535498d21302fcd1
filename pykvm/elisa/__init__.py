"""ELISA: shared objects in EPT contexts of their own, which guests call without a VM exit.

- `objects`: declare, open and attach a shared object. Start there.
- `guest`: what a guest of any kind offers so that objects can be attached to it.
- `attachment`: a guest's access to one object; `vcpu_attachment`: that of each of its vCPUs.
- `contexts`, `crossing`: what gate and sub contexts map where, as pure data.
- `trusted_images`: builds and checks the trusted code; `object_code` has the rules for objects, and
  `masked_indices` those for bounded indices (`operations`, `data_flow`, `instruction_effects`).
- `protections`: what a build for measurements or controls can leave out, and what weak processors
  need in addition.
- `calls`, `exits`: what the kernel patch adds to KVM. `hidden_features`: what it takes away.
"""

from pykvm.elisa.attachment import Attachment, TooManyVcpusError
from pykvm.elisa.exits import ElisaExit
from pykvm.elisa.objects import (
    GuestNumberError,
    ObjectInstance,
    ObjectSizeError,
    SharedObject,
    UnansweredWeaknessError,
)
from pykvm.elisa.protections import Protection
from pykvm.elisa.vcpu_attachment import (
    InsideContextError,
    SlotsFullError,
    SlotTakenError,
    VcpuAttachment,
)

__all__ = [
    "Attachment",
    "ElisaExit",
    "GuestNumberError",
    "InsideContextError",
    "ObjectInstance",
    "ObjectSizeError",
    "Protection",
    "SharedObject",
    "SlotTakenError",
    "SlotsFullError",
    "TooManyVcpusError",
    "UnansweredWeaknessError",
    "VcpuAttachment",
]
