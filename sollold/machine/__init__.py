"""This machine's hardware: devices, memory and speed, in bytes and bytes per second."""
