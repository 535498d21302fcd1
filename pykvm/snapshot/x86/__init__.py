"""State of KVM that x86 alone has: vCPUs, interrupt controllers, clocks."""
