"""ELISA: shared objects in EPT contexts of their own, which guests call without a VM exit.

- `objects`: declare, open and attach a shared object. Start there.
- `attachment`: one vCPU's access to one object.
- `contexts`: what gate and sub contexts map where, as pure data.
- `toolchain`: builds and checks the trusted code; `object_code` has the rules for objects.
- `protections`: what a build for measurements or controls can leave out.
"""

from pykvm.elisa.attachment import Attachment, InsideContextError, SlotsFullError
from pykvm.elisa.objects import GuestNumberError, ObjectInstance, ObjectSizeError, SharedObject
from pykvm.elisa.protections import Protection

__all__ = [
    "Attachment",
    "GuestNumberError",
    "InsideContextError",
    "ObjectInstance",
    "ObjectSizeError",
    "Protection",
    "SharedObject",
    "SlotsFullError",
]
