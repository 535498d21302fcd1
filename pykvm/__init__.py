"""pykvm: a KVM userspace VMM with exit-less sharing between virtual machines (ELISA)."""
