"""What this machine has: devices, memory, speed, in bytes and bytes per second."""
