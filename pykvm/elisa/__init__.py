"""ELISA: shared objects in EPT contexts of their own, which guests call without a VM exit.

- `objects`: declare, open and attach a shared object. Start there.
- `attachment`: one vCPU's access to one object.
- `contexts`: what gate and sub contexts map where, as pure data.
- `toolchain`: builds and checks the trusted code.
"""

from pykvm.elisa.attachment import Attachment, InsideContextError, SlotsFullError
from pykvm.elisa.objects import GuestNumberError, ObjectInstance, ObjectSizeError, SharedObject

__all__ = [
    "Attachment",
    "GuestNumberError",
    "InsideContextError",
    "ObjectInstance",
    "ObjectSizeError",
    "SharedObject",
    "SlotsFullError",
]
