"""Guest physical pages that KVM reserves (Linux Documentation/virt/kvm/api.rst)."""

from typing import Final

IDENTITY_MAP_GPA: Final = 0xFFFBC000  #: KVM_SET_IDENTITY_MAP_ADDR, one page
KVM_TSS_GPA: Final = 0xFFFBD000  #: KVM_SET_TSS_ADDR, three pages
