"""The deterministic simulator: the daemon's own state machines under a virtual clock and any fault."""
