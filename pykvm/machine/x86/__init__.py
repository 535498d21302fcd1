"""What x86 machines have in common: the processor's first mode, KVM's own pages."""
