"""PCI functions: configuration space, base address registers, message-signalled interrupts."""
