"""Common parts of x86 machines: the processor's initial state, and KVM's own pages."""
