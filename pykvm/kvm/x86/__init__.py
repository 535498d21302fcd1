"""KVM on x86: what its handles have beyond those of any architecture.

- `system`, `vm`, `vcpu`: the parts of `Kvm`, `Vm` and `Vcpu`, named as the modules that use them.
- `cpuid`, `msr`: tables of leaves and registers, cut to what one call takes.
- `exits`: exits of x86 alone. `report`: a stopped vCPU for a person to read.
"""
