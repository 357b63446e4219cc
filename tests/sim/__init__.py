"""A deterministic simulator: the daemon's state machines with a virtual clock and injected faults."""
