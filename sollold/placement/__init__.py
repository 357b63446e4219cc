"""Computes a plan, with its reasons, from a footprint, devices and a policy. Pure: no I/O, no clock."""
