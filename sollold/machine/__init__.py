"""Floor 0: what this machine has, in bytes and bytes per second."""
