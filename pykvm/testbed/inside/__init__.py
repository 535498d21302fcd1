"""What runs inside the emulated host: nothing here is imported outside."""
